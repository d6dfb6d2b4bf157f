"""Tables of the report about evaluation: the named protocols, what was measured under them, and what they cost."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from rrepa_lab.evaluation.networks.named import INCEPTION
from rrepa_lab.evaluation.protocols import FD, PROTOCOLS, SFD
from rrepa_lab.measurements.metrics import metric_of
from rrepa_lab.studies.report_text import markdown, study_table

REFERENCES = {"split": "the split that is scored", "train": "training split", "file": "a published file, or one that is named"}


def protocols() -> str:
    """The named protocols."""
    rows = []
    for one in PROTOCOLS.values():
        inception = one.network == INCEPTION
        names = {FD: "FID", SFD: "sFID"} if inception else {}
        metrics = ", ".join(f"`{names.get(name, name)}[{one.name if inception else 'network'}]`" for name in one.metrics)
        reference = REFERENCES[one.reference] + (", each picture and its mirror image" if one.mirrored else "")
        count = f"{one.samples:,}" if one.samples else "2,000 by default"
        rows.append([f"`{one.name}`", metrics, one.network or "an encoder", reference, one.labels, count])
    return markdown(("protocol", "metrics", "network", "reference", "labels", "samples"), rows)


def measured(name: str, runs: bool) -> str:
    """Value and interval of every metric of a table of `rl.evaluate`, a column for each run where there are several."""
    table = study_table(name)
    order = list(dict.fromkeys(table["run"])) if runs else [table["run"].iloc[0]]
    rows = []
    for metric in dict.fromkeys(table["metric"]):
        found: dict[Any, dict[Any, Any]] = {row["run"]: row for row in table[table["metric"] == metric].to_dict("records")}
        one = metric_of(str(metric))
        rows.append([f"`{metric}`", *(_cell(found.get(run)) for run in order), one.unit, f"{found[order[0]]['n']:.0f}"])
    return markdown(("metric", *(f"`{run}`" for run in order), "unit", "n"), rows)


def _cell(row: dict[Any, Any] | None) -> str:
    if row is None:
        return "-"
    text = f"{row['value']:.4g}"
    return text if pd.isna(row["low"]) else f"{text} [{row['low']:.3g}, {row['high']:.3g}]"


def costs() -> str:
    """Pictures a second, and hours for 50,000 samples."""
    rows = []
    for row in study_table("bench-evaluation").to_dict("records"):
        rate = "-" if pd.isna(row["pictures_per_second"]) else f"{row['pictures_per_second']:.3g}"
        hours = "-" if pd.isna(row["hours_for_50000"]) else f"{row['hours_for_50000']:.2g}"
        rows.append([row["what"], row["case"], f"{row['seconds']:.3g}", rate, hours])
    return markdown(("of", "step", "seconds for 64 pictures (distance: once)", "pictures/s", "hours for 50,000"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "evaluation-protocols": protocols,
    "evaluation-digits": lambda: measured("evaluation-digits", True),
    "evaluation-cifar10": lambda: measured("evaluation-cifar10", False),
    "bench-evaluation": costs,
}
