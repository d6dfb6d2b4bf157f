"""Addresses of inner states.

`block.<t>.layer.<l>` is the output of the l-th Transformer layer inside block t, (B, T, D). `block.<t>.in` and
`block.<t>.out` are the tokens on the image side and the noise side of block t, (B, T, P): in is what the block
reads when encoding and what it writes when generating. Blocks and layers count from 1, and every state is in
image token order, whatever order its block works in.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, Self

from torch import Tensor

from rrepa_lab.errors import LabError, unknown

Taps = str | Iterable[str]  # names or glob patterns


class Tap(NamedTuple):
    """One address; `layer` counts from 1, or is "in" or "out"."""

    block: int
    layer: int | str

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read "block.7.layer.6", "block.7.in" or "block.7.out"; anything else is a LabError."""
        match name.split("."):
            case ["block", block, "layer", layer] if block.isdecimal() and layer.isdecimal():
                return cls(int(block), int(layer))
            case ["block", block, ("in" | "out") as side] if block.isdecimal():
                return cls(int(block), side)
        raise LabError(f"{name!r} is not a tap; write block.<t>.layer.<l>, block.<t>.in or block.<t>.out")

    @property
    def name(self) -> str:
        """The address as it is typed."""
        return f"block.{self.block}.{self.layer}" if isinstance(self.layer, str) else f"block.{self.block}.layer.{self.layer}"

    @property
    def module_path(self) -> str:
        """The module of a `TarFlow` whose output this is (its input for "in"), in PyTorch's own counting from 0."""
        path = f"blocks.{self.block - 1}"
        return path if isinstance(self.layer, str) else f"{path}.transformer.layers.{self.layer - 1}"


Depths = int | Sequence[int]  # Transformer layers of every block, or of each block


def depths_of(blocks: int, layers: Depths) -> tuple[int, ...]:
    """The number of layers of each block, block 1 first.

    Example:
        >>> depths_of(3, 2), depths_of(3, [8, 2, 2])
        ((2, 2, 2), (8, 2, 2))
    """
    return (layers,) * blocks if isinstance(layers, int) else tuple(layers)


def depth_words(blocks: int, layers: Depths) -> str:
    """Blocks and layers in words, "4 blocks of 2 layers", "3 blocks of 8, 2 and 2 layers"."""
    if isinstance(layers, int):
        return f"{blocks} blocks of {layers} layers"
    first = ", ".join(map(str, layers[:-1]))
    return f"{blocks} blocks of {first + ' and ' if first else ''}{layers[-1]} layers"


def all_taps(blocks: int, layers: Depths) -> list[Tap]:
    """Every address of a flow, from the image to the noise."""
    depths = depths_of(blocks, layers)
    return [Tap(t, place) for t, depth in enumerate(depths, start=1) for place in ("in", *range(1, depth + 1), "out")]


def resolve(patterns: str | Iterable[str], blocks: int, layers: Depths) -> list[Tap]:
    """The taps that match names or glob patterns ("block.*.layer.2"), in flow order, each once.

    Raises: LabError when a pattern matches nothing.
    """
    known = all_taps(blocks, layers)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(tap.name, pattern) for tap in known):
            near = unknown("tap", pattern, [tap.name for tap in known])
            raise LabError(f"{near} (this flow has {depth_words(blocks, layers)}, counted from 1)")
    return [tap for tap in known if any(fnmatchcase(tap.name, pattern) for pattern in patterns)]


class Recorder:
    """Collects the states that a pass through the blocks was requested to keep.

    Args:
        taps: which, as `resolve` gives them.
    """

    def __init__(self, taps: list[Tap]) -> None:
        self.taps = taps
        self._states: dict[str, Tensor] = {}

    def layers(self, block: int) -> set[int]:
        """The layers of a block whose outputs are wanted."""
        return {tap.layer for tap in self.taps if tap.block == block and isinstance(tap.layer, int)}

    def tokens(self, block: int, side: str, tokens: Tensor) -> None:
        """Keep the tokens (B, T, P) on one side of a block, "in" or "out", if they are wanted."""
        tap = Tap(block, side)
        if tap in self.taps:
            self._states[tap.name] = tokens

    def add(self, block: int, states: dict[int, Tensor]) -> None:
        """Keep layer outputs (B, T, D) of a block."""
        self._states |= {Tap(block, layer).name: state for layer, state in states.items()}

    @property
    def states(self) -> dict[str, Tensor]:
        """Tap -> state, in flow order."""
        return {tap.name: self._states[tap.name] for tap in self.taps}
