"""Intervals over samples or images, by bootstrap; the spread over training seeds is another thing and never part of them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from rrepa_lab.data.loaders import generator

CONFIDENCE = 0.95
NORMAL = 1.96  # its quantile
RESAMPLES = 1000  # of a mean over images
COSTLY = 50  # of a statistic that takes a decomposition of matrices
_PURPOSE = 77  # of the random numbers


def mean_interval(values: Tensor, seed: int = 0, over: str = "images") -> dict[str, Any]:
    """Columns low, high and interval of the mean of values (n,): percentiles of 1,000 bootstrap means.

    Of answers (bool) that are all equal it is the exact binomial interval (Clopper and Pearson).

    Args:
        over: what the values are of, for `interval`.

    Example:
        >>> found = mean_interval(torch.arange(100.0))
        >>> found["low"] < 49.5 < found["high"], found["interval"]
        (True, '95 % over images, bootstrap 1000')
    """
    x = values.detach().double().cpu()
    if values.dtype == torch.bool and float(x.mean()) in (0.0, 1.0):  # all resamples of it are equal
        exact = binomtest(int(x.sum()), len(x)).proportion_ci(CONFIDENCE)
        return {"low": float(exact.low), "high": float(exact.high), "interval": _words(over, "exact binomial")}
    means = torch.stack([x[rows].mean() for rows in resampled(len(x), RESAMPLES, seed)])
    tail = (1 - CONFIDENCE) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return {"low": low, "high": high, "interval": _words(over, f"bootstrap {RESAMPLES}")}


def statistic_interval(
    value: float, statistic: Callable[[Tensor], float], n: int, seed: int = 0, resamples: int = COSTLY
) -> dict[str, Any]:
    """The same of a statistic of n samples: value -/+ 1.96 standard deviations over bootstrap resamples.

    A Fréchet distance of a resample, which repeats samples, is larger than that of the samples: percentiles would not hold the
    value. The standard deviation is not concerned.

    Args:
        statistic: of rows (n,), drawn with replacement.
    """
    found = torch.tensor([statistic(rows) for rows in resampled(n, resamples, seed)], dtype=torch.float64)
    return around(value, float(found.std()), f"bootstrap {resamples}")


def around(value: float, standard_error: float, how: str) -> dict[str, Any]:
    """Columns low, high and interval of a value with a standard error over samples."""
    if not math.isfinite(standard_error):
        return {}
    half = NORMAL * standard_error
    return {"low": value - half, "high": value + half, "interval": _words("samples", how)}


def resampled(n: int, times: int, seed: int) -> Iterator[Tensor]:
    """Rows (n,) drawn with replacement, again and again."""
    draws = generator(seed, _PURPOSE)
    for _ in range(times):
        yield torch.randint(n, (n,), generator=draws)


def _words(over: str, how: str) -> str:
    return f"{CONFIDENCE:.0%} over {over}, {how}".replace("%", " %")
