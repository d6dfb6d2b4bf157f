"""Sets of images: the protocol that every split follows, and a split that lies in memory."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from rrepa_lab.data.fingerprint import fingerprint_of_tensors


class Batch(NamedTuple):
    """Images with their labels.

    Example:
        >>> import rrepa_lab as rl
        >>> batch = rl.load("digits-none").data("test", 10)
        >>> batch.x.shape, batch.y.shape
        (torch.Size([10, 1, 8, 8]), torch.Size([10]))
    """

    x: Tensor  # (B, C, H, W) float32 in [-1, 1]
    y: Tensor  # (B,) int64, -1 where there is no label


@runtime_checkable
class ImageSet(Protocol):
    """A split: its length, batches by index, what the numbers mean, and a fingerprint.

    A set of files also has a `stamp`, which changes when a file is replaced in its place (see `data.fingerprint`), and
    an attribute `decoded`: whether a batch is there without decoding, so that reading ahead in other processes is of no use.
    """

    classes: list[str]
    levels: int  # integer values a number can take

    @property
    def labels(self) -> Tensor:
        """(N,) int64, known without decoding a picture."""
        ...

    @property
    def fingerprint(self) -> str:
        """16 hex digits that depend on the images and their order, not on where they lie, found without decoding one."""
        ...

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch: ...


class SplitImages:
    """What the sets of the kit share."""

    @property
    def missing(self) -> list[str]:
        """Classes without an image in this split."""
        images = cast(ImageSet, self)
        return missing_classes(images.labels, images.classes)


class TensorImages(SplitImages):
    """A split that lies in memory."""

    decoded = True

    def __init__(self, x: Tensor, y: Tensor, classes: list[str], levels: int) -> None:
        self.x, self.y, self.classes, self.levels = x, y, classes, levels

    def __len__(self) -> int:
        return len(self.x)

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self.y

    @cached_property
    def fingerprint(self) -> str:
        """Of all numbers, labels and class names."""
        return fingerprint_of_tensors((self.x, self.y), self.classes)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of these rows."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        return Batch(self.x[rows], self.y[rows])


def missing_classes(labels: Tensor, classes: Sequence[str]) -> list[str]:
    """Names of the classes that none of these labels (N,) stands for."""
    present = set(labels.unique().tolist())
    return [name for number, name in enumerate(classes) if number not in present]
