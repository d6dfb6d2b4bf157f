"""How the reports write a number: mean and spread, difference and interval, Markdown tables; see `report`."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import pandas as pd

from rrepa_lab.measurements.spread import spread_text
from rrepa_lab.paths import assets
from rrepa_lab.readers import read_table


@cache
def study_table(name: str) -> pd.DataFrame:
    """A committed table; texts stay texts."""
    texts = ("align.blocks", "align.layers", "blocks", "layers", "other", "size")
    return read_table(assets() / "studies" / f"{name}.csv", dtype=dict.fromkeys(texts, str))


def markdown(titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    lines = [list(titles), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(_line(line) for line in lines)


def _line(cells: list[str]) -> str:
    return f"|{'|'.join(cells)}|" if set(cells) == {"---"} else f"| {' | '.join(cells)} |"


def spread(values: "pd.Series[float]", digits: int) -> str:
    """Mean ± sample standard deviation."""
    return spread_text(float(values.mean()), float(values.std()), f".{digits}f")


def cell(row: "Mapping[Any, Any] | pd.Series[Any]", digits: int) -> str:
    """The same of a row with `value` and `sd`."""
    return spread_text(row["value"], row["sd"], f".{digits}f")


def interval(row: Mapping[Any, Any], digits: int, name: str = "difference") -> str:
    """A difference with its 95 % interval."""
    return f"{plain(row[name], digits)} [{plain(row['low'], digits)}, {plain(row['high'], digits)}]"


def plain(value: float, digits: int) -> str:
    """Fixed digits, without a sign on zero."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def between(values: Iterable[float], digits: int) -> str:
    """Smallest to largest: "0.010 to 0.017"."""
    every = list(values)
    return f"{plain(min(every), digits)} to {plain(max(every), digits)}"
