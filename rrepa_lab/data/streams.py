"""Random numbers that belong to an image: keyed by seed, purpose, epoch and the row of the image in its split.

They do not depend on the batch that the image comes in, its place there, or the process that reads it: one process and
several see the same noise, flips, shifts and dropped labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

STEP = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64 (Steele et al., OOPSLA 2014): 2^64 divided by the golden ratio, odd


@dataclass(frozen=True)
class RowStreams:
    """A random stream for each of some rows.

    Args:
        key: integers in 0 .. 2^64 - 1 that choose the streams, (seed, purpose, epoch).
        rows: numbers of the images in their split.

    Example:
        >>> several, one = RowStreams((0, 1), [5, 7]), RowStreams((0, 1), [7])
        >>> bool((several.normal((3, 4, 4))[1] == one.normal((3, 4, 4))[0]).all())
        True
    """

    key: tuple[int, ...]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def scalars(self, count: int = 1) -> Tensor:
        """Uniform numbers in [0, 1): (B, count), float64, drawn on the CPU."""
        states = self._states[:, None] + np.arange(1, count + 1, dtype=np.uint64) * STEP
        return torch.from_numpy((_mixed(states) >> np.uint64(11)) * 2.0**-53)

    def normal(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers (B, *shape), drawn on the CPU."""
        return self._filled(lambda row, draw: row.normal_(generator=draw), shape, dtype)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape), drawn on the CPU."""
        return self._filled(lambda row, draw: row.uniform_(generator=draw), shape, dtype)

    def _filled(self, fill: Callable[[Tensor, torch.Generator], object], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        values, draw = torch.empty(len(self.rows), *shape, dtype=dtype), torch.Generator()
        for row, seed in zip(values, self._states.tolist(), strict=True):
            fill(row, draw.manual_seed(seed))  # a generator of torch on the CPU takes the lower 32 bits
        return values

    @cached_property
    def _states(self) -> np.ndarray:
        """(B,) uint64, one for each row."""
        words = [word for number in self.key for word in (number & 0xFFFFFFFF, number >> 32)]
        base = np.random.SeedSequence([len(self.key), *words]).generate_state(1, np.uint64)[0]
        with np.errstate(over="ignore"):
            return _mixed(base + (np.asarray(self.rows, dtype=np.uint64) + np.uint64(1)) * STEP)


Draws = torch.Generator | RowStreams | None  # where the numbers of a batch come from; None for torch's global stream


def normal_rows(shape: Sequence[int], draws: Draws = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers (B, ...) on the CPU: row i depends on `draws` and i, not on how many rows follow.

    torch fills a CPU tensor in chunks of 16 numbers, and the last chunk from its end: each row is padded to whole chunks.
    """
    if isinstance(draws, RowStreams):
        return draws.normal(shape[1:], dtype)
    numbers = int(np.prod(shape[1:], dtype=np.int64))
    padded = torch.randn(shape[0], -(-numbers // 16) * 16, generator=draws, dtype=dtype)
    return padded[:, :numbers].reshape(tuple(shape))


def uniform_rows(shape: Sequence[int], draws: Draws = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), (B, ...), on the CPU."""
    return draws.uniform(shape[1:], dtype) if isinstance(draws, RowStreams) else torch.rand(shape, generator=draws, dtype=dtype)


def _mixed(states: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64: uint64 -> uint64, one to one."""
    with np.errstate(over="ignore"):
        states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return states ^ (states >> np.uint64(31))
