"""Settings of sampling that are chosen on the validation split and reported on the test split."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pandas as pd

from rrepa_lab.data.splits import splits
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.evaluation.evaluate import evaluate_samples
from rrepa_lab.evaluation.run_samples import Sampling
from rrepa_lab.flow.condition import Guidance
from rrepa_lab.measurements.metrics import family_of, metric_of
from rrepa_lab.runs.run import Run

GUIDANCES = (0.0, 0.5, 1.0, 2.0, 3.0)
SEED_STEP = 1_000_000  # between the first seeds of the samples for validation and those for the test


def choose_sampling(
    run: Run,
    *,
    guidances: Sequence[float] = GUIDANCES,
    strengths: Sequence[float] = (1.0,),
    samples: int = 2000,
    by: str = "FD",
    annealed: bool = False,
    seed: int = 0,
    protocols: str | None = None,
) -> pd.DataFrame:
    """Scores of samples for every guidance and strength of denoising against the validation split; of the best against test.

    The best one is scored again with fresh samples, beside the first setting of both lists, so that the gain is not that of the
    choice.

    Args:
        guidances: weights; give the plain setting first, which the best one is compared with.
        strengths: of the denoising step.
        samples: of every setting.
        by: the family of metric that decides: FD, KD, sFD, precision, recall, label_agreement; its better direction counts.
        annealed: guidance that grows over the tokens.
        seed: of the first sample; those for the test begin a million later.
        protocols: of `rl.evaluate_samples`, one.

    Returns: the table of `rl.evaluate_samples` for every setting, split "val", and for the first and the chosen one, split
        "test", with the column chosen.

    Raises: LabError for a run without a validation split, a family that is not measured or has no better direction.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.choose_sampling(rl.load("digits-reverse"), guidances=[0.0, 1.0], samples=80)
        >>> table[table.chosen].split.unique().tolist()
        ['val', 'test']
    """
    if "val" not in splits(run.config.data):
        raise LabError(f"run {run.name!r} has no validation split, and test images must not decide: set data.holdout")
    grid = [Sampling(samples, seed, Guidance(weight, annealed), strength=one) for weight, one in product(guidances, strengths)]
    if not grid:
        raise LabError("give at least one guidance and one strength")
    tables = [evaluate_samples(run, how, split="val", protocols=protocols) for how in grid]
    values = [_value(table, by) for table in tables]
    better = metric_of(_metric(tables[0], by)).better
    if not better:
        raise LabError(f"of {by} neither a higher nor a lower value is better: choose by FD, KD or label_agreement")
    best = values.index(min(values) if better == "lower" else max(values))
    tables = [table.assign(chosen=place == best) for place, table in enumerate(tables)]
    for place in dict.fromkeys((0, best)):
        how = grid[place]
        fresh = Sampling(how.n, seed + SEED_STEP, how.guidance, how.denoise, how.strength)
        tables.append(evaluate_samples(run, fresh, split="test", protocols=protocols).assign(chosen=place == best))
    return pd.concat(tables, ignore_index=True)


def _metric(table: pd.DataFrame, family: str) -> str:
    names: list[Any] = table["metric"].tolist()
    for name in names:
        if family in (name, family_of(str(name))):
            return str(name)
    raise unknown("metric of samples", family, dict.fromkeys(family_of(str(name)) for name in names))


def _value(table: pd.DataFrame, family: str) -> float:
    return float(table.loc[table["metric"] == _metric(table, family), "value"].iloc[0])
