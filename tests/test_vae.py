"""Flows of the latents of a VAE of diffusers, which is made here with random weights."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PLAIN
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.data.loaders import generator, seeded
from rrepa_lab.errors import LabError
from rrepa_lab.space.config import SpaceConfig
from rrepa_lab.space.kinds.vae import DiffusersRae, load_vae

diffusers = pytest.importorskip("diffusers")

FLOW = {
    "space.kind": "vae", "flow.image_size": 4, "flow.channels": 3, "flow.patch_size": 1, "flow.width": 16,
    "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 2, "flow.noise_std": 0.2, "train.steps": 6, "train.batch": 32,
    "train.warmup": 2, "train.save_every": 2, "train.log_every": 2,
}  # fmt: skip


def save_vae(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A VAE of grey pictures with factor 2 and 3 channels, whose scaling factor gives about unit variance."""
    sizes: dict[str, Any] = {
        "in_channels": 1, "out_channels": 1, "latent_channels": 3, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 8,
        "scaling_factor": 2.0, "shift_factor": 0.1,
    }  # fmt: skip
    with seeded(seed):
        diffusers.AutoencoderKL(**sizes | settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("diffusers") / "kl")


def config_of(vae: Path | str, **settings: Any) -> rl.RunConfig:
    return rl.preset("digits-none").override(PLAIN | FLOW | {"space.weights": str(vae)} | settings)


@pytest.fixture(scope="module")
def trained(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vae") / "run"
    list(rl.train(config_of(vae), out, device="cpu"))
    return out


def test_latents_are_scaled_by_the_configuration_of_the_vae(vae, trained):
    run = rl.load(trained)
    own = diffusers.AutoencoderKL.from_pretrained(vae).eval()
    x = run.data("test", 5).x
    with torch.no_grad():
        posterior = own.encode(x).latent_dist
        assert_close(run.space.encode(x), (posterior.mean - 0.1) * 2.0, atol=1e-5, rtol=0)
        assert_close(run.space.decode((posterior.mean - 0.1) * 2.0), own.decode(posterior.mean).sample, atol=1e-5, rtol=1e-5)
        assert run.space.encode(x, generator(0)).equal(run.space.encode(x)), "the mean, unless a setting says otherwise"
        run.config = run.config.override({"space.sample": True})
        drawn = run.space.encode(x, generator(0)) / 2.0 + 0.1
        scores = (drawn - posterior.mean) / posterior.std
    assert 0.8 < float(scores.std()) < 1.2
    assert set(run.config.space.stored) == {"scaling_factor", "shift_factor", "weights"}


def test_instruments_take_pictures_and_a_training_resumes(vae, trained, tmp_path):
    run = rl.load(trained)
    x = run.data("test", 20).x
    made = rl.sample(run, [0, 1], 3)
    assert made.images.shape == (2, 1, 8, 8)
    assert made.finish == "denoised, decoded by vae"
    assert rl.classify(run, x).scores.shape == (20, 10)
    assert rl.trace(run, x[:2], taps="block.1.layer.1").images["block.1.in"].shape == (2, 1, 8, 8)
    row = rl.evaluate(run, samples=0, n_noise_samples=1, limit=20).set_index("metric").loc["nats_per_dim"]
    assert row["space"].startswith("vae 3x4x4 [")
    assert "scaled latents of kl" in row["protocol"]
    assert not (trained / "space").exists(), "weights of others are not copied"
    count = [0]

    def stop() -> bool:
        count[0] += 1
        return count[0] == 3

    list(rl.train(config_of(vae), tmp_path / "parts", device="cpu", stop=stop))
    list(rl.train(config_of(vae), tmp_path / "parts", device="cpu", resume=True))
    for name, value in rl.load(tmp_path / "parts").weights().items():
        assert value.equal(run.weights()[name])


@pytest.mark.parametrize("change", ["scaling_factor", "weights"])
def test_another_vae_is_refused_with_both_values(vae, trained, tmp_path, change):
    if change == "weights":
        other = save_vae(tmp_path / "kl", seed=1)
    else:
        other = tmp_path / "kl"
        shutil.copytree(vae, other)
        about = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(about | {"scaling_factor": 0.13025}))
    about = json.loads((trained / "config.json").read_text())
    about["config"]["space"]["weights"] = str(other)
    moved = tmp_path / "run"
    shutil.copytree(trained, moved)
    (moved / "config.json").write_text(json.dumps(about))
    values = "0.13025 there, and 2.0 in the run" if change == "scaling_factor" else "[0-9a-f]{16} there, and [0-9a-f]{16} in"
    with pytest.raises(LabError, match=f"is not the one this run was trained with: {change} is {values}"):
        rl.sample(rl.load(moved), [0], 1)


def test_what_does_not_fit_is_one_line(vae, tmp_path):
    with pytest.raises(LabError, match=r"flow.image_size is 8 but the space vae makes 3x4x4 .*: set flow.image_size=4"):
        config_of(vae, **{"flow.image_size": 8})
    with pytest.raises(LabError, match=r"flow.channels is 4 but the space vae makes 3x4x4 .*: set flow.channels=3"):
        config_of(vae, **{"flow.channels": 4})
    colour = save_vae(tmp_path / "colour", in_channels=3, out_channels=3)
    with pytest.raises(LabError, match="colour takes pictures of 3 channels, and data.channels is 1"):
        config_of(colour)
    deep = save_vae(
        tmp_path / "deep", block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    with pytest.raises(LabError, match=r"one latent of 8x8 pixels, and pictures are 8x8: set data.image_size to"):
        config_of(deep)
    with pytest.raises(LabError, match="is no folder, and no Hub id"):
        list(rl.train(config_of(tmp_path / "nowhere"), tmp_path / "run", device="cpu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabError, match="empty holds no config.json of an AutoencoderKL"):
        config_of(tmp_path / "empty")
    (vae_of := tmp_path / "other").mkdir()
    (vae_of / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(LabError, match="is a VQModel, and the space vae reads AutoencoderKL"):
        config_of(vae_of)
    with pytest.raises(LabError, match="space.weights is not set: give a Hub id"):
        list(rl.train(config_of(vae).override({"space.weights": None}), tmp_path / "run", device="cpu"))
    assert not (tmp_path / "run").exists()


def test_a_damaged_vae_is_one_line(vae, tmp_path):
    shutil.copytree(vae, tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"none")
    with pytest.raises(LabError, match="vae cannot be read as an AutoencoderKL: ") as error:
        list(rl.train(config_of(tmp_path / "vae"), tmp_path / "run", device="cpu"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_without_the_hub_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = config_of("stabilityai/sd-vae-ft-ema", **{"flow.image_size": 4})  # known only once it is there
    with pytest.raises(LabError, match="not on this machine, and the Hub cannot be reached from here: `hf download"):
        list(rl.train(config, tmp_path / "run", device="cpu"))


def test_without_diffusers_the_remedy_is_named(vae, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(LabError, match=r"the space vae needs diffusers: pip install 'rrepa-lab\[vae\]'"):
        list(rl.train(config_of(vae), tmp_path / "run", device="cpu"))


def test_the_latents_of_the_imagenet_preset_have_its_shape(vae):
    """The shape of a VAE like sd-vae-ft-ema follows from its config.json, so no weights are needed to check a configuration."""
    sd = vae.parent / "sd"
    sd.mkdir(exist_ok=True)
    about = {
        "_class_name": "AutoencoderKL", "in_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512],
    }  # fmt: skip
    (sd / "config.json").write_text(json.dumps(about))
    config = rl.preset("imagefolder-none").override({
        "space.kind": "vae", "space.weights": str(sd), "data.image_size": 256, "flow.image_size": 32, "flow.channels": 4,
    })  # fmt: skip
    assert config.space_words == "vae 4x32x32"
    with pytest.raises(LabError, match="flow.image_size is 64 but the space vae makes 4x32x32 of pictures of 3x256x256"):
        config.override({"flow.image_size": 64})


class TinyRae(torch.nn.Module):
    """What the adapter uses of diffusers' AutoencoderRAE: pictures in [0, 1] to and from latents."""

    config = type("Config", (), {"scaling_factor": 1.0})()

    def encode(self, x: torch.Tensor) -> Any:
        return type("Out", (), {"latent": torch.nn.functional.pixel_unshuffle(x, 2)})()

    def decode(self, z: torch.Tensor) -> Any:
        return type("Out", (), {"sample": torch.nn.functional.pixel_shuffle(z, 2)})()


def test_the_adapter_of_a_representation_autoencoder_keeps_the_scale_of_pictures():
    codec = DiffusersRae(TinyRae(), (1, 8, 8))
    assert codec.shape == (4, 4, 4)
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    assert_close(codec.decode(codec.encode(x)), x)
    assert float(codec.encode(x).min()) >= 0


def test_a_representation_autoencoder_of_diffusers_is_read(tmp_path):
    folder = tmp_path / "rae"
    sizes = {
        "encoder_type": "mae", "encoder_hidden_size": 64, "encoder_patch_size": 4, "encoder_num_hidden_layers": 1,
        "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32, "patch_size": 4, "encoder_input_size": 16, "image_size": 16,
    }  # fmt: skip
    if importlib.util.find_spec("transformers") is None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderRAE"}))
        (folder / "model.safetensors").touch()
        with pytest.raises(LabError, match="whose encoder needs transformers: pip install transformers"):
            load_vae(SpaceConfig(kind="vae", weights=str(folder)), (3, 16, 16))
        return
    diffusers.AutoencoderRAE(**sizes).save_pretrained(folder)
    codec = load_vae(SpaceConfig(kind="vae", weights=str(folder)), (3, 16, 16))
    assert codec.shape == (64, 4, 4)
    assert codec.decode(codec.encode(torch.zeros(2, 3, 16, 16))).shape == (2, 3, 16, 16)


SD: dict[str, Any] = {  # the sizes of stabilityai/sd-vae-ft-ema
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 256, "scaling_factor": 0.18215,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


@pytest.mark.slow
def test_the_real_shape_goes_from_pictures_of_256_to_samples(tmp_path):
    """One training step, a sample and its decoding with a VAE of the size of sd-vae-ft-ema; the flow is a small one."""
    from PIL import Image

    vae = save_vae(tmp_path / "sd", **SD)
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for row in range(4):
            draw = torch.randint(0, 255, (8, 8, 3), generator=torch.Generator().manual_seed(row), dtype=torch.uint8)
            Image.fromarray(draw.numpy()).resize((256, 256)).save(tmp_path / "pictures" / name / f"{row}.png")
    config = rl.preset("imagefolder-none").override({
        "space.kind": "vae", "space.weights": str(vae), "data.path": str(tmp_path / "pictures"), "data.image_size": 256,
        "data.holdout": 0.25, "flow.image_size": 32, "flow.channels": 4, "flow.patch_size": 2, "flow.noise_std": 0.2,
        "flow.positions": "rotary", "flow.mlp": "swiglu", "flow.width": 64, "flow.blocks": 2, "flow.layers": 1,
        "train.steps": 1, "train.batch": 2, "train.num_workers": 0,
    })  # fmt: skip
    (report,) = rl.train(config, tmp_path / "run", device="cpu")
    assert report.nats_per_dim == report.nats_per_dim
    run = rl.load(tmp_path / "run")
    assert run.config.space_words.startswith("vae 4x32x32 [")
    assert rl.sample(run, [0], 1).images.shape == (1, 3, 256, 256)
