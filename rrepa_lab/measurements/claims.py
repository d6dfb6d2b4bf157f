"""Claims written down before a study is run, and what its measurements say of them.

Three verdicts: reproduced, not reproduced, undecided; and "not testable here" for what a study cannot measure.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Self

import pandas as pd
from pydantic import Field, field_validator, model_validator

from rrepa_lab.config import Config
from rrepa_lab.errors import LabError
from rrepa_lab.measurements.compare import Finding, as_text
from rrepa_lab.measurements.curves import Curve, step_ratios
from rrepa_lab.measurements.metrics import present_metric

CONFIDENCE = 0.95
HOLDS, CONTRADICTED, UNDECIDED = "holds", "contradicted", "undecided"
NOT_MEASURED = "not measured yet"  # of a contrast and of a claim, where measurements come over several sessions
RATIO = "ratio of steps - 1"  # unit of the differences of a claim about steps
COLUMNS = (
    "claim", "source", "metric", "unit", "better", "than", "difference", "sd", "low", "high", "d_z", "seeds", "p", "p_holm",
    "outcome", "holds", "holds_holm", "verdict", "verdict_holm",
)  # fmt: skip

# how verdicts are reached, in the words of a report
VERDICT_RULE = (
    "Differences are paired by training seed, with a two-sided 95 % interval (Student's t); positive favours the claim. A "
    "contrast holds where the interval lies on the claimed side of zero, is contradicted where it lies on the other side, and "
    "is undecided where it contains zero. A claim is reproduced if all its contrasts hold, not reproduced if one is "
    "contradicted. d_z is the mean difference over its standard deviation; p (Holm) is corrected for all contrasts here."
)


class Contrast(Config):
    """Two settings of a study, by their dotted names: `better` is claimed to come out ahead of `than`."""

    better: dict[str, Any]
    than: dict[str, Any]

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.better == self.than:
            raise ValueError(f"a contrast compares two settings, and {_named(self.better)!r} stands on both sides")
        return self


class Claim(Config):
    """One sentence of a paper, the figures it rests on, and the contrasts that would have to hold here."""

    claim: str
    source: str = Field("", description="where it is claimed, and with which figures")
    metric: str = ""
    ahead: Literal["higher", "lower"] = Field("higher", description="which value of the metric is the better one")
    contrasts: list[Contrast] = Field([], description="all must hold")
    monotone: list[dict[str, Any]] = Field(
        [], description="settings in the claimed order, the best one last: every step from one to the next is a contrast"
    )
    fewer_steps: bool = Field(
        False, description="on the training curve of the metric `better` needs fewer steps to reach the final value of `than`"
    )
    not_testable: str = Field("", description="why this study cannot say")

    @field_validator("metric")
    @classmethod
    def _present_metric(cls, name: str) -> str:
        return present_metric(name)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if bool(self.not_testable) == bool(self.contrasts or self.monotone):
            raise ValueError(f"claim {self.claim!r} needs either contrasts or a reason in not_testable")
        if len(self.monotone) == 1:
            raise ValueError(f"claim {self.claim!r}: monotone has 1 setting and needs at least 2")
        if not self.not_testable and not self.metric:
            raise ValueError(f"claim {self.claim!r} names no metric")
        self.tested()
        return self

    def tested(self) -> list[Contrast]:
        """Every contrast that must hold: those listed, then the steps of `monotone`."""
        return [*self.contrasts, *(Contrast(better=better, than=than) for than, better in pairwise(self.monotone))]


def verdicts(
    found: Sequence[Finding], claims: Sequence[Claim], curves: Sequence[Curve] = (), partial: bool = False
) -> pd.DataFrame:
    """Compare claims with measurements.

    For each contrast the differences between its two settings are paired by training seed, and have a two-sided 95 %
    interval (Student's t with seeds - 1 degrees of freedom). The contrast holds where the interval lies wholly on the
    claimed side of zero, is contradicted where it lies wholly on the other side, and is undecided where it contains zero.
    With one seed there is no interval. A claim is reproduced if all its contrasts hold, not reproduced if at least one is
    contradicted, and undecided otherwise.

    Of many intervals one in twenty misses by chance; Holm's correction over all contrasts of the study (each pair of
    settings and metric counted once, those not measured yet too) stands beside them: a difference counts there if
    `p_holm` < 0.05.

    Differences that are equal for all seeds give an interval of width zero. That can be chance where a metric counts few
    images: use more seeds.

    A claim with `fewer_steps` compares `step_ratios` of the training curves: its differences are ratios - 1. Where some seeds
    do not reach the value it is undecided, and contradicted where none of several does.

    Args:
        found: single measurements.
        curves: training curves, for claims with `fewer_steps`.
        partial: a contrast whose settings were not both measured has the outcome "not measured yet", and so has its claim
            unless another contrast is contradicted; else it is an error.

    Returns: a row for each contrast with the columns claim, source, metric, unit, better, than; difference (mean over
        seeds, in the unit of the metric, positive where the claim is right), sd, low and high (the interval), d_z (effect
        size: Cohen's d of paired differences, difference / sd), seeds; p (two-sided), p_holm; outcome ("holds",
        "contradicted", "undecided"), holds, holds_holm; verdict and verdict_holm of its claim. What one seed cannot
        give is nan; a claim that is not testable has one row, without a contrast.

    Raises: LabError for a contrast whose settings were not measured with a common seed (unless `partial`), or not
        unambiguously.
    """
    rows: list[dict[str, Any]] = []
    for number, claim in enumerate(claims):
        about = {"number": number, "claim": claim.claim, "source": claim.source}
        if claim.not_testable:
            verdict = f"not testable here: {claim.not_testable}"
            rows.append(about | {"verdict": verdict, "verdict_holm": verdict})
        else:
            for contrast in claim.tested():
                try:
                    row = _fewer_steps(curves, claim, contrast) if claim.fewer_steps else _contrast(found, claim, contrast)
                except _NotMeasuredError:
                    if not partial:
                        raise
                    row = _unmeasured(contrast)
                rows.append(about | {"metric": _measured_by(claim)} | row)
    _correct(rows)
    for number, claim in enumerate(claims):
        own = [row for row in rows if row["number"] == number]
        if not claim.not_testable:
            single = any(row["seeds"] == 1 for row in own)
            given = {"verdict": _verdict([row["outcome"] for row in own], single)}
            given["verdict_holm"] = _verdict([_outcome_holm(row) for row in own], single)
            for row in own:
                row.update(given)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def verdict_table(found: pd.DataFrame) -> pd.DataFrame:
    """A table of `verdicts` as text for a page or a terminal, claim and verdict once for all rows of a claim.

    Columns: verdict, claim, source, metric, better, than, difference (with its 95 % interval), d_z, seeds, p, p (Holm),
    outcome, with Holm (the verdict under the correction).
    """
    again = found["claim"].duplicated()
    shown = pd.DataFrame({name: found[name].mask(again) for name in ("verdict", "claim", "source")})
    shown = shown.assign(**{name: found[name] for name in ("metric", "better", "than")})
    shown["difference"] = [difference(row) if isinstance(row["better"], str) else "" for row in found.to_dict("records")]
    shown["d_z"] = [_number(value, "+.2f") for value in found["d_z"]]
    shown["seeds"] = [_number(value, ".0f") for value in found["seeds"]]
    shown["p"] = [_number(value, ".3g") for value in found["p"]]
    shown["p (Holm)"] = [_number(value, ".3g") for value in found["p_holm"]]
    shown["outcome"] = found["outcome"]
    shown["with Holm"] = found["verdict_holm"].mask(again)
    return shown.fillna("")


def difference(row: Mapping[Any, Any]) -> str:
    """Difference, interval and unit of a row of `verdicts`: "+0.0123 [+0.0045, +0.0201] fraction"."""
    if math.isnan(row["difference"]):
        return str(row["unit"])
    text = f"{row['difference']:+.3g}"
    if not math.isnan(row["low"]):
        text += f" [{row['low']:+.3g}, {row['high']:+.3g}]"
    return f"{text} {row['unit']}".rstrip()


def claim_lines(found: pd.DataFrame) -> list[str]:
    """The same in lines of text: a list item for each claim with its verdict, and below it one for each contrast."""
    lines = []
    for _, rows in found.groupby("claim", sort=False):
        first = rows.iloc[0]
        source = f" ({first['source']})" if first["source"] else ""
        lines.append(f"- **{first['verdict']}**: {first['claim']}{source}")
        if isinstance(first["better"], str):
            lines[-1] += f"; with Holm's correction: {first['verdict_holm']}"
        for row in rows.to_dict("records"):
            if row["outcome"] == NOT_MEASURED:
                lines.append(f"  - {row['outcome']}: {row['better']} against {row['than']}: {row['metric']}")
            elif isinstance(row["better"], str):
                facts = [f"{row['metric']} {difference(row)}", f"{row['seeds']:.0f} seed{'s' if row['seeds'] > 1 else ''}"]
                if row["seeds"] > 1:
                    facts += [f"d_z {row['d_z']:+.2f}", f"p {row['p']:.3g}", f"p (Holm) {row['p_holm']:.3g}"]
                lines.append(f"  - {row['outcome']}: {row['better']} against {row['than']}: {', '.join(facts)}")
    return lines


def _number(value: float, form: str) -> str:
    return "" if pd.isna(value) else f"{value:{form}}"


class _NotMeasuredError(LabError):
    """A contrast without measurements."""


def _measured_by(claim: Claim) -> str:
    return f"steps[{claim.metric}]" if claim.fewer_steps else claim.metric


def _contrast(found: Sequence[Finding], claim: Claim, contrast: Contrast) -> dict[str, Any]:
    better, than = (_by_seed(found, claim.metric, settings) for settings in (contrast.better, contrast.than))
    seeds = sorted(better.keys() & than.keys())
    if not seeds:
        raise _no_common_seed(claim, contrast)
    sign = 1 if claim.ahead == "higher" else -1
    differences = [sign * (better[seed].value - than[seed].value) for seed in seeds]
    return _tested(contrast, differences, better[seeds[0]].unit)


def _fewer_steps(curves: Sequence[Curve], claim: Claim, contrast: Contrast) -> dict[str, Any]:
    better, than = (
        [one for one in curves if one.metric == claim.metric and _fits(one.settings, settings)]
        for settings in (contrast.better, contrast.than)
    )
    ratios = step_ratios(better, than, claim.ahead)
    if not ratios:
        raise _no_common_seed(claim, contrast)
    reached = [one.ratio - 1 for one in ratios if math.isfinite(one.ratio)]
    if len(reached) == len(ratios):
        return _tested(contrast, reached, RATIO)
    row = _tested(
        contrast, reached or [math.nan], f"{RATIO}; not reached with {len(ratios) - len(reached)} of {len(ratios)} seeds"
    )
    outcome = CONTRADICTED if not reached and len(ratios) > 1 else UNDECIDED
    return row | {"seeds": len(ratios), "low": math.nan, "high": math.nan, "p": math.nan, "outcome": outcome, "holds": False}


def _no_common_seed(claim: Claim, contrast: Contrast) -> LabError:
    return _NotMeasuredError(
        f"claim {claim.claim!r}: {_named(contrast.better)} and {_named(contrast.than)} share no training seed in which "
        f"{claim.metric} was measured"
    )


def _tested(contrast: Contrast, paired: Sequence[float], unit: str) -> dict[str, Any]:
    """The row of a contrast from its differences, one for each seed."""
    from scipy.stats import t

    differences = pd.Series(list(paired))
    count, mean, sd = len(differences), float(differences.mean()), float(differences.std())
    low = high = p = d_z = math.nan
    if count > 1:
        error = sd / math.sqrt(count)
        half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
        low, high = mean - half, mean + half
        d_z = mean / sd if sd else math.copysign(math.inf, mean) if mean else 0.0
        p = 2 * float(t.sf(abs(mean) / error, count - 1)) if sd else float(mean == 0)
    outcome = HOLDS if low > 0 else CONTRADICTED if high < 0 else UNDECIDED
    return _named_sides(contrast) | {
        "unit": unit,
        "difference": mean,
        "sd": sd,
        "low": low,
        "high": high,
        "d_z": d_z,
        "seeds": count,
        "p": p,
        "outcome": outcome,
        "holds": outcome == HOLDS,
    }


def _unmeasured(contrast: Contrast) -> dict[str, Any]:
    nothing = dict.fromkeys(("difference", "sd", "low", "high", "d_z", "p"), math.nan)
    return _named_sides(contrast) | nothing | {"unit": "", "seeds": 0, "outcome": NOT_MEASURED, "holds": False}


def _named_sides(contrast: Contrast) -> dict[str, Any]:
    return {"better": _named(contrast.better), "than": _named(contrast.than)}


def _correct(rows: list[dict[str, Any]]) -> None:
    """Add p_holm and holds_holm to the rows of contrasts: Holm 1979, one hypothesis for each pair of settings and metric.

    One without a p, for example because it is not measured yet, counts in the size of the family all the same: a study that
    is measured in part is corrected as it will be when it is whole, or a verdict could be lost by measuring more.
    """
    contrasts = [row for row in rows if "outcome" in row]
    size = len(set(map(_hypothesis, contrasts)))
    tested = {_hypothesis(row): row["p"] for row in contrasts if not math.isnan(row["p"])}
    adjusted, largest = dict[Any, float](), 0.0
    for rank, (key, p) in enumerate(sorted(tested.items(), key=lambda item: item[1])):
        largest = adjusted[key] = max(largest, min(1.0, (size - rank) * p))
    for row in contrasts:
        row["p_holm"] = adjusted.get(_hypothesis(row), math.nan)
        row["holds_holm"] = _outcome_holm(row) == HOLDS


def _hypothesis(row: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    return row["metric"], frozenset((row["better"], row["than"]))


def _outcome_holm(row: Mapping[str, Any]) -> str:
    if row["outcome"] == NOT_MEASURED:
        return NOT_MEASURED
    if not row["p_holm"] < 1 - CONFIDENCE:
        return UNDECIDED
    return HOLDS if row["difference"] > 0 else CONTRADICTED


def _verdict(outcomes: Sequence[str], single: bool) -> str:
    """Of the outcomes of all contrasts of a claim; `single`: whether one of them rests on one seed."""
    if CONTRADICTED in outcomes:
        return "not reproduced"
    if NOT_MEASURED in outcomes:
        return NOT_MEASURED
    if all(outcome == HOLDS for outcome in outcomes):
        return "reproduced"
    return "undecided: one seed" if single else UNDECIDED


def _by_seed(found: Sequence[Finding], metric: str, settings: Mapping[str, Any]) -> dict[int, Finding]:
    """The measurement of each training seed; a value that does not exist (nan) is none."""
    chosen = [one for one in found if one.metric == metric and _fits(one.settings, settings)]
    values = {one.seed: one for one in chosen if one.seed is not None}
    if not chosen:
        raise _NotMeasuredError(f"the study has no {metric} for {_named(settings)}")
    if len(values) < len(chosen):
        raise LabError(f"{_named(settings)} fits several settings of the study: say more about it")
    return {seed: one for seed, one in values.items() if math.isfinite(one.value)}


def _fits(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether the settings of a finding or curve are these, as they read in a table."""
    return all(key in found and str(as_text(found[key])) == str(as_text(value)) for key, value in wanted.items())


def _named(settings: Mapping[str, Any]) -> str:
    """ "reverse, blocks 3,4, layers 2", for the settings of a contrast."""
    parts = []
    for key, value in settings.items():
        text = str(as_text(value))
        parts.append(text if key == "align.strategy" else f"{key.removeprefix('align.')} {text}")
    return ", ".join(parts)
