"""Claims written down before a study is run, and what its table says of them: reproduced, not reproduced, not testable."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import pandas as pd
from pydantic import Field, model_validator

from rrepa_lab.analysis.compare import Finding, as_text
from rrepa_lab.config import Config
from rrepa_lab.errors import LabError

CONFIDENCE = 0.95


class Contrast(Config):
    """Two settings of a study, by their dotted names: `better` is claimed to come out ahead of `than`."""

    better: dict[str, Any]
    than: dict[str, Any]


class Claim(Config):
    """One sentence of a paper, the figures it rests on, and the contrasts that would have to hold here."""

    claim: str
    source: str = Field("", description="where it is claimed, and with which figures")
    metric: str = ""
    ahead: Literal["higher", "lower"] = Field("higher", description="which value of the metric is the better one")
    contrasts: list[Contrast] = Field([], description="all must hold")
    not_testable: str = Field("", description="why this study cannot say")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if bool(self.not_testable) == bool(self.contrasts):
            raise ValueError(f"claim {self.claim!r} needs either contrasts or a reason in not_testable")
        if self.contrasts and not self.metric:
            raise ValueError(f"claim {self.claim!r} names no metric")
        return self


def verdicts(found: Sequence[Finding], claims: Sequence[Claim]) -> pd.DataFrame:
    """Hold claims against measurements.

    A contrast holds where the one-sided 95 % confidence bound of the mean difference, paired by training seed, lies on
    the claimed side of zero (Student's t): with three seeds the mean must be 1.7 standard deviations away from it. A
    claim is reproduced if all its contrasts hold. Many contrasts are tried at once; one in twenty holds by luck.

    Returns: a row for each contrast: claim, source, metric, better, than, difference (mean over seeds, in the unit of the
        metric, positive where the claim is right), sd, seeds, holds, and the verdict on its claim.

    Raises: LabError for a contrast whose settings were not measured with a common seed, or not unambiguously.
    """
    rows = []
    for claim in claims:
        if claim.not_testable:
            verdict = f"not testable here: {claim.not_testable}"
            rows.append({"claim": claim.claim, "source": claim.source, "verdict": verdict})
            continue
        parts = [_contrast(found, claim, contrast) for contrast in claim.contrasts]
        verdict = "reproduced" if all(part["holds"] for part in parts) else "not reproduced"
        told = {"claim": claim.claim, "source": claim.source, "metric": claim.metric}
        rows += [told | part | {"verdict": verdict} for part in parts]
    columns = ["claim", "source", "metric", "better", "than", "difference", "sd", "seeds", "holds", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _contrast(found: Sequence[Finding], claim: Claim, contrast: Contrast) -> dict[str, Any]:
    from scipy.stats import t

    better, than = (_by_seed(found, claim.metric, settings) for settings in (contrast.better, contrast.than))
    seeds = sorted(better.keys() & than.keys())
    if not seeds:
        raise LabError(f"claim {claim.claim!r}: {_told(contrast.better)} and {_told(contrast.than)} share no training seed")
    sign = 1 if claim.ahead == "higher" else -1
    differences = pd.Series([sign * (better[seed] - than[seed]) for seed in seeds])
    mean, sd = float(differences.mean()), float(differences.std())
    bound = mean - t.ppf(CONFIDENCE, len(seeds) - 1) * sd / math.sqrt(len(seeds)) if len(seeds) > 1 else float("-inf")
    return {
        "better": _told(contrast.better),
        "than": _told(contrast.than),
        "difference": mean,
        "sd": sd,
        "seeds": len(seeds),
        "holds": bool(bound > 0),
    }


def _by_seed(found: Sequence[Finding], metric: str, settings: Mapping[str, Any]) -> dict[int, float]:
    wanted = {key: str(as_text(value)) for key, value in settings.items()}
    chosen = [one for one in found if one.metric == metric and _fits(one, wanted)]
    values = {one.seed: one.value for one in chosen if one.seed is not None}
    if not chosen:
        raise LabError(f"the study has no {metric} for {_told(settings)}")
    if len(values) < len(chosen):
        raise LabError(f"{_told(settings)} fits several settings of the study: say more about it")
    return values


def _fits(one: Finding, wanted: Mapping[str, str]) -> bool:
    """Whether a finding has these settings, as they read in a table."""
    return all(key in one.settings and str(as_text(one.settings[key])) == text for key, text in wanted.items())


def _told(settings: Mapping[str, Any]) -> str:
    """ "reverse, blocks 3,4, layers 2", for the settings of a contrast."""
    parts = []
    for key, value in settings.items():
        text = str(as_text(value))
        parts.append(text if key == "align.strategy" else f"{key.removeprefix('align.')} {text}")
    return ", ".join(parts)
