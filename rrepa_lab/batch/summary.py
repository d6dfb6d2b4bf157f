"""What a batch leaves at the top of its folder: tables, verdicts and a page."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from rrepa_lab.batch.cell import Task, finished
from rrepa_lab.batch.measured import with_also, with_new
from rrepa_lab.batch.study import Study, beside_table
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.compare import gather
from rrepa_lab.files import write_text
from rrepa_lab.measurements.claims import VERDICT_RULE, claim_lines, verdicts
from rrepa_lab.measurements.compare import Finding, markdown, tabulate
from rrepa_lab.measurements.curves import Curve
from rrepa_lab.measurements.results import NAME
from rrepa_lab.viz.comparison import report

DIGITS = "%.6g"


def summarise(study: Study, tasks: Iterable[Task], out: Path) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Write `out`/table.csv (mean and spread), measurements.csv (each one), table.md and report.html, and verdicts.csv if
    the study makes claims; returns table and verdicts. Finished cells of this grid enter, and those that the study's table of
    earlier sessions holds; with such a table a claim may be "not measured yet".

    Raises: LabError where the results cannot stand in one table, or do not cover a claim.
    """
    found, curves = _measured(study, list(tasks))
    table, each = tabulate(found), tabulate(found, over_seeds=False)
    decided = None
    if study.claims:
        more, their_curves = with_also(study)
        decided = verdicts(found + more, study.claims, curves + their_curves, partial=bool(study.measured))
    write_text(out / "table.csv", table.to_csv(index=False, float_format=DIGITS))
    write_text(out / "measurements.csv", each.to_csv(index=False, float_format=DIGITS))
    beside = {study.beside_title or study.beside: beside_table(study)} if study.beside else {}
    text = markdown(table)
    for title, other in beside.items():
        text += f"\n{title}\n\n{other.to_markdown(index=False, disable_numparse=True)}\n"
    if decided is not None:
        write_text(out / "verdicts.csv", decided.to_csv(index=False, float_format=DIGITS))
        text += f"\n{claims_markdown(decided)}\n"
    write_text(out / "table.md", text)
    write_text(out / "report.html", report(table, study.title or out.name, study.notes, decided, beside))
    return table, decided


def _measured(study: Study, tasks: list[Task]) -> tuple[list[Finding], list[Curve]]:
    """Single measurements, as they are written, and training curves."""
    if study.measured:
        every = with_new(study, tasks)
        if not len(every.rows):
            raise LabError("nothing of this study is measured yet")
        return every.findings(), every.training_curves()
    measured = gather(task.folder / NAME for task in tasks if finished(task))
    return [one._replace(value=float(DIGITS % one.value)) for one in measured], []  # verdicts are of the numbers written


def claims_markdown(decided: pd.DataFrame) -> str:
    """A list of the claims with their verdicts, and of the differences measured, with the rule of the verdicts."""
    return "\n".join([VERDICT_RULE, "", *claim_lines(decided)])
