"""Steering vectors: directions in the states of a flow that are worth moving along."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rrepa_lab.analysis.features import FeatureProtocol, Images, check_spread, concatenate
from rrepa_lab.analysis.probe_fit import check_classes, logistic_regression
from rrepa_lab.checks import whole_number
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.inputs import as_labels
from rrepa_lab.runs.run import Run

KINDS = ("class", "component", "probe")


@dataclass(frozen=True)
class SteeringVector:
    """A vector to add to the states at a tap, see `steer`.

    Example:
        >>> SteeringVector("block.3.in", torch.tensor([1.0, 0.0, 0.0, 0.0]), "the first number of every token").vector.shape
        torch.Size([4])
    """

    tap: str
    vector: Tensor  # (d,) for every token, or (T, d)
    words: str  # what it is: "mean of 3 minus mean of the others, 300 train images"


def steering_vector(
    run: Run,
    tap: str,
    kind: str,
    *,
    label: int | str | None = None,
    versus: int | str | None = None,
    component: int = 1,
    images: Images | None = None,
    protocol: FeatureProtocol | None = None,
) -> SteeringVector:
    """A vector from the states of many images.

    | kind | vector | strength 1 |
    |---|---|---|
    | class | mean state of a class minus that of another, or of all others | the difference itself |
    | component | a principal component of the states | one standard deviation of them along it |
    | probe | the weight of a class in a linear probe, logistic regression on standardised states | the same |

    Args:
        tap: a layer or the tokens beside a block, one name.
        kind: of the table.
        label: the class of "class" and "probe", id or name.
        versus: of "class", a second class; None for all others.
        component: of "component", 1 for the one of the largest variance. Its sign is that of a positive sum.
        images: 1,000 of the training split by default.
        protocol: of the features. Pooled over tokens (its default) the vector is (d,), with pool="all" (T, d).

    Raises: LabError for an unknown kind or class, a class without images, and as `probe`.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> found = rl.steering_vector(run, "block.3.layer.2", "class", label=3, versus=8)
        >>> found.vector.shape, found.words
        (torch.Size([64]), 'mean of 3 minus mean of 8, 1000 train images')
    """
    if kind not in KINDS:
        raise unknown("kind of steering vector", kind, KINDS)
    taps = run.flow.resolve(tap)
    if len(taps) != 1:
        raise LabError(f"{tap} names {len(taps)} taps: give one")
    if (kind != "component") != (label is not None):
        raise LabError(f"a vector of kind {kind} {'has no' if label is not None else 'needs a'} label")
    features_of = protocol or FeatureProtocol()
    chosen = images or Images("train", limit=1000)
    found = concatenate(features_of.batches(run, [taps[0].name], chosen), keep_images=False)
    features, y = found.features[taps[0].name].double(), found.y
    check_spread(features, taps[0].name)
    if label is None:
        vector, words = _principal(features, component)
    elif kind == "class":
        other = None if versus is None else _class_id(run, versus)
        vector, words = _class_difference(features, y, run.classes, _class_id(run, label), other)
    else:
        vector, words = _probe_weight(features, y, run.classes, _class_id(run, label))
    of = f"{len(features)} samples" if features_of.direction == "reverse" else f"{len(features)} {chosen.split} images"
    shape = (-1,) if features_of.pool == "mean" else (run.flow.config.tokens, -1)
    return SteeringVector(taps[0].name, vector.float().view(shape), f"{words}, {of}")


def _class_id(run: Run, label: int | str) -> int:
    return int(as_labels(run.flow, label, 1, run.classes)[0])


def _rows(y: Tensor, classes: list[str], label: int) -> Tensor:
    rows = y == label
    if not rows.any():
        raise LabError(f"there are no images of class {classes[label] if label >= 0 else label}")
    return rows


def _class_difference(features: Tensor, y: Tensor, classes: list[str], label: int, versus: int | None) -> tuple[Tensor, str]:
    own = _rows(y, classes, label)
    other = ~own if versus is None else _rows(y, classes, versus)
    if not other.any():
        raise LabError("all images are of one class: there is nothing to compare it with")
    words = f"mean of {classes[label]} minus mean of {'the others' if versus is None else classes[versus]}"
    return features[own].mean(dim=0) - features[other].mean(dim=0), words


def _principal(features: Tensor, component: int) -> tuple[Tensor, str]:
    most = min(len(features) - 1, features.shape[1])
    number = whole_number("component", component, 1, most)
    _, spread, axes = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)
    axis, share = axes[number - 1], float(spread[number - 1] ** 2 / spread.square().sum())
    axis = axis * (1 if axis.sum() >= 0 else -1)
    return axis * spread[number - 1] / (len(features) - 1) ** 0.5, f"principal component {number} ({share:.0%} of the variance)"


def _probe_weight(features: Tensor, y: Tensor, classes: list[str], label: int) -> tuple[Tensor, str]:
    _rows(y, classes, label)
    check_classes(y)
    model = logistic_regression(features, y)
    known = model[-1].classes_.tolist()
    weights = torch.from_numpy(model[-1].coef_)
    weights = torch.cat([-weights, weights]) if len(known) == 2 else weights  # of two classes scikit-learn has one weight
    axis = weights[known.index(label)] / torch.from_numpy(model[0].scale_)
    axis = axis / axis.norm()
    return axis * (features @ axis).std(), f"probe weight of {classes[label]}"
