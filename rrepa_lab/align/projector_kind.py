"""What a kind of projector is; each is one file below `align/projectors`, and `align.projector` names one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from rrepa_lab.registry import Registry


class Sizes(NamedTuple):
    """Sizes of a projector.

    Args:
        width: D, numbers of a state of the flow.
        hidden: width of hidden layers, `align.projector_width`.
        dim: E, numbers of a feature of the teacher.
        side: tokens along an edge of the image.
    """

    width: int
    hidden: int
    dim: int
    side: int


@dataclass(frozen=True)
class ProjectorKind:
    """A kind of projector: a module (B, T, D) -> (B, T, E).

    Args:
        make: its module.
        last: the name of its last bias (E,) within the module, by which a stored run tells E.
        products: multiply-adds for one token.
        kept: numbers that the graph keeps of one token for the backward pass, beside input and output.
        masks: whether the module takes a second argument, (B, T) bool: the tokens that are hidden from it in training.
        grid: whether it depends on the place of a token, so that `side` must be known.
    """

    make: Callable[[Sizes], nn.Module]
    last: str
    products: Callable[[Sizes], int]
    kept: Callable[[Sizes], int]
    masks: bool = False
    grid: bool = False


PROJECTORS: Registry[ProjectorKind] = Registry(
    "projector", "rrepa_lab.align.projectors", order=("mlp", "linear", "conv3", "masked")
)


def as_map(tokens: Tensor, side: int) -> Tensor:
    """Tokens (B, T, D) in row-major order as a map (B, D, side, side)."""
    return tokens.transpose(1, 2).unflatten(2, (side, side))
