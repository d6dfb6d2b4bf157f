"""Numbers checked where they come in: one line that names the argument, its range and the value that was given."""

import math
import operator
from collections.abc import Iterable
from typing import Any

from rrepa_lab.errors import LabError

LARGEST_SEED = 2**63 - 1  # what torch, numpy and a signed 64-bit integer all hold


def whole_number(name: str, value: Any, low: int = 0, high: int | None = None) -> int:
    """An integer in low..high, of Python, numpy or torch; LabError for anything else, a bool or 2.0 included."""
    try:
        if _is_bool(value):
            raise TypeError
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise LabError(f"{name} must be a whole number, {_range(low, high)}, not {_shown(value)}") from None
    if number < low or (high is not None and number > high):
        raise LabError(f"{name} must be {_range(low, high)}, not {number}")
    return number


def real_number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *, above: bool = False) -> float:
    """A finite number of at least `low` (more than it if `above`) and at most `high`; LabError for anything else."""
    if _is_bool(value) or isinstance(value, (str, bytes)):
        raise LabError(f"{name} must be a number {_bounds(low, high, above)}, not {_shown(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise LabError(f"{name} must be a number {_bounds(low, high, above)}, not {_shown(value)}") from None
    if not math.isfinite(number) or number < low or (above and number <= low) or number > high:
        finite = "" if math.isfinite(number) else " and finite"
        raise LabError(f"{name} must be {_bounds(low, high, above)}{finite}, not {_shown(value)}")
    return number


def seed_number(value: Any, name: str = "seed") -> int:
    """A seed: an integer in 0..2^63 - 1."""
    return whole_number(name, value, 0, LARGEST_SEED)


def seed_list(values: Any, name: str = "seeds") -> list[int]:
    """Seeds as a list: one integer, or any sequence, array or tensor of at least one."""
    one = isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0
    numbers: list[int] = []
    try:
        for value in [values] if one else values:
            numbers.append(seed_number(value))
    except LabError:
        message = f"{name} must be a list of integers >= 0 and below 2^63, such as [17, 18]: {_shown(value)} is none"
        raise LabError(message) from None
    if not numbers:
        raise LabError(f"{name} must be a list of integers >= 0, with one for each image: it is empty")
    return numbers


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _range(low: int, high: int | None) -> str:
    if high is not None:
        return f"in {low}..{high}" if low else f">= 0 and at most {high}"
    return f"at least {low}" if low else ">= 0"


def _bounds(low: float, high: float, above: bool) -> str:
    if low == -math.inf and high == math.inf:
        return "a number"
    text = f"{'>' if above else '>='} {low:g}"
    return text if high == math.inf else f"{text} and <= {high:g}"
