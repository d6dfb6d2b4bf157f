"""Training curves of a study, and how many steps one setting needs to reach the final value of another.

R-REPA claims 3.3 times fewer steps. Here both settings are trained for equally many steps, and the ratio is that of the first
step at which the one has the final value of the other, and of the first step at which the other has it itself.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rrepa_lab.errors import LabError

Direction = Literal["higher", "lower"]


class Curve(NamedTuple):
    """One metric of one training."""

    settings: Mapping[str, Any]  # dotted
    seed: int
    metric: str
    steps: Sequence[int]  # rising
    values: Sequence[float]


class StepRatio(NamedTuple):
    """Of one training seed."""

    seed: int
    target: float  # the final value of the reference
    reference_steps: float  # at which the reference has it
    steps: float  # at which the other has it; nan: not reached
    ratio: float  # reference_steps / steps; nan: not reached


def steps_to_reach(curve: Curve, target: float, ahead: Direction) -> float:
    """The first step at which a curve is at `target` or better, by linear interpolation; nan where it never is.

    A curve that is better from the start gives its first step: what lies before it was not measured.

    Args:
        ahead: which value is the better one.

    Raises: LabError for a curve without points, or whose steps do not rise.

    Example:
        >>> curve = Curve({}, 0, "held_out_accuracy", [100, 200, 300], [0.1, 0.2, 0.4])
        >>> steps_to_reach(curve, 0.3, "higher"), steps_to_reach(curve, 0.5, "higher")
        (250.0, nan)
    """
    steps, values = np.asarray(curve.steps, float), np.asarray(curve.values, float)
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if not len(steps) or (np.diff(steps) <= 0).any():
        raise LabError(f"the curve of {curve.metric} (seed {curve.seed}) needs points at rising steps, not {list(curve.steps)}")
    over = values - target if ahead == "higher" else target - values
    there = np.flatnonzero(over >= 0)
    if not len(there):
        return math.nan
    first = int(there[0])
    if first == 0:
        return float(steps[0])
    part = -over[first - 1] / (over[first] - over[first - 1])
    return float(steps[first - 1] + part * (steps[first] - steps[first - 1]))


def step_ratios(curves: Sequence[Curve], references: Sequence[Curve], ahead: Direction) -> list[StepRatio]:
    """For every training seed that both have: how many times fewer steps a curve needs to reach the reference's final value.

    Args:
        curves, references: of one metric, one for each seed.

    Raises: LabError where one of them has two curves of a seed.

    Example:
        >>> slow = Curve({}, 0, "held_out_accuracy", [100, 200], [0.1, 0.2])
        >>> fast = Curve({}, 0, "held_out_accuracy", [100, 200], [0.2, 0.4])
        >>> step_ratios([fast], [slow], "higher")[0].ratio
        2.0
    """
    by_seed, against = _by_seed(curves), _by_seed(references)
    found = []
    for seed in sorted(by_seed.keys() & against.keys()):
        reference = against[seed]
        finite = [value for value in reference.values if math.isfinite(value)]
        target = finite[-1] if finite else math.nan
        own = steps_to_reach(reference, target, ahead)
        steps = steps_to_reach(by_seed[seed], target, ahead)
        found.append(StepRatio(seed, target, own, steps, own / steps if steps > 0 else math.nan))
    return found


def _by_seed(curves: Sequence[Curve]) -> dict[int, Curve]:
    found = {curve.seed: curve for curve in curves}
    if len(found) < len(curves):
        raise LabError(f"several settings of the study fit the curves of {curves[0].metric}: say more about them")
    return found
