"""Runs on the Hugging Face Hub: huggingface_hub's own client against a local server that speaks its protocol."""

import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import PLAIN, free_port
from hub_server import hub_server
from huggingface_hub import ModelCard, constants
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.align import hub as reachability
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.runs.card import save_scores


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = "/{repo_id}/resolve/{revision}/{filename}"  # the library makes it of HF_ENDPOINT when it is imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setattr(reachability._State, "last_failure", -float("inf"))
        yield hub


@pytest.fixture
def saved(trained, tmp_path):
    """A run with everything that a folder may hold, scores and best weights too."""
    folder = tmp_path / "photos and more" / "my-run"
    shutil.copytree(trained, folder)
    shutil.copy(folder / "model.safetensors", folder / "best.safetensors")
    (folder / ".secret").write_text("not for others")
    (folder / "notes.txt").write_text("mine")
    run = rl.load(folder)
    save_scores(run, rl.evaluate(run, samples=0, n_noise_samples=1, limit=20))
    return rl.load(folder)


def files_of(hub, repo_id="ada/digits"):
    return hub.repos[repo_id].commits[-1][1]


def front_matter(text: str) -> Any:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1])


def folder_of(run: rl.Run) -> Path:
    assert run.directory is not None
    return run.directory


def test_what_is_pushed_comes_back_byte_for_byte(server, saved):
    address = saved.push("ada/digits", samples=4, license="mit")
    assert address == f"{server.endpoint}/ada/digits"
    pushed = files_of(server)
    names = {"config.json", "model.safetensors", "best.safetensors", "metrics.jsonl", "scores.csv", "README.md", "samples.png"}
    assert set(pushed) == names | {".gitattributes"}
    back = rl.load("ada/digits")
    for name in names - {"README.md", "samples.png"}:
        assert (folder_of(back) / name).read_bytes() == (saved.directory / name).read_bytes() == pushed[name]
    x = saved.data("test", 4).x
    assert torch.equal(back.flow.log_prob(x), saved.flow.log_prob(x))
    assert (back.name, back.classes, back.step) == ("digits-reverse", saved.classes, saved.step)
    assert server.repos["ada/digits"].private
    assert any(request.startswith("PUT /lfs/") for request in server.requests), "weights go by Git LFS"
    assert any("/cdn/" in request for request in server.requests), "and come by a redirect"


def test_the_model_card_renders(server, saved):
    saved.push("ada/digits", samples=6, license="mit")
    text = files_of(server)["README.md"].decode()
    data: Any = ModelCard(text).data  # the Hub's own parser
    assert (data.license, data.library_name) == ("mit", "rrepa_lab")
    assert {"normalizing-flow", "r-repa", "class-conditional"} <= set(data.tags)
    scores = pd.read_csv(saved.directory / "scores.csv")
    assert [round(result.metric_value, 9) for result in data.eval_results] == [round(v, 9) for v in scores["value"]]
    assert data.eval_results[0].metric_args["protocol"] == scores["protocol"][0]
    assert data.metrics == ["accuracy"]
    with Image.open(io.BytesIO(files_of(server)["samples.png"])) as picture:
        assert picture.format == "PNG"
        assert picture.width > 100
    caption = "6 samples, not selected: classes in turn, seeds 0 to 5, unguided, denoised"
    assert f"![{caption}](samples.png)" in text
    for part in (
        f"| data | digits {saved.fingerprints['train']} |",
        "| encoder | vit_tiny_patch16_224",
        "## Scores",
        "true labels, seed 0",
        "## Use",
    ):
        assert part in text
    assert 'rl.load("ada/digits")' in text
    assert str(saved.directory) not in text, "no path of this machine"


def test_a_later_push_replaces_the_files(server, saved):
    saved.push("ada/digits", samples=1)
    first = server.repos["ada/digits"].commits[-1][0]
    server.repos["ada/digits"].tags["v1"] = first
    (saved.directory / "best.safetensors").unlink()
    (saved.directory / "metrics.jsonl").write_text("")
    saved.push("ada/digits", samples=0, private=False)
    assert not {"best.safetensors", "samples.png"} & set(files_of(server))
    assert len(server.repos["ada/digits"].commits) == 3
    assert server.repos["ada/digits"].private, "one that exists keeps what it is"
    new, old = rl.load("ada/digits"), rl.load("ada/digits", revision="v1")
    assert (folder_of(old).name, (folder_of(old) / "best.safetensors").is_file()) == (first, True)
    assert not (folder_of(new) / "best.safetensors").exists()
    assert rl.load("ada/digits@v1").directory == rl.load("ada/digits", revision=first).directory == old.directory


def test_without_network_a_run_in_the_cache_is_loaded(server, saved, monkeypatch):
    saved.push("ada/digits", samples=0)
    online = rl.load("ada/digits")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    assert rl.load("ada/digits").directory == online.directory
    with pytest.raises(LabError, match=r"ada/other cannot be read, and it is not in the cache of .*: .* does not answer"):
        rl.load("ada/other")
    with pytest.raises(LabError, match=r"cannot push to ada/digits: http://127.0.0.1:\d+ does not answer within 4 s"):
        saved.push("ada/digits", samples=0)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("", "ada/digits", "cannot push to ada/digits: there is no token of the Hub on this machine: hf auth login"),
        ("hf_wrong", "ada/digits", r"the Hub refuses the token \(401\), which may have expired: hf auth login"),
        ("hf_reader", "ada/digits", r"the login may not do that \(403\)"),
        ("hf_writer", "grace/digits", r"the login may not do that \(403\)"),
        ("hf_writer", "ada/di gits", "is no name for the Hub: give OWNER/NAME"),
    ],
)
def test_a_refused_push_is_one_line(server, saved, monkeypatch, token, repo_id, message):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(saved.directory / "none"))
    with pytest.raises(LabError, match=message) as caught:
        saved.push(repo_id, samples=0)
    assert "\n" not in str(caught.value)
    assert "digits" not in "".join(server.repos)


def test_a_refused_load_is_one_line(server, saved, monkeypatch):
    saved.push("ada/digits", samples=0)
    server.put("ada/bert", {"config.json": b'{"architectures": ["BertModel"]}', "model.safetensors": b"x" * 1000})
    server.put("ada/pictures", {"README.md": b"hello"})
    cases = {
        "ada/missing": r"the Hub has no model 'ada/missing' for this login \(404\)",
        "ada/digits@v9": "ada/digits on the Hub has no revision 'v9'",
        "ada/bert": "ada/bert on the Hub is no rrepa_lab run: .*is not the configuration of an rrepa_lab run",
        "ada/pictures": "ada/pictures on the Hub is no rrepa_lab run: it has no config.json",
    }
    for name, message in cases.items():
        with pytest.raises(LabError, match=message) as caught:
            rl.load(name)
        assert "\n" not in str(caught.value)
    assert not any("bert" in request and "model.safetensors" in request for request in server.requests)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(saved.directory / "none"))
    with pytest.raises(LabError, match=r"no model 'ada/digits' for this login \(401\).*if it is private, hf auth login"):
        rl.load("ada/digits")
    with pytest.raises(LabError, match="a revision .v1. is one of a run on the Hub"):
        rl.load("digits-none", revision="v1")


def test_a_damaged_file_is_one_line(server, saved):
    saved.push("ada/digits", samples=0)
    files = dict(files_of(server))
    server.put("ada/short", files | {"best.safetensors": files["best.safetensors"][:-100]})
    with pytest.raises(LabError, match=r"best.safetensors is damaged or no safetensors file") as caught:
        rl.load("ada/short")
    assert "\n" not in str(caught.value)


@pytest.mark.slow  # the client tries five times
def test_a_transfer_that_breaks_off_is_one_line(server, saved):
    saved.push("ada/digits", samples=0)
    # both files may hold the same weights, and the client downloads such a file once, under whichever name comes first
    server.cut |= {"best.safetensors", "model.safetensors"}
    with pytest.raises(LabError, match="ada/digits cannot be read") as caught:
        rl.load("ada/digits")
    assert "\n" not in str(caught.value)
    server.cut.clear()
    assert rl.load("ada/digits").step == saved.step


def test_samples_that_cannot_be_drawn_are_left_out(server, saved):
    saved.flow.block(2).proj_out.bias.data.fill_(1e30)
    with pytest.warns(LabWarning, match="the card has no picture of samples"):
        saved.push("ada/digits", samples=2)
    assert "samples.png" not in files_of(server)
    assert "samples.png" not in files_of(server)["README.md"].decode()


def test_what_is_not_saved_is_not_pushed(server, tiny, tmp_path):
    from rrepa_lab.runs.run import build

    run = build(tiny, [str(number) for number in range(10)])
    with pytest.raises(LabError, match="only a saved run can be pushed"):
        run.push("ada/digits")
    run.directory = tmp_path
    with pytest.raises(LabError, match=r"is no saved run: it lacks config.json"):
        run.push("ada/digits")
    assert server.repos == {}


def test_by_the_command_line_in_a_process_of_its_own(saved, tmp_path):
    with hub_server() as hub:
        env = os.environ | {
            "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_writer", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        program = [sys.executable, "-m", "rrepa_lab.cli"]
        push = subprocess.run(
            [*program, "push", str(saved.directory), "ada/digits", "--samples", "2", "--license", "mit"], env=env, timeout=120,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert push.returncode == 0, push.stderr
        assert f"{hub.endpoint}/ada/digits" in push.stdout
        assert "rrepa-lab sample ada/digits" in push.stdout


def test_a_refusal_of_the_command_line_is_one_line(server, saved, capsys):
    assert main(["push", str(saved.directory), "grace/digits", "--samples", "0"]) == 2
    error = capsys.readouterr().err
    assert "the login may not do that (403)" in error
    assert error.count("\n") == 1


def test_the_page_of_help_names_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["push", "--help"])
    assert "OWNER/NAME" in capsys.readouterr().out


def test_a_flow_without_classes(server, tmp_path, monkeypatch):
    config = rl.preset("digits-none").override(PLAIN | {
        "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 1, "flow.classes": 0, "train.steps": 1,
    })  # fmt: skip
    list(rl.train(config, tmp_path / "plain", device="cpu"))
    rl.load(tmp_path / "plain").push("ada/plain", samples=1)
    meta = front_matter(files_of(server, "ada/plain")["README.md"].decode())
    assert meta["pipeline_tag"] == "unconditional-image-generation"
    assert "model-index" not in meta
    assert rl.load("ada/plain").flow.config.classes == 0


# --- what a run needs beside its own weights --------------------------------------------------------------------------------

SMALL_FLOW = {
    "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 1, "align.blocks": [2], "align.layers": [1],
    "align.projector_width": 8, "train.steps": 2, "train.batch": 16, "train.precision": "float32", "train.keep": "last",
}  # fmt: skip


def test_a_space_and_a_teacher_that_the_kit_trained_go_along(server, tmp_path):
    at = {name: str(tmp_path / "here" / name) for name in ("vae", "encoder", "run")}
    words = ["--set", "width=8", "--set", "factor=2", "--set", "channels=2", "--set", "steps=2", "--set", "batch=16"]
    assert main(["vae", "train", "digits", "--out", at["vae"], *words]) == 0
    assert main(["encoder", "train", "--out", at["encoder"], "--set", "steps=1", "--set", "batch=16"]) == 0
    settings = SMALL_FLOW | {
        "space.kind": "small-vae", "space.weights": at["vae"], "flow.image_size": 4, "flow.channels": 2, "flow.patch_size": 2,
    }  # fmt: skip
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    train = ["train", "digits-reverse", "--encoder", at["encoder"], "--out", at["run"], "--device", "cpu", *flags]
    assert main(train) == 0
    run = rl.load(at["run"])
    x, y = run.data("test", 4)
    expected = rl.alignment(run, x, y).loss.item()
    run.push("ada/latents", samples=2)
    pushed = files_of(server, "ada/latents")
    attached = {"space/config.json", "space/model.safetensors", "encoder/config.json", "encoder/model.safetensors"}
    assert attached <= set(pushed)
    assert str(tmp_path) not in pushed["README.md"].decode(), "the card names no folder of this machine"
    assert "| space | small-vae 2x4x4" in pushed["README.md"].decode()
    (tmp_path / "here").rename(tmp_path / "gone")
    back = rl.load("ada/latents")
    assert rl.alignment(back, x, y).loss.item() == pytest.approx(expected, abs=1e-5)
    assert rl.sample(back, [0], 3).images.shape == (1, 1, 8, 8)
    back.push("ada/again", samples=0)
    assert {name: pushed[name] for name in attached} == {name: files_of(server, "ada/again")[name] for name in attached}


def test_weights_of_others_stay_here(server, saved, tmp_path):
    saved.config = saved.config.override({"encoder.weights": str(tmp_path / "dinov3.safetensors")})
    with pytest.warns(LabWarning, match=r"the teacher's weights .*dinov3.safetensors stay on this machine"):
        saved.push("ada/digits", samples=0)
    assert not any(name.startswith("encoder/") for name in files_of(server))
    (tmp_path / "sd-vae").mkdir()
    space = saved.config.space.model_copy(update={"kind": "vae", "weights": str(tmp_path / "sd-vae")})
    saved.config = saved.config.model_copy(update={"space": space})
    with pytest.raises(LabError, match=r"the run needs its space, and .*sd-vae is a folder of this machine: push it as a repo"):
        saved.push("ada/other", samples=0)
    assert "ada/other" not in server.repos
