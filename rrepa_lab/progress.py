"""Bars of progress on standard error."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_INTERVAL = 30.0  # seconds between two lines of progress where no terminal is attached


def progress(total: int, unit: str, silent: bool = False, label: str = "") -> "tqdm[Any]":
    """A bar with the remaining time; without a terminal, as in a log file, one line every half a minute.

    Args:
        label: what is made, before the numbers.
    """
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(total=total, unit=unit, desc=label or None, dynamic_ncols=True, disable=silent)
    line = f"{{desc}}{{n_fmt}}/{{total_fmt}} {unit}s, {{elapsed}} elapsed, {{remaining}} left{{postfix}}\n"
    return tqdm(
        total=total,
        unit=unit,
        desc=f"{label}: " if label else None,
        mininterval=LOG_INTERVAL,
        maxinterval=LOG_INTERVAL,
        bar_format=line,
        delay=LOG_INTERVAL,
        disable=silent,
    )
