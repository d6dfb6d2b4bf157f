"""Class-balanced subsets: what a `limit` means wherever fewer images than a split has are read."""

import os
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from rrepa_lab.data.fingerprint import digest
from rrepa_lab.data.images import Batch, ImageSet, SplitImages
from rrepa_lab.errors import LabError
from rrepa_lab.readers import MIB

FEW = 1000  # images that are read without a look at their size
BUDGET = 4096  # MiB of images that may be read into memory at once


def balanced_rows(labels: Tensor, limit: int, seed: int = 0) -> Tensor:
    """Rows of at most `limit` images, drawn at random with as equal numbers of every class as there are.

    The rows come in rounds of one image of each class, in random order within a round, so that every prefix is balanced to
    within one image; a class that has no more images drops out of the rounds. They depend on the labels and the seed alone.

    Args:
        labels: (N,) int64 in any order; images without a label (-1) count as one class.
        limit: at least 1; from N on all rows are returned, in their own order.

    Returns: (min(limit, N),) int64.   Raises: LabError for a limit below 1.
    """
    if limit < 1:
        raise LabError(f"limit is {limit}: a subset needs at least one image")
    if limit >= len(labels):
        return torch.arange(len(labels))
    draw = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=draw)
    # the images of each class side by side, still in random order within it
    shuffled = shuffled[labels.cpu()[shuffled].argsort(stable=True)]
    _, group, counts = labels.cpu()[shuffled].unique_consecutive(return_inverse=True, return_counts=True)
    turn = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[group]  # the round in which an image comes
    order = torch.randperm(len(labels), generator=draw)
    return shuffled[order[turn[order].argsort(stable=True)]][:limit]


class Subset(SplitImages):
    """Some images of a set, in the order of `rows`."""

    def __init__(self, images: ImageSet, rows: Tensor) -> None:
        self.images, self.rows = images, rows
        self.classes, self.levels = images.classes, images.levels

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Tensor:
        """(n,) int64."""
        return self.images.labels[self.rows]

    @cached_property
    def fingerprint(self) -> str:
        """Of the whole set and the rows."""
        return digest(self.images.fingerprint, ",".join(map(str, self.rows.tolist())))

    @property
    def decoded(self) -> bool:
        """That of the whole set."""
        return bool(getattr(self.images, "decoded", False))

    @property
    def stamp(self) -> str:
        """That of the whole set."""
        return str(getattr(self.images, "stamp", ""))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of these rows of the subset."""
        return self.images.__getitems__(self.rows[torch.as_tensor(indices, dtype=torch.long)].tolist())


def limited(images: ImageSet, limit: int | None, seed: int = 0) -> ImageSet:
    """The set itself, or a class-balanced subset of `limit` images where it has more; see `balanced_rows`."""
    if limit is None or (limit >= len(images) and limit > 0):
        return images
    return Subset(images, balanced_rows(images.labels, limit, seed))


def whole(images: ImageSet, limit: int | None = None, seed: int = 0) -> Batch:
    """A split as one batch, or a class-balanced subset of `limit` images; see `balanced_rows`.

    Raises: LabError where the batch would take more than 4 GiB, or $RREPA_MEMORY_MIB.
    """
    chosen = limited(images, limit, seed)
    if len(chosen) > FEW:
        size = len(chosen) * chosen.__getitems__([0]).x.nbytes / MIB
        budget = float(os.environ.get("RREPA_MEMORY_MIB") or BUDGET)
        if size > budget:
            what = f"{len(chosen)} images take {size:.0f} MiB in memory, over the budget of {budget:.0f} MiB"
            raise LabError(f"{what}: read fewer (limit), or raise $RREPA_MEMORY_MIB")
    return chosen.__getitems__(range(len(chosen)))


def subset_words(used: int, total: int, seed: int = 0) -> str:
    """Which images a number was measured on, for protocols: "all 360", or "100 of 360, class-balanced, seed 0"."""
    return f"all {total}" if used >= total else f"{used} of {total}, class-balanced, seed {seed}"
