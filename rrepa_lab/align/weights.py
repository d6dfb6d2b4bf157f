"""Weights of encoders from local files: read as tensors alone, found under the prefixes that trainers leave, and complete."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rrepa_lab.data.loaders import seeded
from rrepa_lab.errors import LabError
from rrepa_lab.readers import check_file, read_json

PREFIXES = (
    "module", "_orig_mod", "model", "backbone", "encoder", "student", "teacher", "ema", "ema_model", "model_ema", "_model",
    "net", "network", "online_encoder", "momentum_encoder", "encoder_q",
)  # fmt: skip
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "model_ema_state_dict", "ema_model", "teacher")
DEEPEST = 3  # prefixes in a row


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch checkpoint, by name; nothing in the file is executed.

    A checkpoint may hold them inside of a dictionary ("state_dict", "model", ...). Where it holds weights and their average
    ("model_ema", "ema", "state_dict_ema", ...), or a student and its teacher, the average or the teacher is taken, as for an
    evaluation. An index of several files (model.safetensors.index.json) stands for all of them.

    Raises: LabError for a file that cannot be read, holds no tensors, or holds several sets of them otherwise.
    """
    if path.name.endswith(".index.json"):
        return _of_parts(path)
    check_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_harmless()):
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise LabError(f"it cannot be read as weights ({type(error).__name__}: {reason})") from None
    if not isinstance(values, Mapping):
        raise LabError(f"it holds {type(values).__name__}, not tensors by name")
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if len(tensors) > 1 or (tensors and not any(map(_holder, values.values()))):
        return tensors
    sets = {key: found for key, value in values.items() if (found := _holder(value)) is not None}
    averages = [key for key in AVERAGES if key in sets]
    if len(sets) != 1 and len(averages) != 1:
        keys = ", ".join(map(str, values)) or "nothing"
        why = "several sets of tensors" if sets else "no tensors"
        raise LabError(f"it holds {why} (top-level keys: {keys}): save the one that is wanted as a file of its own")
    return dict(sets[averages[0]] if averages else next(iter(sets.values())))


def _harmless() -> list[Any]:
    """Classes beside tensors that checkpoints of trainers hold, and that do nothing when they are made."""
    return [Namespace, np.dtype, np.ndarray, *_numpy_parts()]


def _numpy_parts() -> list[Any]:
    """What numpy's pickled numbers and arrays are made of."""
    array, number = np.zeros(1).__reduce__()[0], np.float64(1).__reduce__()[0]
    return [array, number, *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool"))]


def _holder(value: Any) -> Mapping[str, Tensor] | None:
    """A set of tensors, or the only one inside of a mapping."""
    if is_state_dict(value):
        return dict(value)
    inside = [part for part in value.values() if is_state_dict(part)] if isinstance(value, Mapping) else []
    return dict(inside[0]) if len(inside) == 1 else None


def _of_parts(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names; they lie beside it."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise LabError("it has no weight_map from tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise LabError(f"its file {name!r} does not lie beside it")
        tensors |= read_tensors(index.parent / name)
    lacking = [name for name in names if name not in tensors]
    if lacking:
        raise LabError(f"its files lack {len(lacking)} of the tensors that it names: {lacking[0]}")
    return tensors


def is_state_dict(value: Any) -> bool:
    """Whether a value holds tensors by name, and nothing else."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(part, Tensor) for part in value.values())


def strip_prefix(tensors: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """The tensors under the prefix (such as "module.backbone.") that has most of the expected names, without it."""
    prefixes = {""}
    for name in tensors:
        parts = name.split(".")[:DEEPEST]
        for count in range(1, len(parts) + 1):
            if all(part in PREFIXES for part in parts[:count]):
                prefixes.add(".".join(parts[:count]) + ".")
    under = {p: {name[len(p) :]: value for name, value in tensors.items() if name.startswith(p)} for p in prefixes}
    return under[max(sorted(prefixes, key=len), key=lambda prefix: len(under[prefix].keys() & expected))]


def filled(create: Callable[[], nn.Module], names: set[str]) -> nn.Module:
    """The model that `create` makes with the weights of a file, every tensor of which came from the file.

    The model is made twice, from two seeds: what differs between the two is still random. A tensor of one value
    throughout may be a start that is not random; then the file must have its name, one of `names`.

    Raises: LabError that names the tensors which the file did not fill.
    """
    with seeded(0):
        model = create()
    with seeded(1):
        other = create().state_dict()

    def is_start(name: str, value: Tensor) -> bool:
        constant = value.numel() > 1 and bool((value == value.flatten()[0]).all())
        return not torch.equal(value, other[name]) or (constant and name not in names)

    missing = [name for name, value in model.state_dict().items() if is_start(name, value)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise LabError(f"it lacks {len(missing)} of the model's {len(other)} tensors: {', '.join(missing[:3])}{more}")
    infinite = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if infinite:
        raise LabError(f"its {infinite[0]} holds numbers that are not finite")
    return model
