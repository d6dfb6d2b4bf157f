"""Classification over a set of images: accuracy by class, confusion, calibration, and every image."""

from collections.abc import Collection
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.analysis.classify import Ascent, Classification, classify
from rrepa_lab.analysis.features import Images
from rrepa_lab.analysis.noise import NoiseSamples
from rrepa_lab.checks import whole_number
from rrepa_lab.data.images import Batch
from rrepa_lab.data.subset import subset_words, whole
from rrepa_lab.errors import LabError
from rrepa_lab.flow.inputs import as_labels
from rrepa_lab.measurements.columns import about, accuracy
from rrepa_lab.runs.run import Run


class ClassificationReport(NamedTuple):
    """Tidy tables of one run, one method and one set of images; each says run, strategy, method and protocol.

    Example:
        >>> import rrepa_lab as rl
        >>> report = rl.classification_report(rl.load("digits-reverse"), images=rl.Images(limit=20))
        >>> report.summary.metric.tolist()
        ['gradient_accuracy', 'mean_confidence', 'expected_calibration_error']
    """

    summary: pd.DataFrame  # metric (accuracy, expected_calibration_error, mean_confidence), value, standard_error, n
    per_class: pd.DataFrame  # class, accuracy, n
    confusion: pd.DataFrame  # class, predicted, count: every pair of classes
    calibration: pd.DataFrame  # bin low and high, confidence and accuracy in it, n: bins that are not empty
    images: pd.DataFrame  # image (row), class, predicted, right, margin, confidence, runner_up


def classification_report(
    run: Run,
    method: str = "gradient",
    *,
    images: Images | None = None,
    bins: int = 10,
    noise: int | NoiseSamples | None = None,
    blocks: Collection[int] | None = None,
    ascent: Ascent | None = None,
    batch: int = 256,
) -> ClassificationReport:
    """Classify images and report the answers.

    Args:
        images: which, the test split by default; in their place a batch (x, y).
        bins: of equal width between confidence 0 and 1. Confidence is the probability of the answer
            (`Classification.probability`); the expected calibration error is the mean distance between confidence and
            accuracy over the bins, weighted by their images (arXiv 1706.04599).

    The other arguments, and the errors, are those of `classify`.

    Example:
        >>> import rrepa_lab as rl
        >>> report = rl.classification_report(rl.load("digits-reverse"), images=rl.Images(limit=50))
        >>> len(report.confusion), int(report.per_class.n.sum())
        (100, 50)
    """
    bins = whole_number("bins", bins, 1)
    (x, y), split = _batch(run, images or Images())
    given, settings = NoiseSamples.of(noise), Ascent() if ascent is None else ascent
    result = classify(run, x, method, noise=given, blocks=blocks, ascent=settings, batch=batch)
    y = as_labels(run.flow, y, len(x), run.classes, of="images")
    if bool((y < 0).any()):
        raise LabError("a classification is compared with labels: an image has none (-1)")
    answer, confidence = result.label.cpu(), result.probability.amax(dim=1).cpu()
    iterated = method == "iterated"
    protocol = {
        **about(run), "method": method, "split": split, "n_noise_samples": result.n_noise_samples,
        "noise_std": result.noise_std, "blocks": "all" if blocks is None else ",".join(map(str, sorted(blocks))),
        "steps": settings.steps if iterated else 1, "step_size": settings.step_size if iterated else float("nan"),
        "seed": given.seed,
    }  # fmt: skip
    calibration = _calibration(confidence, answer == y, bins)
    gap = float(((calibration["confidence"] - calibration["accuracy"]).abs() * calibration["n"]).sum() / len(y))
    summary = pd.DataFrame(
        [
            {"metric": f"{method}_accuracy", **accuracy(answer == y)},
            {"metric": "mean_confidence", "value": float(confidence.double().mean()), "n": len(y)},
            {"metric": "expected_calibration_error", "value": gap, "n": len(y)},
        ]
    )
    tables = (summary, *_counts(run.classes, y, answer), calibration, _images(run.classes, y, result))
    return ClassificationReport(*(table.assign(**protocol) for table in tables))


def _batch(run: Run, images: Images) -> tuple[Batch, str]:
    """The images with their labels, and what the tables say of them."""
    if images.limit is not None:
        whole_number("limit", images.limit, 1)
    if isinstance(images.data, Batch):
        if len(images.data.x) != len(images.data.y):
            raise LabError(f"{len(images.data.x)} images but {len(images.data.y)} labels")
        return images.data, "given"
    every = run.images(images.split) if images.data is None else images.data
    batch, split = whole(every, images.limit), images.split if images.data is None else "given"
    return batch, split if len(batch.y) == len(every) else f"{split}, {subset_words(len(batch.y), len(every))}"


def _images(names: list[str], y: Tensor, result: Classification) -> pd.DataFrame:
    """A row for each image."""
    answer, runner_up = result.label.cpu(), result.top(2).labels[:, -1].cpu()
    return pd.DataFrame({
        "image": range(len(y)), "class": [names[k] for k in y], "predicted": [names[k] for k in answer],
        "right": (answer == y).numpy(), "margin": result.margin.cpu().numpy(),
        "confidence": result.probability.amax(dim=1).cpu().numpy(), "runner_up": [names[k] for k in runner_up],
    })  # fmt: skip


def _counts(names: list[str], y: Tensor, answer: Tensor) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy by class, and the confusion matrix, one row a pair."""
    counts = torch.bincount(y * len(names) + answer, minlength=len(names) ** 2).view(len(names), -1)
    ids = range(len(names))
    per_class = [
        {"class": names[k], "accuracy": float(counts[k, k] / counts[k].sum()), "n": int(counts[k].sum())}
        for k in ids
        if counts[k].sum()
    ]
    confusion = [{"class": names[k], "predicted": names[m], "count": int(counts[k, m])} for k in ids for m in ids]
    return pd.DataFrame(per_class), pd.DataFrame(confusion)


def _calibration(confidence: Tensor, right: Tensor, bins: int) -> pd.DataFrame:
    place = (confidence * bins).long().clamp(max=bins - 1)
    rows = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            rows.append(
                {
                    "low": number / bins,
                    "high": (number + 1) / bins,
                    "confidence": float(confidence[inside].double().mean()),
                    "accuracy": float(right[inside].double().mean()),
                    "n": int(inside.sum()),
                }
            )
    return pd.DataFrame(rows)
