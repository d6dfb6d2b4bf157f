"""From the flow's hidden states to the teachers' feature spaces."""

from collections.abc import Mapping, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.projector_kind import PROJECTORS, Sizes
from rrepa_lab.flow.tarflow.config import FlowConfig

PREFIX = "projectors."  # of their tensors in model.safetensors
SHARED = "shared"  # the key of one that all taps share


class TeacherProjectors(nn.ModuleList):
    """One projector for each of several teachers, (B, T, D) -> (B, T, E1 + E2 + ...)."""

    def forward(self, features: Tensor, *mask: Tensor) -> Tensor:
        """Their outputs side by side, in the order of the teachers."""
        return torch.cat([projector(features, *mask) for projector in self], dim=-1)


class Projectors(nn.ModuleDict):
    """Projectors by tap name ("block.4.layer.2"), one for each teacher; or the same for all taps.

    Args:
        width: D, of the flow.
        hidden: width of the hidden layers.
        dims: E of the teacher, or of each of several.
        kind: of `align.projector_kind.PROJECTORS`.
        side: tokens along an edge of the image; kinds that do not depend on the place of a token need none.
        shared: whether all taps have one projector.

    Attributes: taps, those that have a projector.
    """

    def __init__(
        self,
        taps: Sequence[str],
        width: int,
        hidden: int,
        dims: int | Sequence[int],
        *,
        kind: str = "mlp",
        side: int = 0,
        shared: bool = False,
    ) -> None:
        self.dims = (dims,) if isinstance(dims, int) else tuple(dims)
        self.taps, self.kind, self.is_shared = list(taps), PROJECTORS[kind], shared

        def of_tap() -> nn.Module:
            each = [self.kind.make(Sizes(width, hidden, dim, side)) for dim in self.dims]
            return each[0] if len(each) == 1 else TeacherProjectors(each)

        super().__init__({key: of_tap() for key in dict.fromkeys(map(self._key, taps))})

    @classmethod
    def of(cls, align: AlignConfig, flow: FlowConfig, dims: int | Sequence[int], taps: Sequence[str] | None = None) -> Self:
        """Those of a configuration, whose blocks and layers count from 1.

        Args:
            taps: others than the aligned ones.
        """
        names = align.taps if taps is None else taps
        shared = align.sharing == "shared"
        return cls(names, flow.width, align.projector_width, dims, kind=align.projector, side=flow.side, shared=shared)

    def _key(self, tap: str) -> str:
        return SHARED if self.is_shared else tap.replace(".", "_")  # a module's name may not contain a dot

    def project(self, tap: str, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features (B, T, D) of a tap -> (B, T, E), of several teachers side by side.

        Args:
            mask: (B, T) bool, tokens that are hidden from a kind that takes a mask.
        """
        module = self[self._key(tap)]
        return module(features) if mask is None else module(features, mask)

    def of_teacher(self, number: int) -> "Projectors":
        """Those of one teacher, from 0; they share their weights with these."""
        if len(self.dims) == 1:
            return self
        found = Projectors([], 1, 1, self.dims[number : number + 1], shared=self.is_shared)
        found.taps, found.kind = self.taps, self.kind
        found.update({key: cast(TeacherProjectors, module)[number] for key, module in self.items()})
        return found


def stored_dims(shapes: Mapping[str, tuple[int, ...]], kind: str = "mlp") -> tuple[int, ...]:
    """E of each teacher, from the shapes of a run's tensors by name; (1,) without projectors.

    Args:
        kind: of the projectors.

    Example:
        >>> stored_dims({"projectors.block_3_layer_2.0.4.bias": (320,), "projectors.block_3_layer_2.1.4.bias": (384,)})
        (320, 384)
    """
    found: dict[int, int] = {}
    last = f".{PROJECTORS[kind].last}"
    for name, shape in shapes.items():
        if name.startswith(PREFIX) and name.endswith(last) and shape:
            _, *number = name.removeprefix(PREFIX).removesuffix(last).split(".")
            if not number or number[0].isdecimal():
                found[int(number[0]) if number else 0] = shape[0]
    return tuple(found[number] for number in sorted(found)) or (1,)
