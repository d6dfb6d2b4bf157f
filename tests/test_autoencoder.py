"""Autoencoders that the kit trains, and flows of their latents."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLAIN
from PIL import Image
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.cli.vae import _next_training
from rrepa_lab.data.cache import entries
from rrepa_lab.data.loaders import generator
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.reconstruction import train_autoencoder
from rrepa_lab.space.autoencoder import AutoencoderConfig, data_settings
from rrepa_lab.space.kinds.features import Features
from rrepa_lab.space.latents import LatentSpace
from rrepa_lab.space.networks import psnr
from rrepa_lab.training.inputs import StepInputs
from rrepa_lab.training.latents import latent_table, wants_table

SMALL = {"factor": 2, "channels": 2, "width": 16, "steps": 60, "batch": 32, "save_every": 20}
FLOW = {
    "data.flip": True, "flow.image_size": 4, "flow.channels": 2, "flow.patch_size": 1, "flow.width": 16, "flow.head_width": 16,
    "flow.blocks": 2, "flow.layers": 2, "align.strategy": "none", "train.steps": 12, "train.batch": 32, "train.warmup": 2,
    "train.log_every": 4, "train.save_every": 4, "train.eval_every": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VAE of digits, by the command line."""
    out = tmp_path_factory.mktemp("vae") / "digits"
    settings = [part for key, value in (SMALL | {"steps": 300, "lr": 4e-3}).items() for part in ("--set", f"{key}={value}")]
    assert main(["vae", "train", "digits", "--out", str(out), "--device", "cpu", "--json", *settings]) == 0
    return out


def latent_config(vae: Path, **settings: object) -> rl.RunConfig:
    space = {"space.kind": "small-vae", "space.weights": str(vae)}
    return rl.preset("digits-reverse").override(PLAIN | space | FLOW | settings)


@pytest.fixture(scope="module")
def trained(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latent") / "run"
    list(rl.train(latent_config(vae), out, device="cpu"))
    return out


def test_it_brings_pictures_back_and_says_how_well(vae, capsys):
    about = json.loads((vae / "config.json").read_text())
    quality = about["quality"]
    assert quality["psnr"] > 17  # a grey picture in place of each, the mean of all, has 12
    assert quality["rfd"] > 0
    assert quality["rfd_encoder"] == "bundled:digits"
    assert quality["n"] == 360
    card = (vae / "card.md").read_text()
    assert f"{quality['psnr']:.2f} dB" in card
    assert f"{quality['rfd']:.4f}" in card
    assert sorted(path.name for path in vae.iterdir() if path.name[0] != ".") == ["card.md", "config.json", "model.safetensors"]


def test_latents_have_unit_variance_over_the_training_split(vae, trained):
    run = rl.load(trained)
    x = run.space.encode(run.data("train").x)
    assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    assert_close(x.std(dim=(0, 2, 3), unbiased=False), torch.ones(2), atol=1e-4, rtol=0)
    test = run.data("test").x
    made = run.space.decode(run.space.encode(test)).clamp(-1, 1)
    stored = json.loads((vae / "config.json").read_text())["quality"]
    assert float(psnr(test, made).mean()) == pytest.approx(stored["psnr"], abs=1e-3)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    config = AutoencoderConfig().override(SMALL)
    whole = list(train_autoencoder(config, tmp_path / "whole"))
    steps = train_autoencoder(config, tmp_path / "parts")
    for report in steps:
        if report.step == 31:
            steps.close()
    assert [path.name for path in (tmp_path / "parts").iterdir() if path.name[0] != "."] == ["train_state.pt"]
    with pytest.raises(LabError, match="--resume goes on with it"):
        list(train_autoencoder(config, tmp_path / "parts"))
    with pytest.raises(LabError, match=r"was trained with lr 0.002, now 0.1"):
        list(train_autoencoder(config.override({"lr": 0.1}), tmp_path / "parts", resume=True))
    rest = list(train_autoencoder(config, tmp_path / "parts", resume=True))
    assert [report.loss for report in rest] == [report.loss for report in whole[31:]]
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    with pytest.raises(LabError, match="holds a trained autoencoder already"):
        list(train_autoencoder(config, tmp_path / "whole"))


def test_what_cannot_be_trained_is_one_line(tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main(["vae", "train", "digits", "--out", str(tmp_path / "no"), "--device", "cpu", *arguments]) == 2
        assert not (tmp_path / "no").exists()
        text = capsys.readouterr().err.strip()
        assert "\n" not in text
        return text

    assert "factor 8 must divide the edge of a picture and leave 2x2 latents" in refused("--set", "factor=8")
    assert "width 20 is not divisible by 8" in refused("--set", "width=20")
    assert "features" in refused("--kind", "feature")
    assert "channels is 65, but the encoder vit_tiny_patch16_224 has 64 features" in refused(
        "--kind", "features", "--set", "channels=65"
    )


def test_a_training_reads_latents_from_the_cache_and_no_picture(vae, trained, monkeypatch, tmp_path):
    run = rl.load(trained)
    assert run.config.space.stored["std"]
    config = latent_config(vae, **{"train.steps": 200, "space.cache": "auto"})
    images = run.images("train")
    assert wants_table(config, len(images)), "200 steps of 32 are more than the 2 views of 1437 images"
    assert not wants_table(latent_config(vae), len(images))
    table = latent_table(config, run.space, images)
    assert table.table.shape == (1437, 2, 2, 4, 4)
    assert table.table.dtype == np.float16
    assert [entry.kind for entry in entries()].count("latents") == 1
    x = run.data("train").x[[3, 1000]]
    mirrored = torch.tensor([False, True])
    expected = run.space.encode(torch.where(mirrored[:, None, None, None], x.flip(3), x))
    assert_close(table([3, 1000], mirrored), expected, atol=2e-3, rtol=1e-3)

    # the step from the table is the step from pictures, rounding apart; and it reads none
    noised = []
    for cached in (False, True):
        inputs = StepInputs(config, run.space, None, torch.device("cpu"))
        inputs.latents = table if cached else None
        assert inputs.needs_pictures is not cached
        batch = images.__getitems__([3, 1000, 7]) if not cached else rl.Batch(torch.empty(3, 0), images.labels[[3, 1000, 7]])
        noised.append(inputs(batch, [3, 1000, 7], 5)[0])
    assert_close(noised[0], noised[1], atol=3e-3, rtol=1e-3)

    monkeypatch.setattr("rrepa_lab.training.session.stream", lambda *_: pytest.fail("a picture was read"))
    reports = list(rl.train(latent_config(vae, **{"space.cache": "on"}), tmp_path / "run", device="cpu"))
    assert reports[-1].step == 12


def test_latents_that_change_are_not_cached(vae):
    for setting in ({"data.shift": 1}, {"space.sample": True}):
        assert not wants_table(latent_config(vae, **setting, **{"train.steps": 10_000}), 100)
        with pytest.raises(LabError, match="space.cache is 'on' but .*there are no latents to keep"):
            latent_config(vae, **setting, **{"space.cache": "on"})


def test_samples_of_the_posterior_are_drawn_where_a_setting_says_so(trained):
    run = rl.load(trained)
    x = run.data("test", 4).x
    mean = run.space.encode(x)
    assert_close(run.space.encode(x, generator(1)), mean, atol=0, rtol=0)
    run.config = run.config.override({"space.sample": True})
    drawn = run.space.encode(x, generator(1))
    assert 0 < float((drawn - mean).std()) < 1
    assert_close(run.space.encode(x, generator(1)), drawn, atol=0, rtol=0)
    assert_close(run.space.encode(x), mean, atol=0, rtol=0)


def test_a_resumed_latent_training_gives_what_one_without_a_stop_gives(vae, trained, tmp_path):
    count = [0]

    def stop() -> bool:
        count[0] += 1
        return count[0] == 5

    list(rl.train(latent_config(vae), tmp_path / "parts", device="cpu", stop=stop))
    list(rl.train(latent_config(vae), tmp_path / "parts", device="cpu", resume=True))
    for name, value in rl.load(tmp_path / "parts").weights().items():
        assert_close(value, rl.load(trained).weights()[name], atol=0, rtol=0)


def test_a_vae_with_other_numbers_is_refused_by_name(vae, trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(vae, moved)
    run = rl.load(trained)
    same = rl.Run(run.flow, run.config.override({"space.weights": str(moved)}), run.classes, run.projectors)
    assert rl.sample(same, 0, 1).images.shape == (1, 1, 8, 8)
    about = json.loads((moved / "config.json").read_text())
    about["statistics"]["std"][0] *= 2
    (moved / "config.json").write_text(json.dumps(about))
    other = rl.Run(run.flow, same.config, run.classes, run.projectors)
    with pytest.raises(
        LabError, match=r"moved is not the one this run was trained with: std is \[.*\] there, and \[.*\] in the run"
    ):
        rl.sample(other, 0, 1)
    with pytest.raises(LabError, match="space.weights was .*digits, now .*moved|std is"):
        list(rl.train(same.config, trained, resume=True, device="cpu"))


def test_a_run_can_be_moved_without_its_vae(vae, trained, tmp_path):
    run = rl.load(trained)
    alone = tmp_path / "alone"
    shutil.copytree(trained, alone)
    about = json.loads((alone / "config.json").read_text())
    about["config"]["space"]["weights"] = str(tmp_path / "gone")
    (alone / "config.json").write_text(json.dumps(about))
    assert_close(rl.sample(rl.load(alone), [3], 1).images, rl.sample(run, [3], 1).images, atol=0, rtol=0)
    shutil.rmtree(alone / "space")
    with pytest.raises(LabError, match="gone holds no small-vae: train one with `rrepa-lab vae train"):
        rl.sample(rl.load(alone), [3], 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}'), "set space.kind=vae"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"none"), "damaged or no safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    ],
)
def test_a_damaged_folder_is_one_line(vae, tmp_path, damage, message):
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    damage(folder)
    with pytest.raises(LabError, match=message):
        list(rl.train(latent_config(folder), tmp_path / "run", device="cpu"))
    assert not (tmp_path / "run").exists()


def test_sizes_that_do_not_fit_are_one_line(vae):
    with pytest.raises(LabError, match=r"flow.image_size is 8 but the space small-vae makes 2x4x4 of pictures of 1x8x8"):
        latent_config(vae, **{"flow.image_size": 8})
    with pytest.raises(LabError, match=r"flow.channels is 1 but .*: set flow.channels=2"):
        latent_config(vae, **{"flow.channels": 1})
    with pytest.raises(LabError, match="takes pictures of 1 channels, and data.channels is 3"):
        latent_config(vae, **{"data.name": "folder", "data.channels": 3})
    with pytest.raises(LabError, match="space.weights is not set: give the folder of"):
        list(rl.train(latent_config(vae).override({"space.weights": None}), "unused", device="cpu"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth colour pictures of two classes, 24 of each."""
    root = tmp_path_factory.mktemp("photographs")
    draw = np.random.default_rng(0)
    for number, name in enumerate(("a", "b")):
        (root / name).mkdir()
        for row in range(24):
            small = draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            small[number::2] //= 3
            Image.fromarray(small).resize((16, 16), Image.Resampling.BICUBIC).save(root / name / f"{row}.png")
    return root


def test_features_of_an_encoder_by_pca_with_a_decoder(tmp_path, capsys):
    out = tmp_path / "features"
    settings = ["--set", "channels=6", "--set", "width=16", "--set", "steps=150", "--set", "noise_std=0.1"]
    command = ["vae", "train", "digits", "--kind", "features", "--out", str(out), "--device", "cpu", "--json", *settings]
    assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["latents"] == "6x4x4"
    assert facts["psnr"] > 15
    assert "arXiv 2605.18267" in (out / "card.md").read_text()
    space = {"space.kind": "features", "space.weights": str(out), "flow.channels": 6, "flow.patch_size": 1}
    config = rl.preset("digits-none").override(PLAIN | FLOW | space)
    run_folder = tmp_path / "run"
    list(rl.train(config, run_folder, device="cpu"))
    run = rl.load(run_folder)
    x = run.space.encode(run.data("train").x)
    assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(6), atol=1e-3, rtol=0)
    assert_close(x.transpose(0, 1).flatten(1).cov(), torch.eye(6), atol=2e-2, rtol=0)  # components are not correlated
    test = run.data("test", 8).x
    assert isinstance(run.space, LatentSpace)
    codec = run.space.codec
    assert isinstance(codec, Features)
    features = codec.teacher(test).flatten(0, 1)
    components = run.space.encode(test).flatten(2).transpose(1, 2).flatten(0, 1)
    back = components * codec.std @ codec.axes + codec.centre
    assert float((back - features).var() / features.var()) < 0.5, "six components hold most of the variance"
    assert rl.sample(run, [0], 1).finish == "denoised, decoded by features"
    about = json.loads((out / "config.json").read_text())
    assert set(run.config.space.stored) == {"pca", "std", "teacher", "weights"}
    about["config"]["encoder"]["args"]["depth"] = 3
    (out / "config.json").write_text(json.dumps(about))
    with pytest.raises(LabError):
        rl.sample(rl.load(run_folder), [0], 1)


def test_pictures_of_a_folder_in_colour_and_at_another_size(photographs, tmp_path):
    settings = {
        "data.name": "folder", "data.path": str(photographs), "data.image_size": 16, "data.channels": 3, "width": 8,
        "channels": 3, "steps": 20, "batch": 8,
    }  # fmt: skip
    list(train_autoencoder(AutoencoderConfig().override(settings), tmp_path / "vae"))
    quality = json.loads((tmp_path / "vae" / "config.json").read_text())["quality"]
    assert quality["rfd"] is None, "a Fréchet distance of 5 pictures would be nothing"
    assert "too few pictures" in (tmp_path / "vae" / "card.md").read_text()
    config = rl.preset("imagefolder-none").override({
        "space.kind": "small-vae", "space.weights": str(tmp_path / "vae"), "data.image_size": 32, "flow.image_size": 8,
        "flow.channels": 3, "flow.patch_size": 1,
    })  # fmt: skip
    assert config.space_words == "small-vae 3x8x8", "a convolutional VAE takes pictures of any size that its factor divides"


@pytest.mark.parametrize("data", ["cifar10", "photos", "digits"])
def test_the_next_training_that_is_proposed_is_one_of_the_same_pictures(data, tmp_path):
    changes = {} if data == "digits" else {"data.path": str(tmp_path / "my photos"), "data.image_size": 64}
    vae = AutoencoderConfig.from_dict(data_settings(data)).override(changes)
    name, settings = _next_training(vae, tmp_path / "vae")
    edge = vae.data.image_size // vae.factor
    shape = {"flow.image_size": edge, "flow.channels": vae.channels, "flow.patch_size": 1}
    config = rl.preset(name).override(settings | shape)
    for key in ("name", "path", "image_size", "channels"):
        assert getattr(config.data, key) == getattr(vae.data, key)
    assert config.space_words == f"small-vae {vae.channels}x{edge}x{edge}"


def test_the_page_says_that_a_run_models_latents(trained, monkeypatch):
    from page import sidebar
    from tabs import reverse_path, samples

    monkeypatch.setenv("RREPA_RUNS", str(trained.parent))
    assert "latents (small-vae 2x4x4) of digits" in sidebar.about_run(trained.name)
    assert "latents" not in sidebar.about_run("digits-none")
    both = {"run": "digits-none", "other": trained.name}
    strips = reverse_path.draw_trajectory(reverse_path.ReversePathView(**both))
    step = "denoised by one step along the score"
    assert f"and digits-none: {step}; {trained.name}: {step}, decoded by small-vae. Pictures of {trained.name} are" in strips
    caption = list(samples.draw(samples.SamplesView(**both, choice="3", count=2)))[-1][-1]
    assert f"digits-none: denoised; {trained.name}: denoised, decoded by small-vae. " in caption
    assert f"on 8x8 digits; {trained.name}: a flow of 0.0 M parameters on latents (small-vae 2x4x4) of 8x8 digits." in caption


def test_likelihoods_of_two_spaces_do_not_share_a_chart(trained, monkeypatch):
    from tabs.training import tab as training

    monkeypatch.setenv("RREPA_RUNS", str(trained.parent))
    view = training.TrainingView(run="digits-none", other=trained.name)
    figure, note, _ = training.draw_curves(view)
    assert {trace.name.split(",")[0] for trace in figure.data} == {"digits-none"}
    words = rl.load(trained).config.space_words
    assert f"`{trained.name}` is left out: it models {words}, `digits-none` pixels; their likelihoods do not compare." in note
    figure, note, _ = training.draw_curves(replace(view, show="accuracy"))
    assert {trace.name.split(",")[0] for trace in figure.data} == {"digits-none", trained.name}, "accuracies are of pictures"
    assert "left out" not in note
    figure, note, _ = training.draw_curves(training.TrainingView(run=trained.name, other=""))
    assert "of noised latents" in note


def test_reconstructions_stand_beside_the_scores_of_samples(vae, trained):
    run = rl.load(trained)
    table = rl.evaluate(run, samples=100, n_noise_samples=1).set_index("metric")
    stored = json.loads((vae / "config.json").read_text())["quality"]
    assert table.loc["reconstruction_psnr", "value"] == pytest.approx(stored["psnr"], abs=1e-3)
    assert table.loc["reconstruction_psnr", "unit"] == "dB"
    assert 0 < table.loc["rFD[digits]", "value"] < table.loc["FD[digits]", "value"]
    assert "reconstruction_psnr" not in rl.evaluate(rl.load("digits-none"), samples=0, limit=20).metric.tolist()
