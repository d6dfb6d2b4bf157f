"""Published checkpoints: a state dict of the public TARFlow code becomes a run.

The public code is apple/ml-tarflow, of "Normalizing Flows are Capable Generative Models", arXiv 2412.06329. Its files are
called `<set>_model_<patch>_<width>_<blocks>_<layers>_<noise>.pth` and hold the flow's tensors alone: no settings, no class
names and no averaged weights. Files of other suffixes, with an epoch behind the name, and with the tensors inside of a
training checkpoint ("model", "state_dict", an average such as "model_ema") are read too. Sizes are taken from the tensors; a
file name or an option that says otherwise is refused.
Symbols as in `flow.tarflow.model`.
"""

import contextlib
import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.align.projector import Projectors
from rrepa_lab.align.weights import is_state_dict
from rrepa_lab.data.splits import class_names
from rrepa_lab.errors import LabError
from rrepa_lab.files import sha256
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.runs.card import write_card
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.describe import describe_config
from rrepa_lab.runs.init import imagenet_classes
from rrepa_lab.runs.run import Run

_FILE_NAME = re.compile(
    r"(?P<set>.+)_model_(?P<patch_size>\d+)_(?P<width>\d+)_(?P<blocks>\d+)_(?P<layers>\d+)_(?P<noise>uniform|\d+(\.\d+)?)"
    r"([_-](epoch|step|iter)[_-]?\d+|[_-](ema|last|latest|best|final))*"
)
_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
_AVERAGES = ("model_ema", "ema_model", "ema", "state_dict_ema")  # of a training checkpoint: taken before the weights themselves
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module", "net", "flow")
_PREFIX = re.compile(r"^((module|_orig_mod|model|net|flow)\.)+")
_SIZES = ("patch_size", "width", "blocks", "layers")  # of the file name


def import_tarflow(
    path: Path | str,
    out: Path | str,
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    channels: int | None = None,
    head_width: int = 64,
    noise: float | str | None = None,
    name: str | None = None,
    data: str | None = None,
) -> Run:
    """Write a run directory with the weights (float32) of a checkpoint of the public code, and give the run back.

    Args:
        path: the file. It is read as tensors alone: nothing in it is executed.
        out: run directory to write, new or empty.
        image_size, patch_size, channels: needed only where the tensors and the file name leave them open, else checked.
        head_width: numbers in an attention head, 64 in all public models; no tensor tells it.
        noise: the training noise, sigma for pixels in [-1, 1] or "uniform"; needed if the file name does not tell.
        name: of the run; the file's name without its suffix by default.
        data: root of the image folder the run reads its pictures from.

    Raises: LabError for a file that is missing, damaged or no TARFlow, for what contradicts its tensors, for an `out`
        that holds something.

    Example:
        >>> rl.import_tarflow("afhq_model_8_768_8_8_0.07.pth", "runs/afhq")  # doctest: +SKIP
    """
    path, out = Path(path), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise LabError(f"{out} exists and is not an empty folder: choose another")
    if data is not None and not Path(data).expanduser().is_dir():
        raise LabError(f"no image folder at {data}: expected <split>/<class>/<picture> below it")
    stem = path.stem if path.suffix in _SUFFIXES else path.name
    named = _FILE_NAME.fullmatch(stem)
    state, inside = _read(path)

    stated: list[tuple[str, str, int]] = [("the file name", size, int(named[size])) for size in _SIZES] if named else []
    options = {"image_size": image_size, "patch_size": patch_size, "channels": channels}
    stated += [("the option", size, value) for size, value in options.items() if value is not None]
    sizes = _decide(path, _possible(path, state), stated)
    flow = {**sizes, "head_width": head_width, **_noise(path, named["noise"] if named else None, noise)}
    place = None if data is None else str(Path(data).expanduser().absolute())
    images = {"name": "folder", "path": place, "flip": True} | {key: sizes[key] for key in ("image_size", "channels")}
    try:
        config = RunConfig.from_dict(
            {"name": stem if name is None else name, "data": images, "flow": flow, "origin": _origin(path, inside)}
        )
    except LabError as error:
        more = "; choose one with --name" if str(error).startswith("name:") else ""
        raise LabError(f"{path}: {error}{more}") from None

    with torch.device("meta"):
        model, projectors = TarFlow(config.flow), Projectors([], config.flow.width, 1, 1)
    model.load_state_dict(_weights(path, state, model), assign=True)
    model.eval().requires_grad_(False)
    classes = _class_names(config.flow.classes, named["set"] if named else "")
    if data is not None:
        with contextlib.suppress(LabError):  # the pictures may come later
            folders = class_names(config.data)
            # that code, too, numbers the folders in alphabetical order, and labels go by name
            classes = folders if len(folders) == len(classes) else classes
    run = Run(model, config, classes, projectors, directory=out)
    run.save(out)
    write_card(run, pd.DataFrame())
    return run


def facts(run: Run) -> dict[str, Any]:
    """What an imported run is: sizes, parameters, noise and classes, but nothing of its training, which is not known."""
    known = describe_config(run.config)
    kept = {key: known[key] for key in ("name", "image", "tokens", "token_size", "flow", "parameters", "noise")}
    return kept | {"classes": run.config.flow.classes, "volume_preserving": run.config.flow.volume_preserving}


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file by name, without what wrappers of a module put before the names; and under which key they lay.

    A training checkpoint holds them beside other things; an average of the weights comes first, since it is what is sampled.
    """
    if not path.is_file():
        raise LabError(f"there is no file {path}")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        kind = f"a pickled {found[1]}" if found else "something other than tensors"
        raise LabError(f"{path} holds {kind}, which is not loaded: a state dict of tensors is needed") from None
    except Exception as error:  # torch has no exception of its own for a damaged file
        raise LabError(
            f"{path} cannot be read as a PyTorch checkpoint ({type(error).__name__}): damaged, or of another kind"
        ) from None
    if not isinstance(state, Mapping) or not state:
        raise LabError(f"{path} is not a state dict: it holds {type(state).__name__}, not tensors by name")
    inside = next((key for key in (*_AVERAGES, *_WEIGHTS) if is_state_dict(state.get(key))), "")
    state = state[inside] if inside else state
    other = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other:
        raise LabError(f"{path} is not a state dict: {other[0]!r} is {type(state[other[0]]).__name__}, not a named tensor")
    tensors = {
        ".".join(part for part in _PREFIX.sub("", key).split(".") if part != "_orig_mod"): value for key, value in state.items()
    }
    if len(tensors) < len(state):
        raise LabError(f"{path} holds some tensors twice, with and without a prefix")
    return tensors, inside


def _possible(path: Path, state: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The sizes that the tensors allow, as fields of FlowConfig: they are sure of all but how P splits into a patch."""

    def shape(key: str) -> tuple[int, int]:
        if key not in state:
            raise LabError(f"{path} is no TARFlow checkpoint: it has no {key}, but for example {next(iter(state))}")
        if state[key].ndim != 2 or not state[key].numel():
            raise LabError(f"{path}: {key} is {tuple(state[key].shape)}, a matrix is wanted")
        rows, columns = state[key].shape
        return rows, columns

    tokens, width = shape("blocks.0.pos_embed")
    token_size, outputs = shape("blocks.0.proj_in.weight")[1], shape("blocks.0.proj_out.weight")[0]
    hidden = shape("blocks.0.attn_blocks.0.mlp.main.0.weight")[0]
    side = isqrt(tokens)
    if side**2 != tokens:
        raise LabError(f"{path}: blocks.0.pos_embed has {tokens} tokens, which is no square image")
    if outputs not in (token_size, 2 * token_size):
        raise LabError(
            f"{path}: blocks.0.proj_out gives {outputs} numbers for a token of {token_size}; "
            f"{2 * token_size} are wanted, or {token_size} of a volume-preserving flow"
        )
    classes = state.get("blocks.0.class_embed")
    sure = {
        "width": width,
        "blocks": _count(state, r"blocks\.(\d+)\."),
        "layers": _depths(state),
        "mlp_ratio": hidden / width,
        "classes": 0 if classes is None or not classes.ndim else len(classes),
        "volume_preserving": outputs == token_size,
    }
    patches = [(channels, isqrt(token_size // channels)) for channels in (1, 3, 4)]
    fitting = [(channels, patch) for channels, patch in patches if channels * patch**2 == token_size]
    if not fitting:
        raise LabError(f"{path}: a token of {token_size} numbers is no square patch of 1, 3 or 4 channels")
    return [{**sure, "channels": c, "patch_size": patch, "image_size": side * patch} for c, patch in fitting]


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return len({found[1] for found in map(re.compile(pattern).match, state) if found})


def _depths(state: dict[str, Tensor]) -> int | list[int]:
    """Layers of every block where all have the same number, else of each block."""
    blocks = _count(state, r"blocks\.(\d+)\.")
    depths = [_count(state, rf"blocks\.{number}\.attn_blocks\.(\d+)\.") for number in range(blocks)]
    # a block without any layer misses tensors, which `_weights` names
    return depths[0] if set(depths) <= {depths[0], 0} else depths


def _decide(path: Path, possible: list[dict[str, Any]], stated: list[tuple[str, str, int]]) -> dict[str, Any]:
    """The one of the possible sizes that agrees with all that is stated: (source, field, value)."""
    for source, field, value in stated:
        left = [sizes for sizes in possible if sizes[field] == value]
        if not left:
            known = " or ".join(str(sizes[field]) for sizes in possible)
            raise LabError(f"{path}: {source} says {field.replace('_', ' ')} {value}, the tensors {known}")
        possible = left
    if len(possible) > 1:
        known = " or ".join("{channels} x {patch_size} x {patch_size}".format(**sizes) for sizes in possible)
        raise LabError(f"{path}: a token may be {known} (channels and patch): give --patch-size or --channels")
    if possible[0]["channels"] == 4:
        raise LabError(f"{path} is a flow of 4 channels, of latents and not of pictures: only 1 or 3 can be read")
    return possible[0]


def _noise(path: Path, named: str | None, given: float | str | None) -> dict[str, Any]:
    """The fields of FlowConfig that tell the training noise."""
    if named is None and given is None:
        raise LabError(f"{path}: the file name does not tell the training noise: give --noise, such as 0.05 or uniform")
    fields = [_noise_fields(noise) for noise in (named, given) if noise is not None]
    if fields[0] != fields[-1]:
        raise LabError(f"{path}: the file name says noise {named}, the option {given}: mend or rename")
    return fields[0]


def _noise_fields(noise: float | str) -> dict[str, Any]:
    if noise == "uniform":
        return {"noise": "uniform"}
    try:
        return {"noise": "gaussian", "noise_std": float(noise)}
    except ValueError:
        raise LabError(f"noise must be a number, such as 0.05, or uniform, not {noise!r}") from None


def _weights(path: Path, state: dict[str, Tensor], model: TarFlow) -> dict[str, Tensor]:
    """The tensors under the names that `model` has for them, in float32; LabError unless all are there and no other."""
    wanted = {_public_name(name): value.shape for name, value in model.state_dict().items()}
    wanted = {
        key: torch.Size((shape[0], 1, shape[1])) if key.endswith(".class_embed") else shape for key, shape in wanted.items()
    }
    wanted["var"] = torch.Size((model.config.tokens, model.config.token_size))
    for key, shape in wanted.items():
        if key not in state:
            raise LabError(f"{path} has no {key}")
        if state[key].shape != shape:
            raise LabError(f"{path}: {key} is {tuple(state[key].shape)}, the other tensors want {tuple(shape)}")
        if not state[key].isfinite().all():
            raise LabError(f"{path}: {key} holds numbers that are not finite")
    extra = [key for key in state if key not in wanted and not key.endswith(".attn_mask")]
    if extra:
        raise LabError(f"{path} holds {extra[0]}, which a TARFlow of its size does not have")
    if model.prior_var is None and not bool((state["var"] == 1).all()):
        raise LabError(f"{path}: var, the variance of the noise, is not 1, as it must be in a flow that scales")
    if not bool((state["var"] > 0).all()):
        raise LabError(f"{path}: var, the variance of the noise, is not above 0 everywhere")
    return {
        name: state[_public_name(name)].float().reshape(value.shape).contiguous() for name, value in model.state_dict().items()
    }


def _public_name(name: str) -> str:
    """What the public code calls a tensor of TarFlow."""
    name = "var" if name == "prior_var" else name.replace(".transformer.layers.", ".attn_blocks.")
    return name.replace(".mlp.up.", ".mlp.main.0.").replace(".mlp.down.", ".mlp.main.2.")


def _origin(path: Path, inside: str) -> str:
    """Which file it was, and which weights of it; the public files hold them as the last step left them."""
    of = "an average (EMA) of the weights" if inside in _AVERAGES else "no average (EMA) of the weights"
    key = f", its {inside!r}" if inside else ""
    return f"{path.name}{key}, of the public TARFlow code (apple/ml-tarflow), SHA-256 {sha256(path)}; {of}"


def _class_names(classes: int, data: str) -> list[str]:
    if classes != 1000 or not data.startswith("imagenet"):
        return [str(number) for number in range(classes)]
    return list(imagenet_classes().values())
