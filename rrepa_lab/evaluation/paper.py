"""The numbers of the R-REPA paper, and of flows beside it, as findings that can stand beside measured ones.

Each table of `assets/paper` is a CSV of one number a row: the settings by their dotted names, metric, value, unit, n, and the
protocol, "unknown" where the paper is silent. Its metrics are called FID[paper], sFID[paper], IS[paper] and accuracy[paper]:
none of them was measured under a protocol of the kit.
"""

from pathlib import Path

from rrepa_lab.errors import unknown
from rrepa_lab.measurements.compare import Finding
from rrepa_lab.paths import assets
from rrepa_lab.readers import read_table

ALIASES = {"paper-table-1": "alignment-strategies-imagenet64"}
_METRIC = ("metric", "value", "unit", "n")
_PROTOCOL = ("network", "reference", "labels", "resize", "bytes", "guidance", "finish", "protocol")


def paper_tables() -> list[str]:
    """The names that `paper_findings` takes."""
    return sorted([*ALIASES, *(path.stem for path in (assets() / "paper").glob("*.csv"))])


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
