"""Sets of images: the protocol that every split follows, and a split that lies in memory."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


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
    """A split: its length, batches by index, and what the numbers mean."""

    classes: list[str]
    levels: int  # integer values a number can take

    @property
    def labels(self) -> Tensor:
        """(N,) int64, known without decoding a picture."""
        ...

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch: ...


class TensorImages:
    """A split that lies in memory."""

    def __init__(self, x: Tensor, y: Tensor, classes: list[str], levels: int) -> None:
        self.x, self.y, self.classes, self.levels = x, y, classes, levels

    def __len__(self) -> int:
        return len(self.x)

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self.y

    @property
    def missing(self) -> list[str]:
        """Classes without an image in this split."""
        return missing_classes(self.labels, self.classes)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of these rows."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        return Batch(self.x[rows], self.y[rows])


def missing_classes(labels: Tensor, classes: Sequence[str]) -> list[str]:
    """Names of the classes that none of these labels (N,) stands for."""
    present = set(labels.unique().tolist())
    return [name for number, name in enumerate(classes) if number not in present]
