"""Which noise suits the images of a run best, decided on validation images."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from rrepa_lab.analysis.classify import classify
from rrepa_lab.analysis.noise import NoiseSamples, image_noise
from rrepa_lab.checks import whole_number
from rrepa_lab.data.splits import splits
from rrepa_lab.data.subset import subset_words, whole
from rrepa_lab.errors import LabError
from rrepa_lab.measurements.columns import about, accuracy
from rrepa_lab.runs.config import ReadConfig
from rrepa_lab.runs.run import Run

COUNTS = (0, 1, 4, 16)


def choose_read_noise(
    run: Run,
    *,
    counts: Sequence[int] = COUNTS,
    methods: Sequence[str] = ("gradient",),
    limit: int | None = 512,
    seed: int = 0,
    test: bool = False,
) -> pd.DataFrame:
    """Accuracy on the validation split for several numbers of noise samples, and which of them is chosen.

    The choice goes by the first method: the fewest samples that are not worse than the best number by more than one
    standard error of the paired difference over images.

    Args:
        counts: numbers of samples of the training noise to compare; 0 is clean images.
        methods: of `classify`; each gives a row for each number of samples.
        limit: validation images, class-balanced, seed 0.
        seed: of the noise.
        test: also report the first and the chosen number on as many test images, which took no part in the choice.

    Returns: columns run, strategy, data, space, encoder, train_seed, metric, n_noise_samples, noise_std, value, standard_error,
        n, split, protocol, chosen.

    Raises: LabError for a run without classes or without a validation split, and for numbers out of range.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.choose_read_noise(rl.load("digits-reverse"), counts=(0, 1), limit=20)
        >>> table.n_noise_samples.tolist(), int(table.chosen.sum())
        ([0, 1], 1)
    """
    if not run.flow.config.classes:
        raise LabError(f"run {run.name!r} has no classes: there is no accuracy to choose the noise of a reading by")
    if "val" not in splits(run.config.data):
        raise LabError(f"run {run.name!r} has no validation split, and test images must not decide: set data.holdout")
    if not counts or not methods:
        raise LabError("give at least one number of noise samples and one method")
    counts = [whole_number("noise samples", count) for count in counts]
    limit = None if limit is None else whole_number("limit", limit, 1)
    rows, right = _measured(run, "val", methods, counts, limit, seed)
    by_count = {count: right[methods[0], count] for count in counts}
    best = max(by_count.values(), key=lambda answers: float(answers.mean()))
    chosen = next(count for count in sorted(by_count) if _not_worse(by_count[count], best))
    if test:
        rows += _measured(run, "test", methods, list(dict.fromkeys((counts[0], chosen))), limit, seed)[0]
    return pd.DataFrame(rows).assign(chosen=lambda table: table["n_noise_samples"] == chosen)


def _measured(
    run: Run, split: str, methods: Sequence[str], counts: Sequence[int], limit: int | None, seed: int
) -> tuple[list[dict[str, Any]], dict[tuple[str, int], torch.Tensor]]:
    """A row for each method and number of samples, and which images are right (n,)."""
    images = run.images(split)
    x, y = whole(images, limit)
    rows, right = list[dict[str, Any]](), dict[tuple[str, int], torch.Tensor]()
    for method in methods:
        for count in counts:
            noise = image_noise(run, NoiseSamples(count, seed=seed))
            answers = classify(run, x, method, noise=NoiseSamples(count, seed=seed)).label.cpu() == y
            right[method, count] = answers.double()
            row = about(run) | {"metric": f"{method}_accuracy"} | noise.columns | accuracy(answers)
            words = f"{noise.words}, {subset_words(len(y), len(images))}"
            rows.append(row | {"n_noise_samples": count, "split": split, "protocol": words})
    return rows, right


def _not_worse(answers: torch.Tensor, best: torch.Tensor) -> bool:
    """Whether the mean of best - answers is within one standard error of 0."""
    lost = best - answers
    error = float(lost.std()) / len(lost) ** 0.5 if len(lost) > 1 else 0.0
    return float(lost.mean()) <= error


def save_read_noise(run: Run, table: pd.DataFrame) -> ReadConfig:
    """Make the choice of a table of `choose_read_noise` that of the run, and write it to its config.json.

    Raises: LabError for a run that is in no directory.
    """
    read = ReadConfig(n_noise_samples=int(table.loc[table["chosen"], "n_noise_samples"].iloc[0]))
    if run.directory is None:
        raise LabError("only a saved run can keep the noise of its readings: call run.save(directory) first")
    run.config = run.config.model_copy(update={"read": read})
    run.save_config(run.directory)
    return read
