"""The bundled weights are what their cards say: settings, numbers and pictures, and they need no folder of one machine."""

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import rrepa_lab as rl
from rrepa_lab.errors import LabError
from rrepa_lab.paths import assets
from rrepa_lab.runs.card import read_scores
from rrepa_lab.runs.config import complete
from rrepa_lab.runs.model_card import CARD_PICTURES
from rrepa_lab.runs.names import CARD, CONFIG, SAMPLES, SPACE, WEIGHTS
from rrepa_lab.runs.run import build
from rrepa_lab.space.autoencoder import folder_of
from rrepa_lab.space.config import SpaceConfig
from rrepa_lab.studies import bundled

RUNS = sorted(path.parent.name for path in (assets() / "runs").glob(f"*/{CONFIG}"))
PHOTOGRAPHS = [name for name in RUNS if name.startswith("cifar10")]
PAIRS = ("cifar10-none", "cifar10-reverse", "cifar10-latent-none", "cifar10-latent-reverse")
LARGEST = 40 * 2**20  # bytes of all assets
# how far a number may be from the shipped one on another processor, by the width of the interval that is shipped with it
SPREAD = {"nats_per_dim": 0.1, "gradient_accuracy": 0.5, "iterated_accuracy": 0.5, "bayes_accuracy": 0.5, "FD": 1.0}


def test_assets_are_small_and_name_no_folder_of_a_machine():
    assert {"digits-none", "digits-forward", "digits-detach", "digits-reverse", *PAIRS} <= {*RUNS}
    files = [path for path in assets().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST
    for path in files:
        if path.suffix in (".json", ".jsonl", ".md", ".csv", ".yaml"):
            text = path.read_text("utf-8")
            assert not [folder for folder in ("/tmp/", "/home/", "/work/", "/root/") if folder in text], path


@pytest.mark.parametrize("name", RUNS)
def test_a_bundled_run_has_the_settings_of_its_preset(name):
    run = rl.load(name)
    assert run.name == run.config.name
    assert run.step == run.config.train.steps or run.config.train.keep != "last"
    found, expected = run.config.to_dict(), complete(rl.preset(name), run.classes).to_dict()
    expected["space"]["stored"] = found["space"]["stored"]  # filled in by a training
    expected["train"]["precision"] = found["train"]["precision"]  # a preset measures which is faster on the machine
    assert found == expected
    with safe_open(assets() / "runs" / name / WEIGHTS, "pt") as file:
        assert {file.get_tensor(key).dtype for key in list(file.keys())} == {torch.bfloat16}
    scores = read_scores(assets() / "runs" / name)
    assert scores is not None
    assert {*scores["split"]} == {"train", "test"}
    assert (scores["train_seed"] == run.config.train.seed).all()


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_the_card_shows_samples_of_these_weights(name):
    folder = assets() / "runs" / name
    drawn = CARD_PICTURES["samples"](rl.load(name), bundled.SHOWN)
    card = (folder / CARD).read_text("utf-8")
    assert f"![{drawn.caption}]({SAMPLES})" in card
    assert "\nTrained on " in card
    with Image.open(folder / SAMPLES) as stored, Image.open(io.BytesIO(drawn.png)) as now:
        difference = np.abs(np.asarray(stored, np.float64) - np.asarray(now, np.float64))
    assert difference.mean() < 1  # of 255: processors round differently


@pytest.mark.slow
@pytest.mark.skipif("RREPA_DATA" not in os.environ, reason="CIFAR-10 is in no repository: set RREPA_DATA to its folder")
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_the_shipped_scores_are_measured_again(name):
    shipped = read_scores(assets() / "runs" / name)
    assert shipped is not None
    again = bundled.scores(rl.load(name))
    assert [*again["metric"]] == [*shipped["metric"]]
    compared = 0
    for now, was in zip(again.to_dict("records"), shipped.to_dict("records"), strict=True):
        part = SPREAD.get(str(was["metric"]).split("[")[0])
        if part is not None:
            assert abs(now["value"] - was["value"]) <= part * (was["high"] - was["low"]), was["metric"]
            compared += 1
    assert compared == 9  # four of each split, and the Fréchet distance


def test_a_bundled_space_is_named_not_copied(tmp_path):
    config = rl.preset("cifar10-latent-none").override({"flow.width": 16, "flow.head_width": 16, "flow.layers": 1})
    assert config.space == SpaceConfig(kind="small-vae", weights="bundled:cifar10")
    run = build(config, [str(number) for number in range(10)])
    run.save(tmp_path)
    assert not (tmp_path / SPACE).exists()
    loaded = rl.load(tmp_path)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert loaded.space.encode(x).shape == (2, 4, 8, 8)
    assert torch.equal(loaded.space.encode(x), run.space.encode(x))
    about = json.loads((folder_of(config.space) / CONFIG).read_text())
    assert (about["config"]["data"]["name"], about["config"]["data"]["path"]) == ("cifar10", None)
    with pytest.raises(LabError, match="unknown bundled autoencoder 'cifar11'; did you mean 'cifar10'"):
        config.override({"space.weights": "bundled:cifar11"})


def test_what_is_not_to_be_bundled_is_refused(trained, tmp_path):
    half = tmp_path / "half"
    run = rl.load(trained)
    run.step = 1
    run.save(half)
    with pytest.raises(LabError, match="at step 1 of 4: train it to its end"):
        bundled.bundle(half)
    run = rl.load(trained)
    run.config = run.config.override({"data.path": str(tmp_path)})
    run.save(tmp_path / "local")
    with pytest.raises(LabError, match="data.path is .*, a folder of this machine"):
        bundled.bundle(tmp_path / "local")
    run.config = rl.load(trained).config.override({"encoder.weights": str(tmp_path / "weights.safetensors")})
    run.save(tmp_path / "taught")
    with pytest.raises(LabError, match="encoder 0 is .*weights.safetensors"):
        bundled.bundle(tmp_path / "taught")
