"""Whether a run repeats its training images: the nearest one of each sample, beside the nearest one of held-out images.

Samples that are as far from the training images as held-out images are, are no copies. A copy is nearer than nearly all of
these. Distances of pixels favour smooth pictures, so look at the pairs too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.checks import whole_number
from rrepa_lab.data.decoded import prepare
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.splits import split_rule
from rrepa_lab.data.subset import limited, subset_words
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.distances import squared_distances
from rrepa_lab.evaluation.intervals import mean_interval
from rrepa_lab.evaluation.networks.contract import to_floats
from rrepa_lab.evaluation.pictures import PictureSet, picture_set, rows_in_parts
from rrepa_lab.evaluation.run_samples import RunSamples, Sampling
from rrepa_lab.measurements.columns import about
from rrepa_lab.measurements.metrics import metric_of
from rrepa_lab.processes import shared
from rrepa_lab.runs.run import Run

PART = 2048  # training images that are held at once
QUANTILE = 0.01  # of the held-out distances, below which a sample counts as close


@dataclass(frozen=True)
class Nearest:
    """Samples with their nearest training images, and the distances of held-out images.

    Example:
        >>> import rrepa_lab as rl
        >>> found = rl.nearest_training(rl.load("digits-reverse"), 20)
        >>> found.images.shape == found.training.shape, len(found.held_out)
        (True, 360)
    """

    images: Tensor  # (n, C, H, W) samples in [-1, 1]
    distance: Tensor  # (n,) root mean square difference of a pixel, of [-1, 1]
    row: Tensor  # (n,) int64, of the training split
    training: Tensor  # (n, C, H, W) these training images
    held_out: Tensor  # (m,) distances of held-out images
    table: pd.DataFrame  # nearest_train_distance, held_out_train_distance, closer_than_held_out

    def closest(self, count: int = 8) -> Tensor:
        """Pairs (2 * count, C, H, W), the closest first: the samples, then their training images."""
        rows = self.distance.argsort()[:count]
        return torch.cat([self.images[rows], self.training[rows]])


def nearest_training(
    run: Run, samples: "int | Sampling | Any" = 2000, split: str = "test", *, seed: int = 0, limit: int = 2000
) -> Nearest:
    """Find the nearest training image of every sample, and of held-out images.

    Args:
        samples: how many samples of the run, or their settings, or pictures: a tensor, a .npz file, a folder.
        split: held-out images.
        seed: of the samples.
        limit: held-out images, class-balanced, seed 0.

    Returns: distances are the root mean square over pixels, whose range is [-1, 1]. The table has the medians of samples and of
        held-out images, and the part of the samples that is closer to a training image than 99 % of the held-out images.

    Raises: LabError for pictures of another size than the run's, and the training split as held-out images.

    Example:
        >>> import rrepa_lab as rl
        >>> found = rl.nearest_training(rl.load("digits-reverse"), 20)
        >>> found.closest(4).shape, found.table.metric[0]
        (torch.Size([8, 1, 8, 8]), 'nearest_train_distance')
    """
    if split == "train":
        raise LabError("held-out images are val or test: training images are their own nearest ones")
    drawn = isinstance(samples, int | Sampling)
    pictures: PictureSet = RunSamples(run, Sampling.of(samples, seed)) if drawn else picture_set(samples)
    train, held_out = run.images("train"), limited(run.images(split), whole_number("limit", limit, 1))
    prepare(train)
    fakes = shared(lambda rows: _floats(run, pictures, rows), len(pictures))
    real = torch.cat([held_out.__getitems__(part.tolist()).x for part in rows_in_parts(len(held_out), PART)])
    distance, row = _nearest(torch.cat([fakes, real]).flatten(1), train)
    own, known = distance[: len(fakes)], distance[len(fakes) :]
    close = own < known.quantile(QUANTILE)
    words = f"{pictures.words}; {len(train)} training images; {subset_words(len(real), len(run.images(split)))}"
    rule = split_rule(run.config.data, split)
    words += f" held-out images, {split} split" + ("" if rule == f"{split} = {split}/" else f" ({rule})")
    rows = [
        _row("nearest_train_distance", own, float(own.median()), words),
        _row("held_out_train_distance", known, float(known.median()), words),
        _row("closer_than_held_out", close, float(close.double().mean()), words) | mean_interval(close, over="samples"),
    ]
    table = pd.DataFrame([about(run) | {"split": split} | one for one in rows]).fillna({"interval": ""})
    return Nearest(fakes, own, row[: len(fakes)], train.__getitems__(row[: len(fakes)].tolist()).x, known, table)


def _row(metric: str, values: Tensor, value: float, words: str) -> dict[str, Any]:
    return {"metric": metric, "value": value, "unit": metric_of(metric).unit, "n": len(values), "protocol": words}


def _floats(run: Run, pictures: PictureSet, rows: Tensor) -> Tensor:
    x = torch.cat([to_floats(pictures.batch(part)).cpu() for part in rows.split(256)])
    if tuple(x.shape[1:]) != tuple(run.space.picture_shape):
        raise LabError(f"the pictures are {tuple(x.shape[1:])}, and those of run {run.name!r} {tuple(run.space.picture_shape)}")
    return x


def _nearest(x: Tensor, train: ImageSet) -> tuple[Tensor, Tensor]:
    """Root mean square distance to the nearest training image, and its row, for pictures (n, d); processes share them."""

    def of_rows(rows: Tensor) -> Tensor:
        own = x[rows]
        best = torch.full((len(rows),), torch.inf)
        place = torch.zeros(len(rows), dtype=torch.int64)
        for part, images in _parts(train):
            values, at = squared_distances(own, images).min(dim=1)
            nearer = values < best
            best[nearer], place[nearer] = values[nearer], part[at[nearer]]
        return torch.stack([best.double(), place.double()], dim=1)

    found = shared(of_rows, len(x))
    row = found[:, 1].long()
    # the difference itself: the expanded square loses digits where two pictures are nearly equal
    exact = [
        (x[part] - train.__getitems__(row[part].tolist()).x.flatten(1)).square().mean(dim=1).sqrt()
        for part in rows_in_parts(len(x), PART)
    ]
    return torch.cat(exact), row


def _parts(images: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
    for part in rows_in_parts(len(images), PART):
        yield part, images.__getitems__(part.tolist()).x.flatten(1)
