"""A teacher from a file has all its weights from that file, or is an error."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rrepa_lab.align.encoder import Encoder
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.errors import LabError

ARGS: dict[str, Any] = {"depth": 1, "embed_dim": 16, "num_heads": 1}


@pytest.fixture(scope="module")
def state():
    import timm

    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, **ARGS)
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def load(path):
    return Encoder(EncoderConfig(model="vit_tiny_patch16_224", weights=str(path), image_size=32, args=ARGS))


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


GOOD = {
    "plain": lambda state: state,
    "backbone": lambda state: prefixed(state, "backbone."),
    "model": lambda state: prefixed(state, "model."),
    "module backbone": lambda state: prefixed(state, "module.backbone."),
    "compiled": lambda state: prefixed(state, "_orig_mod.module."),
    "beside another network": lambda state: prefixed(state, "backbone.") | {"head.weight": torch.ones(3)},
    "state_dict": lambda state: {"state_dict": prefixed(state, "module."), "epoch": 3},
    "with optimizer": lambda state: {"model": state, "optimizer": {"state": {}, "lr": 0.1}, "step": 7},
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("suffix", ["pth", "bin", "safetensors"])
def test_weights_are_found_under_the_prefixes_of_trainers(tmp_path, state, kind, suffix):
    values = GOOD[kind](state)
    path = tmp_path / f"teacher.{suffix}"
    if suffix == "safetensors":
        if not all(isinstance(value, torch.Tensor) for value in values.values()):
            pytest.skip("this format holds tensors alone")
        save_file(values, path)
    else:
        torch.save(values, path)
    mine = load(path).model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in mine.items())


BAD = {
    "another prefix": (lambda state: prefixed(state, "trunk."), r"lacks \d+ of the model's \d+ tensors: "),
    "cut short": (lambda state: dict(list(state.items())[:5]), r"lacks \d+ of"),
    "without a norm": (lambda state: {k: v for k, v in state.items() if "norm.weight" not in k}, r"lacks \d+ of .*norm.weight"),
    "without a bias": (
        lambda state: {k: v for k, v in state.items() if k != "blocks.0.mlp.fc1.bias"},
        r"blocks.0.mlp.fc1.bias",
    ),
    "another model": (lambda state: {"conv.weight": torch.zeros(3)}, r"lacks \d+ of"),
    "another width": (lambda state: {k: torch.cat([v, v]) for k, v in state.items()}, "does not hold weights of"),
    "student and teacher": (lambda state: {"student": state, "teacher": state}, r"several sets .*student, teacher"),
    "model and average": (lambda state: {"model": state, "model_ema": state}, r"several sets .*model, model_ema"),
    "nothing": (lambda state: {}, "no tensors"),
    "settings": (lambda state: {"lr": 0.1, "name": "x"}, r"no tensors .*lr, name"),
    "a list": (lambda state: [1, 2], "holds list"),
    "not finite": (lambda state: state | {"cls_token": state["cls_token"] * float("nan")}, "not finite|lacks"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_does_not_fill_the_model_is_an_error(tmp_path, state, kind):
    make, message = BAD[kind]
    torch.save(make(state), tmp_path / "teacher.pth")
    with pytest.raises(LabError, match=message) as caught:
        load(tmp_path / "teacher.pth")
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_one_line(tmp_path):
    for name, data in (("a.pth", b"PK broken"), ("b.safetensors", b"{}"), ("c.bin", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(LabError, match="cannot be read as weights"):
            load(tmp_path / name)


def test_the_bundled_encoder_is_complete():
    import rrepa_lab as rl

    encoder = rl.load("digits-reverse").encoder()
    assert isinstance(encoder, Encoder)
    assert encoder.model.pretrained_cfg["state_dict"] is None, "the weights are not kept twice"
    assert encoder(torch.zeros(1, 1, 8, 8)).shape == (1, 16, 64)
