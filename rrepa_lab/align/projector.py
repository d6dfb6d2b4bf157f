"""From the flow's hidden states to the teachers' feature spaces."""

from collections.abc import Mapping, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

PREFIX = "projectors."  # of their tensors in model.safetensors
LAST = ".4.bias"  # ends the name of the last bias of a projector


class Projector(nn.Sequential):
    """Three linear layers with SiLU between, (B, T, D) -> (B, T, E); one for each aligned tap (arXiv 2511.22345)."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim))


class TeacherProjectors(nn.ModuleList):
    """One projector for each of several teachers, (B, T, D) -> (B, T, E1 + E2 + ...)."""

    def forward(self, features: Tensor) -> Tensor:
        """Their outputs side by side, in the order of the teachers."""
        return torch.cat([projector(features) for projector in self], dim=-1)


class Projectors(nn.ModuleDict):
    """Projectors by tap name ("block.4.layer.2"), one for each teacher.

    Args:
        width: D, of the flow.
        hidden: width of the hidden layers.
        dims: E of the teacher, or of each of several.
    """

    def __init__(self, taps: Sequence[str], width: int, hidden: int, dims: int | Sequence[int]) -> None:
        self.dims = (dims,) if isinstance(dims, int) else tuple(dims)

        def of_tap() -> nn.Module:
            each = [Projector(width, hidden, dim) for dim in self.dims]
            return each[0] if len(each) == 1 else TeacherProjectors(each)

        # a module's name may not contain a dot
        super().__init__({tap.replace(".", "_"): of_tap() for tap in taps})

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], dims: Sequence[int]) -> Self:
        """Of projectors that there are, by tap name."""
        found = cls([], 1, 1, dims)
        found.update({tap.replace(".", "_"): module for tap, module in modules.items()})
        return found

    def project(self, tap: str, features: Tensor) -> Tensor:
        """Features (B, T, D) of a tap -> (B, T, E), of several teachers side by side."""
        return self[tap.replace(".", "_")](features)

    def of_teacher(self, number: int) -> "Projectors":
        """Those of one teacher, from 0; they share their weights with these."""
        if len(self.dims) == 1:
            return self
        each = {tap: cast(TeacherProjectors, self[tap.replace(".", "_")])[number] for tap in self.taps}
        return Projectors.of(each, self.dims[number : number + 1])

    @property
    def taps(self) -> list[str]:
        """The taps that have a projector."""
        return [name.replace("_", ".") for name in self]


def stored_dims(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """E of each teacher, from the shapes of a run's tensors by name; (1,) without projectors.

    Example:
        >>> stored_dims({"projectors.block_3_layer_2.0.4.bias": (320,), "projectors.block_3_layer_2.1.4.bias": (384,)})
        (320, 384)
    """
    found: dict[int, int] = {}
    for name, shape in shapes.items():
        if name.startswith(PREFIX) and name.endswith(LAST) and shape:
            _, *number = name.removeprefix(PREFIX).removesuffix(LAST).split(".")
            found[int(number[0]) if number and number[0].isdecimal() else 0] = shape[0]
    return tuple(found[number] for number in sorted(found)) or (1,)
