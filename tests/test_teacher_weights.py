"""A teacher from a file has all its weights from that file, or is an error."""

import json
from argparse import Namespace
from typing import Any

import numpy as np
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


def other(state):
    return {name: value + 1 for name, value in state.items()}


ARGUMENTS = Namespace(lr=0.1, arch="vit_small", loss=np.float64(0.5))  # what trainers put beside the tensors

GOOD = {
    "plain": lambda state: state,
    "backbone": lambda state: prefixed(state, "backbone."),
    "model": lambda state: prefixed(state, "model."),
    "module backbone": lambda state: prefixed(state, "module.backbone."),
    "compiled": lambda state: prefixed(state, "_orig_mod.module."),
    "beside another network": lambda state: prefixed(state, "backbone.") | {"head.weight": torch.ones(3)},
    "state_dict": lambda state: {"state_dict": prefixed(state, "module."), "epoch": 3},
    "average beside the weights": lambda state: {"model": other(state), "model_ema": state, "epoch": 3},
    "average of timm": lambda state: {"state_dict": other(state), "state_dict_ema": prefixed(state, "module.")},
    "average inside": lambda state: {"model": other(state), "ema": {"decay": 0.99, "module": state}},
    "student and teacher": lambda state: {"student": other(state), "teacher": prefixed(state, "backbone."), "args": ARGUMENTS},
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
    "two networks": (lambda state: {"first": state, "second": state}, r"several sets .*first, second"),
    "two averages": (lambda state: {"ema": state, "model_ema": state}, r"several sets .*ema, model_ema"),
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


def test_files_in_parts_are_read_by_their_index(tmp_path, state):
    names = list(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, own in parts.items():
        save_file({name: state[name] for name in own}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: part for part, own in parts.items() for name in own}}))
    mine = load(index).model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in mine.items())
    save_file({name: state[name] for name in names[1:2]}, tmp_path / "b.safetensors")
    with pytest.raises(LabError, match="its files lack"):
        load(index)
    index.write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
    with pytest.raises(LabError, match="does not lie beside it"):
        load(index)


def test_names_of_other_programs_are_taken_where_timm_converts_them(tmp_path):
    """The image tower of a CLIP model, with its text tower beside it, under the names of open_clip."""
    import timm

    args: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_clip_quickgelu_224", img_size=32, num_classes=16, **args)
    own = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    names = {
        "cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1", "norm_pre": "ln_pre",
        "norm.": "ln_post.", "blocks.": "transformer.resblocks.", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "norm1": "ln_1", "norm2": "ln_2",
    }  # fmt: skip
    theirs = {"visual.proj": own["head.weight"].T.contiguous(), "text_projection": torch.zeros(2, 2)}
    for name, value in own.items():
        if name.startswith("head."):
            continue
        renamed = name
        for mine, other_name in names.items():
            renamed = renamed.replace(mine, other_name)
        theirs[f"visual.{renamed}"] = value.flatten() if name == "cls_token" else value[0] if name == "pos_embed" else value
    torch.save(theirs, tmp_path / "clip.pth")
    config = EncoderConfig(
        model="vit_base_patch16_clip_quickgelu_224", weights=str(tmp_path / "clip.pth"), image_size=32, args=args
    )
    mine = Encoder(config).model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in mine.items())


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
