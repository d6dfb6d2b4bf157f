"""Bars of progress on standard error."""

import sys
import time
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_INTERVAL = 30.0  # seconds between two lines of progress where no terminal is attached


@cache
def _bar_class() -> "type[tqdm[Any]]":
    from tqdm import tqdm

    class Bar(tqdm):
        """Its clock starts with the first units: what came before them says nothing about the time that is left.

        Before them pictures are decoded, or a training is resumed.
        """

        def update(self, n: float | None = 1) -> bool | None:
            """Count units; the first ones are not timed."""
            if self.n == 0 and not self.disable:
                self.initial = self.n = self.last_print_n = n or 0
                self.start_t = self.last_print_t = time.time()
                return None
            return super().update(n)

    return Bar


def progress(total: int, unit: str, silent: bool = False, label: str = "") -> "tqdm[Any]":
    """A bar with the remaining time; without a terminal, as in a log file, one line every half a minute.

    Args:
        label: what is made, before the numbers.
    """
    if sys.stderr.isatty():
        return _bar_class()(total=total, unit=unit, desc=label or None, dynamic_ncols=True, disable=silent)
    line = f"{{desc}}{{n_fmt}}/{{total_fmt}} {unit}s, {{elapsed}} elapsed, {{remaining}} left{{postfix}}\n"
    return _bar_class()(
        total=total,
        unit=unit,
        desc=f"{label}: " if label else None,
        mininterval=LOG_INTERVAL,
        maxinterval=LOG_INTERVAL,
        bar_format=line,
        delay=LOG_INTERVAL,
        disable=silent,
    )
