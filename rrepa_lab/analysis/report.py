"""Classification over a set of images: accuracy by class, confusion, calibration, and every image for a look at mistakes."""

from collections.abc import Collection
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.analysis.classify import classify
from rrepa_lab.checks import whole_number
from rrepa_lab.data.images import Batch
from rrepa_lab.data.subset import subset_words, whole
from rrepa_lab.errors import LabError
from rrepa_lab.flow.inputs import as_labels
from rrepa_lab.measurements.columns import about, accuracy
from rrepa_lab.runs.run import Run


class ClassificationReport(NamedTuple):
    """Tidy tables of one run, one method and one set of images; each says run, strategy, method and protocol."""

    summary: pd.DataFrame  # metric (accuracy, expected_calibration_error, mean_confidence), value, standard_error, n
    per_class: pd.DataFrame  # class, accuracy, n
    confusion: pd.DataFrame  # class, predicted, count: every pair of classes
    calibration: pd.DataFrame  # bin low and high, confidence and accuracy in it, n: bins that are not empty
    images: pd.DataFrame  # image (row), class, predicted, right, margin, confidence, runner_up


def classification_report(
    run: Run,
    method: str = "gradient",
    *,
    split: str = "test",
    data: Batch | None = None,
    limit: int | None = None,
    bins: int = 10,
    draws: int | None = None,
    noise_std: float | None = None,
    blocks: Collection[int] | None = None,
    steps: int = 20,
    step_size: float = 0.3,
    seed: int = 0,
    batch: int = 256,
) -> ClassificationReport:
    """Classify a split and report the answers.

    Of `data` (images in [-1, 1] with labels) if it is given, or of `limit` images of the split, class-balanced (seed 0).

    Args:
        bins: of equal width between confidence 0 and 1. Confidence is the probability of the answer
            (`Classification.probability`); the expected calibration error is the mean distance between confidence and
            accuracy over the bins, weighted by their images (arXiv 1706.04599).

    The other arguments, and the errors, are those of `classify`.
    """
    bins = whole_number("bins", bins, 1)
    if limit is not None:
        limit = whole_number("limit", limit, 1)
    if data is None:
        every = run.images(split)
        data, read = whole(every, limit), split
        if len(data.y) < len(every):
            read = f"{split}, {subset_words(len(data.y), len(every))}"
    else:
        read = "given"
    x, y = data
    if len(x) != len(y):
        raise LabError(f"{len(x)} images but {len(y)} labels")
    result = classify(
        run, x, method, draws=draws, noise_std=noise_std, blocks=blocks, steps=steps, step_size=step_size, seed=seed,
        batch=batch,
    )  # fmt: skip
    y = as_labels(run.flow, y, len(x), run.classes, of="images")
    if bool((y < 0).any()):
        raise LabError("a classification is held against labels: an image has none (-1)")
    answer, confidence = result.label.cpu(), result.probability.amax(dim=1).cpu()
    right = answer == y
    names = run.classes
    iterated = method == "iterated"
    protocol = {
        **about(run), "method": method, "split": read, "draws": result.draws, "noise_std": result.noise_std,
        "blocks": "all" if blocks is None else ",".join(map(str, sorted(blocks))), "steps": steps if iterated else 1,
        "step_size": step_size if iterated else float("nan"), "seed": seed,
    }  # fmt: skip
    runner_up = result.top(2).labels[:, -1].cpu()
    images = pd.DataFrame({
        "image": range(len(y)), "class": [names[k] for k in y], "predicted": [names[k] for k in answer], "right": right.numpy(),
        "margin": result.margin.cpu().numpy(), "confidence": confidence.numpy(), "runner_up": [names[k] for k in runner_up],
    })  # fmt: skip
    calibration = _calibration(confidence, right, bins)
    gap = float(((calibration["confidence"] - calibration["accuracy"]).abs() * calibration["n"]).sum() / len(y))
    summary = pd.DataFrame(
        [
            {"metric": f"{method}_accuracy", **accuracy(right)},
            {"metric": "mean_confidence", "value": float(confidence.double().mean()), "n": len(y)},
            {"metric": "expected_calibration_error", "value": gap, "n": len(y)},
        ]
    )
    counts = torch.bincount(y * len(names) + answer, minlength=len(names) ** 2).view(len(names), -1)
    ids = range(len(names))
    per_class = [
        {"class": names[k], "accuracy": float(counts[k, k] / counts[k].sum()), "n": int(counts[k].sum())}
        for k in ids
        if counts[k].sum()
    ]
    confusion = [{"class": names[k], "predicted": names[m], "count": int(counts[k, m])} for k in ids for m in ids]
    tables = (summary, pd.DataFrame(per_class), pd.DataFrame(confusion), calibration, images)
    return ClassificationReport(*(table.assign(**protocol) for table in tables))


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
