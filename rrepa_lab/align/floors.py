"""How near a constant comes to the teacher's patch features: the floor of a cosine with them.

Patch features have much in common: a mean over images, one for each position, is already near to all of them, and the mean
over the images of a class nearer still. The constant with the highest mean cosine is the mean of the targets scaled to unit
length. A cosine of an aligned layer says something about the image by as much as it exceeds that floor.

Of several teachers the features stand side by side. Each teacher has its own cosine, and the mean of these is taken.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.errors import LabError

POSITION, LABEL_POSITION = "position", "label and position"


class Floor(NamedTuple):
    """Mean cosine over patches of each image (B,) with the best constants."""

    position: Tensor  # the same constant for all images, one for each patch position
    label_position: Tensor  # one for each class and position; that of the position where a class has no other image


def teacher_cosine(a: Tensor, b: Tensor, dims: Sequence[int] = ()) -> Tensor:
    """Cosine of features (..., E) -> (...); with E of each of several teachers side by side, the mean of their cosines."""
    if len(dims) < 2:
        return F.cosine_similarity(a, b, dim=-1)
    parts = zip(a.split(list(dims), dim=-1), b.split(list(dims), dim=-1), strict=True)
    return torch.stack([F.cosine_similarity(one, other, dim=-1) for one, other in parts]).mean(dim=0)


class TargetMeans:
    """Sums of unit-length teacher features by class and patch position, from which the best constants follow.

    Args:
        classes: labels are 0..classes-1; images with another label count for the position only.
        dims: E of each of several teachers, whose features have unit length each.
    """

    def __init__(self, classes: int, dims: Sequence[int] = ()) -> None:
        self.classes, self.dims = classes, list(dims)
        self.counts = torch.zeros(classes + 1)
        self.sums = torch.zeros(0)

    def add(self, target: Tensor, labels: Tensor) -> None:
        """Features (B, T, E) of images with labels (B,)."""
        unit = self._unit(target)
        if not len(self.sums):
            self.sums = torch.zeros(self.classes + 1, *unit.shape[1:])
        rows = self._rows(labels)
        self.sums.index_add_(0, rows, unit)
        self.counts.index_add_(0, rows, torch.ones(len(rows)))

    def floor(self, target: Tensor, labels: Tensor, own: bool = False) -> Floor:
        """How near the constants come to features (B, T, E); `own`: these images were added, and each is left out of its own
        constants.
        """
        unit, rows = self._unit(target), self._rows(labels)
        less = unit if own else torch.zeros_like(unit)
        position = self.sums.sum(dim=0) - less
        others = self.counts[rows] - float(own)
        known = (others > 0.5) & (rows < self.classes)
        by_class = torch.where(known[:, None, None], self.sums[rows] - less, position)
        return Floor(*(teacher_cosine(unit, mean, self.dims).mean(dim=-1) for mean in (position, by_class)))

    def _unit(self, target: Tensor) -> Tensor:
        parts = target.float().split(self.dims or target.shape[-1], dim=-1)
        return torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1).cpu()

    def _rows(self, labels: Tensor) -> Tensor:
        labels = labels.cpu().long()
        return torch.where((labels >= 0) & (labels < self.classes), labels, self.classes)


def position_floor(
    features: Tensor, labels: Tensor | None = None, chunk: int = 1024, dims: Sequence[int] = ()
) -> dict[str, float]:
    """Floors of a table of teacher features, for a training loop to state beside the similarity.

    Args:
        features: (n, T, E) of the training images.
        labels: (n,) class ids; without them, or where all are negative, the position is the only floor.
        chunk: images at a time.
        dims: E of each of several teachers whose features stand side by side; the floors are means over them.

    Returns: {"position": mean cosine of the best constant for each position, "label_position": that for each class and
        position}. Each image is left out of the constants that it is compared with, so that a class of few images has no
        floor of 1.

    Raises: LabError for fewer than two images, or another number of labels.

    Example:
        >>> floors = position_floor(torch.randn(8, 4, 16), torch.arange(8) % 2)
        >>> sorted(floors)
        ['label_position', 'position']
    """
    n = len(features)
    if n < 2 or (labels is not None and len(labels) != n):
        raise LabError(f"a floor needs at least two images, with a label each if any: {n} images, labels: {labels is not None}")
    ids = torch.full((n,), -1) if labels is None else labels.cpu().long()
    means = TargetMeans(max(0, int(ids.max()) + 1), dims)
    for part, y in zip(features.split(chunk), ids.split(chunk), strict=True):
        means.add(part, y)
    pairs = zip(features.split(chunk), ids.split(chunk), strict=True)
    position, label_position = (
        torch.cat(values) for values in zip(*(means.floor(part, y, own=True) for part, y in pairs), strict=True)
    )
    found = {"position": float(position.mean())}
    return found | ({"label_position": float(label_position.mean())} if means.classes else {})
