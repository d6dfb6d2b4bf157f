"""Why one gradient step classifies worse than Bayes' rule on new images: curvature, or overfitting?

For each class the step takes the gain in log-likelihood to first order; what it leaves out is the curvature:

    K * gradient score (n, K) = gain (n, K) - curvature (n, K), all centred over the K classes.

This is an identity and explains nothing by itself: the same curvature may cost little where the gain of the true class is
large, as it is on training images, and much where it is small. So gain and curvature are exchanged between images: the gain
of an image of one split is combined with the curvature of an image of the same class from the same or the other split. If
the accuracy follows the split of the gain, the step is worse on new images because their likelihood tells classes apart
less, which is overfitting; if it follows the split of the curvature, the log-likelihood is more curved on new images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.analysis.classify import classify
from rrepa_lab.analysis.features import Images, image_set
from rrepa_lab.analysis.noise import NoiseSamples
from rrepa_lab.checks import seed_number, whole_number
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.subset import whole
from rrepa_lab.errors import LabError
from rrepa_lab.measurements.columns import about, accuracy
from rrepa_lab.runs.run import Run

BOOTSTRAP = 2000  # resamples of the images, for intervals
STREAM = 91  # of the random numbers


class StepGap(NamedTuple):
    """Accuracies by where gain and curvature come from, and what each of the two does to the accuracy."""

    table: pd.DataFrame
    effects: pd.DataFrame


class _Part(NamedTuple):
    gain: Tensor  # (n, K) nats, centred over classes
    curvature: Tensor  # (n, K)
    y: Tensor  # (n,)


def step_gap(
    run: Run,
    splits: Sequence[str] = ("train", "test"),
    limit: int | None = None,
    *,
    partners: int = 20,
    noise: int | NoiseSamples | None = None,
    seed: int = 0,
) -> StepGap:
    """Separate curvature from overfitting in the accuracy of one gradient step.

    Args:
        splits: two splits of the run's data; images the flow was trained on, and others.
        limit: so many images of each, class-balanced, seed 0.
        partners: images of the same class that an image's gain is combined with, drawn with `seed`, never the image itself.
        noise: on the images, see `classify`; with this `seed` where it has none of its own.

    Returns:
        table: columns run, strategy, data, space, encoder, train_seed, gain_of, curvature_of (a split, or "the same image"),
            metric ("step_accuracy", "bayes_accuracy"; "curvature", the root mean square over rivals of what the curvature adds
            to the margin of the true class, nats; "margin", the mean margin of the true class by Bayes' rule, nats), value,
            standard_error, n.
        effects: the differences in accuracy from the first to the second split when only the gain, or only the curvature,
            comes from the second, averaged over the split of the other: columns run, strategy, data, space, encoder,
            train_seed, effect, value, low, high (95 %, bootstrap over images).

    Raises: LabError for other than two splits, a flow without classes, or a class with a single image in a split.
    """
    if len(splits) != 2:
        raise LabError(f"step_gap compares two splits, not {len(splits)}")
    whole_number("partners", partners, 1)
    seed_number(seed)
    parts = [_part(run, Images(split, None, limit), NoiseSamples.of(noise, seed)) for split in splits]
    rows, right = [], {}
    for i, (split, part) in enumerate(zip(splits, parts, strict=True)):
        own = {"gain_of": split, "curvature_of": "the same image"}
        for metric, scores in (("step_accuracy", part.gain - part.curvature), ("bayes_accuracy", part.gain)):
            rows.append(own | {"metric": metric, **accuracy(scores.argmax(dim=1) == part.y)})
        for metric, values in (("margin", _margins(part.gain, part.y)), ("curvature", _against(part.curvature, part.y).pow(2))):
            spread = float(values.std() / len(values) ** 0.5)
            value = float(values.mean())
            if metric == "curvature":  # root of a mean: the error by the chain rule
                value, spread = value**0.5, spread / (2 * value**0.5)
            rows.append(own | {"metric": metric, "value": value, "standard_error": spread, "n": len(values)})
        for j, other in enumerate(splits):
            draw = generator(seed, STREAM, i, j)
            hits = torch.stack([_exchanged(part, parts[j], i == j, draw) for _ in range(partners)]).double().mean(dim=0)
            right[i, j] = hits.numpy()
            mean, spread = float(hits.mean()), float(hits.std() / len(hits) ** 0.5)
            rows.append(
                {"gain_of": split, "curvature_of": other, "metric": "step_accuracy", "value": mean}
                | {"standard_error": spread, "n": len(hits)}
            )
    table = pd.DataFrame([about(run) | row for row in rows])
    return StepGap(table, pd.DataFrame([about(run) | row for row in _effects(right, seed)]))


def _part(run: Run, images: Images, noise: NoiseSamples) -> _Part:
    x, y = whole(image_set(run, images))
    alone = [run.classes[k] for k, count in enumerate(y.bincount().tolist()) if count == 1]
    if alone:
        raise LabError(f"class {alone[0]} has a single image in the {images.split} split: there is no other to exchange with")
    x = x.to(run.device)
    gain = classify(run, x, "bayes", noise=noise).scores.double().cpu()
    step = classify(run, x, "gradient", noise=noise).scores.double().cpu() * gain.shape[1]
    gain = gain - gain.mean(dim=1, keepdim=True)
    return _Part(gain, gain - step, y.cpu())


def _exchanged(part: _Part, other: _Part, same: bool, draw: torch.Generator) -> Tensor:
    """Whether each gain (n,) is right with the curvature of another image of its class, drawn from `other`."""
    chosen = torch.empty_like(part.y)
    for label in part.y.unique():
        mine = (part.y == label).nonzero()[:, 0]
        theirs = (other.y == label).nonzero()[:, 0]
        if not len(theirs):
            raise LabError(f"one split has images of class number {int(label)}, the other none")
        if same:  # any but itself: a step of 1..n-1 around the ring
            steps = torch.randint(1, len(mine), (len(mine),), generator=draw)
            chosen[mine] = mine[(torch.arange(len(mine)) + steps) % len(mine)]
        else:
            chosen[mine] = theirs[torch.randint(len(theirs), (len(mine),), generator=draw)]
    return (part.gain - other.curvature[chosen]).argmax(dim=1) == part.y


def _against(scores: Tensor, y: Tensor) -> Tensor:
    """Score of the true class less that of each rival (n, K - 1), flattened."""
    keep = torch.ones_like(scores, dtype=torch.bool).scatter_(1, y[:, None], False)
    return (scores.gather(1, y[:, None]) - scores)[keep]


def _margins(scores: Tensor, y: Tensor) -> Tensor:
    """Score of the true class less that of the best rival (n,)."""
    return scores.gather(1, y[:, None])[:, 0] - scores.scatter(1, y[:, None], -torch.inf).amax(dim=1)


def _effects(right: dict[tuple[int, int], np.ndarray], seed: int) -> list[dict[str, object]]:
    """Of the gain's split, of the curvature's, and their difference, with bootstrap intervals."""
    rng = np.random.default_rng([seed, STREAM])
    first, second = len(right[0, 0]), len(right[1, 0])

    def effects(a: np.ndarray | slice, b: np.ndarray | slice) -> np.ndarray:
        mean = {(i, j): hits[a if i == 0 else b].mean() for (i, j), hits in right.items()}
        gain = (mean[1, 0] - mean[0, 0] + mean[1, 1] - mean[0, 1]) / 2
        curvature = (mean[0, 1] - mean[0, 0] + mean[1, 1] - mean[1, 0]) / 2
        return np.array([gain, curvature, gain - curvature])

    everything = slice(None)
    drawn = [effects(rng.integers(first, size=first), rng.integers(second, size=second)) for _ in range(BOOTSTRAP)]
    low, high = np.quantile(np.stack(drawn), [0.025, 0.975], axis=0)
    names = ("gain of the second split", "curvature of the second split", "gain less curvature")
    found = zip(names, effects(everything, everything).tolist(), low.tolist(), high.tolist(), strict=True)
    return [{"effect": name, "value": value, "low": least, "high": most} for name, value, least, most in found]
