"""What a batch leaves at the top of its folder: tables, verdicts and a page."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from rrepa_lab.batch.cell import Task, finished
from rrepa_lab.batch.study import Study
from rrepa_lab.evaluation.compare import gather
from rrepa_lab.files import write_text
from rrepa_lab.measurements.claims import JUDGED, claim_lines, verdicts
from rrepa_lab.measurements.compare import markdown, tabulate
from rrepa_lab.measurements.results import NAME
from rrepa_lab.readers import read_table
from rrepa_lab.viz.comparison import report

DIGITS = "%.6g"


def summarise(study: Study, tasks: Iterable[Task], out: Path) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Write `out`/table.csv (mean and spread), measurements.csv (each one), table.md and report.html, and verdicts.csv if
    the study makes claims; returns table and verdicts. Only finished cells of this grid enter.

    Raises: LabError where the results cannot stand in one table, or do not cover a claim.
    """
    found = gather(task.folder / NAME for task in tasks if finished(task))
    table, each = tabulate(found), tabulate(found, over_seeds=False)
    judged = verdicts(found, study.claims) if study.claims else None
    write_text(out / "table.csv", table.to_csv(index=False, float_format=DIGITS))
    write_text(out / "measurements.csv", each.to_csv(index=False, float_format=DIGITS))
    beside = {study.beside_title or study.beside: read_table(Path(study.beside), dtype=str)} if study.beside else {}
    text = markdown(table)
    for title, other in beside.items():
        text += f"\n{title}\n\n{other.to_markdown(index=False, disable_numparse=True)}\n"
    if judged is not None:
        write_text(out / "verdicts.csv", judged.to_csv(index=False, float_format=DIGITS))
        text += f"\n{claims_markdown(judged)}\n"
    write_text(out / "table.md", text)
    write_text(out / "report.html", report(table, study.title or out.name, study.notes, judged, beside))
    return table, judged


def claims_markdown(judged: pd.DataFrame) -> str:
    """A list of the claims with their verdicts, and of the differences measured, with how they are judged."""
    return "\n".join([JUDGED, "", *claim_lines(judged)])
