"""Seeded streams of batches that can be entered at any step.

The batch of step s depends on (seed, s) alone, not on how the run came there: so a resumed run reads what an
uninterrupted one would have read, and N processes share the batches that one process would have had.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from rrepa_lab.data.images import Batch, ImageSet
from rrepa_lab.errors import LabError


def generator(*key: int) -> torch.Generator:
    """A CPU random stream of its own for each tuple of integers (seed, purpose, step, ...), each in 0 .. 2^64 - 1.

    SeedSequence fills its entropy up with zeros and splits large integers into words, so that (0, 3), (0, 3, 0, 0) and
    (3 * 2^32,) would be one stream: the number of integers goes in first, and each of them as two words.
    """
    words = [word for number in key for word in (number & 0xFFFFFFFF, number >> 32)]
    return torch.Generator().manual_seed(int(np.random.SeedSequence([len(key), *words]).generate_state(1, np.uint64)[0] >> 1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fresh weights made within it depend on the seed alone, and the global random state is afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class SeededBatches(Sampler[list[int]]):
    """Rows of each step's batch, for one of `world` processes; each epoch is a fresh permutation, the rest dropped."""

    def __init__(self, size: int, batch: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch, self.seed = size, min(batch, size), seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.size // self.batch
        order, shown = [], -1
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, per_epoch)
            if epoch != shown:
                order, shown = torch.randperm(self.size, generator=generator(self.seed, 1, epoch)).tolist(), epoch
            yield order[place * self.batch : (place + 1) * self.batch][self.rank :: self.world]


def stream(images: ImageSet, batches: Iterable[list[int]], workers: int = 0) -> Iterator[Batch]:
    """The batches (rows of each), read ahead by `workers` processes if the images have to be decoded.

    Raises: the LabError of a file that cannot be read, in one line wherever it was read.
    """
    loader = DataLoader(
        cast(Dataset[Batch], images),
        batch_sampler=batches,
        collate_fn=_as_is,  # __getitems__ has collated it
        num_workers=0 if getattr(images, "decoded", False) else workers,
        generator=torch.Generator(),  # otherwise each stream would move the global random state
    )
    try:
        yield from loader
    except LabError as error:
        text = str(error)
        if "Original Traceback" not in text:
            raise
        # the error of a worker process comes with its traceback, whose last line is the message
        raise LabError(text.strip().splitlines()[-1].partition("LabError: ")[2] or text) from None


def _as_is(batch: Any) -> Any:
    return batch
