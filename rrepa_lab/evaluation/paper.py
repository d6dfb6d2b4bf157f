"""The numbers of the R-REPA paper, and of flows beside it, as findings that can stand beside measured ones.

Each table of `assets/paper` is a CSV of one number a row: the settings by their dotted names, metric, value, unit, n, and the
protocol, "unknown" where the paper is silent. Its metrics are called FID[paper], sFID[paper], IS[paper] and accuracy[paper]:
none of them was measured under a protocol of the kit.
"""

from pathlib import Path

import pandas as pd

from rrepa_lab.errors import unknown
from rrepa_lab.measurements.compare import Finding
from rrepa_lab.measurements.metrics import family_of
from rrepa_lab.paths import assets
from rrepa_lab.readers import read_table

ALIASES = {"paper-table-1": "alignment-strategies-imagenet64"}
ALL_BLOCKS = "1,2,3,4,5,6,7,8"
_METRIC = ("metric", "value", "unit", "n")
_PROTOCOL = ("network", "reference", "labels", "resize", "bytes", "guidance", "finish", "protocol")


def paper_tables() -> list[str]:
    """The names that `paper_findings` takes."""
    return sorted([*ALIASES, *(path.stem for path in (assets() / "paper").glob("*.csv"))])


def published_table(name: str) -> pd.DataFrame:
    """A published table as it is printed, as text: the settings that differ, then a column for each metric.

    Accuracies are in percent. A setting that a row does not have is "-", and all eight blocks are "all".

    Raises: LabError for an unknown name.

    Example:
        >>> published_table("main-imagenet64").to_dict("list")
        {'strategy': ['none', 'reverse'], 'FID': ['4.21', '3.69'], 'sFID': ['5.34', '4.34']}
    """
    found = paper_findings(name)
    keys = [key for key in dict.fromkeys(key for one in found for key in one.settings) if len(_values(found, key)) > 1]
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for one in found:
        place = tuple(one.settings.get(key, "-").replace(ALL_BLOCKS, "all") for key in keys)
        family = family_of(one.metric)
        shown = f"{100 * one.value:.2f}" if family == "accuracy" else f"{one.value:.2f}"
        rows.setdefault(place, {})["accuracy, %" if family == "accuracy" else family] = shown
    titles = [key.rsplit(".", 1)[-1] for key in keys]
    return pd.DataFrame([dict(zip(titles, place, strict=True)) | cells for place, cells in rows.items()])


def _values(found: list[Finding], key: str) -> set[str]:
    """The values of a setting among the rows that have it."""
    return {one.settings[key] for one in found if key in one.settings}


def paper_findings(name: str) -> list[Finding]:
    """The numbers of a published table.

    Raises: LabError for an unknown name.

    Example:
        >>> found = paper_findings("main-imagenet64")
        >>> [(one.settings["align.strategy"], one.metric, one.value) for one in found][:2]
        [('none', 'FID[paper]', 4.21), ('none', 'sFID[paper]', 5.34)]
    """
    if name not in paper_tables():
        raise unknown("published table", name, paper_tables())
    path: Path = assets() / "paper" / f"{ALIASES.get(name, name)}.csv"
    found = []
    for row in read_table(path, ("source", *_METRIC, *_PROTOCOL), dtype=str, keep_default_na=False).to_dict("records"):
        keys = [str(key) for key in row if str(key) not in ("source", *_METRIC, *_PROTOCOL)]
        settings = {key: row[key] for key in keys if row[key]}
        parts = [str(row["protocol"]), *(f"{key} {row[key]}" for key in _PROTOCOL[:-1])]
        n = int(row["n"]) if str(row["n"]).isdecimal() else None
        value = float(row["value"])
        found.append(Finding(row["source"], settings, None, row["metric"], value, row["unit"], n, "; ".join(parts)))
    return found
