"""Sets of 8-bit pictures that lie in memory as arrays, read at any size."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rrepa_lab.data.fingerprint import digest
from rrepa_lab.data.images import Batch, SplitImages
from rrepa_lab.data.layout import shares_of
from rrepa_lab.data.pictures import from_picture
from rrepa_lab.data.pixels import to_integers, to_unit


class ArrayImages(SplitImages):
    """Some pictures of an array; other sizes and numbers of channels than theirs are computed as for picture files.

    Args:
        pictures: (N, H, W) grey or (N, H, W, 3) colour, uint8.
        labels: (N,) integers, -1 where there is none.
        rows: which of them, in this order.
        size, channels: of the images.
    """

    levels = 256

    def __init__(
        self, pictures: np.ndarray, labels: np.ndarray, classes: list[str], rows: np.ndarray, size: int, channels: int
    ) -> None:
        self.pictures, self.rows, self.classes = pictures, rows, classes
        self.size, self.channels = size, channels
        self.labels: Tensor = torch.from_numpy(np.asarray(labels, np.int64)[rows])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def decoded(self) -> bool:
        """Whether the images are the array's own numbers."""
        own = 3 if self.pictures.ndim == 4 else 1
        return self.pictures.shape[1:3] == (self.size, self.size) and own == self.channels

    @cached_property
    def fingerprint(self) -> str:
        """Of the pictures as they are stored, the labels and the class names."""
        parts = (str(self.pictures.shape[1:]), self.pictures[self.rows].tobytes(), self.labels.numpy().tobytes())
        return digest(*self.classes, *parts)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of these rows."""
        chosen = [int(i) for i in indices]
        found = self.pictures[self.rows[chosen]]
        if self.decoded:
            x = to_unit(torch.from_numpy(found).reshape(len(chosen), self.size, self.size, -1).permute(0, 3, 1, 2), 256)
        else:
            made = [from_picture(Image.fromarray(picture), self.channels, self.size) for picture in found]
            x = to_unit(to_integers(torch.cat(made), 256), 256)
        return Batch(x.contiguous(), self.labels[chosen])


def rows_of_split(labels: np.ndarray, split: str, val: float, test: float = 0.0) -> np.ndarray:
    """The rows of one share of a set that is divided class by class, by a hash of their numbers."""
    parts = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        kept = shares_of([str(row) for row in rows], val, test)[split]
        parts += [int(row) for row in kept]
    return np.sort(np.array(parts, np.int64))
