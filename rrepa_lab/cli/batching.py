"""Commands that run many and set them side by side: batch, compare."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.printing import hint, print_json, print_rows, write_csv
from rrepa_lab.cli.words import add_command, add_output, add_set
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_text

if TYPE_CHECKING:
    import pandas as pd

    from rrepa_lab.batch.driver import CellReport
    from rrepa_lab.batch.notebook import Notebook
    from rrepa_lab.batch.study import Study


def register(commands: Any) -> None:
    """Add these commands."""
    batch = add_command(commands, "batch", _batch, "Run a notebook for every cell of a grid; the same command goes on.")
    batch.add_argument("what", metavar="NOTEBOOK|STUDY.yaml", help="path, or the name of a bundled notebook or study")
    batch.add_argument(
        "--grid", action="append", default=[], metavar="NAME=VALUES", help="an axis: strategy=none,reverse or seed=0..2"
    )
    add_set(batch, "the same for every cell: quick=false")
    batch.add_argument("--out", help="folder of the batch")
    batch.add_argument("--jobs", type=int, help="notebooks at a time on this machine (none: one for each core)")
    batch.add_argument("--threads", type=int, help="of each notebook (none: the cores are shared among the jobs)")
    batch.add_argument("--scheduler", metavar="ADDRESS", help="run on a Dask cluster instead: tcp://host:8786")
    batch.add_argument("--timeout", type=float, help="seconds that one run of the notebook may take")
    batch.add_argument("--dry-run", action="store_true", help="list the cells, and stop")

    compare = add_command(commands, "compare", _compare, "Set runs, batches and results of notebooks side by side.")
    compare.add_argument("sources", nargs="+", metavar="DIR", help="folder with results, run directory, or name of a run")
    compare.add_argument("--each", action="store_true", help="a row for each measurement, not the mean over training seeds")
    compare.add_argument("--apart", action="store_true", help="give each protocol of a metric a column of its own")
    add_output(compare, "--csv", metavar="FILE", help="also write the tidy table, protocol columns included")
    add_output(compare, "--markdown", metavar="FILE", help="also write a Markdown table, one row a setting")
    add_output(compare, "--html", metavar="FILE", help="also write a page with figures that stands alone")


# --- batch ------------------------------------------------------------------------------------------------------------


def _batch(given: argparse.Namespace) -> int:
    from tqdm import tqdm

    from rrepa_lab.batch.cell import finished
    from rrepa_lab.batch.driver import plan, run_batch
    from rrepa_lab.batch.summary import summarise

    study, notebook = _asked(given)
    if given.out is None and not given.dry_run:
        raise LabError("where shall the results go? add --out runs/NAME")
    tasks = plan(study, notebook, given.out or "runs")
    if given.dry_run:
        rows = [
            {"cell": task.cell.name, "state": "done" if given.out and finished(task) else "to run"}
            | (task.cell.parameters if given.json else {})
            for task in tasks
        ]
        print_rows(rows, given.json)
        waiting = sum(row["state"] == "to run" for row in rows)
        hint(given, f"{len(rows)} cells of {notebook.name}, {waiting} to run; without --dry-run they are")
        return 0
    reports = []
    before = sum(finished(task) is not None for task in tasks)
    with tqdm(total=len(tasks), initial=before, unit="run", disable=None, dynamic_ncols=True) as bar:
        for report in run_batch(study, notebook, given.out, jobs=given.jobs, threads=given.threads, scheduler=given.scheduler):
            reports.append(report)
            if report.state != "skipped":
                bar.write(f"{report.state} in {report.seconds:.0f} s: {report.name}", file=sys.stderr)
                bar.update()
    table, judged, problem = None, None, ""
    try:
        table, judged = summarise(study, tasks, Path(given.out))
    except LabError as error:
        problem = str(error)
    failed = [report for report in reports if report.state == "failed"]
    if given.json:
        print_json([_facts(report) for report in reports])
    else:
        _tell(reports, failed, given.out, problem)
        if table is not None:
            from rrepa_lab.measurements.compare import wide

            print_rows(wide(table).to_dict("records"), False)
            if judged is not None:
                _tell_verdicts(judged)
            hint(given, f"tables and a page are in {given.out}: table.csv, table.md, report.html")
    return 1 if failed or problem else 0


def _asked(given: argparse.Namespace) -> "tuple[Study, Notebook]":
    """The study of a file, or the one that the options describe; --set and --timeout change either."""
    from rrepa_lab.batch.notebook import find_notebook, read_notebook
    from rrepa_lab.batch.study import Study, load_study, parse_grid
    from rrepa_lab.paths import assets

    what = str(given.what)
    is_study = what.endswith((".yaml", ".yml")) or (assets() / "studies" / f"{what}.yaml").is_file()
    if is_study:
        study, notebook = load_study(what)
        if given.grid:
            raise LabError("a study file brings its own grid: leave out --grid, or name the notebook instead")
    else:
        notebook = read_notebook(find_notebook(what))
        study = Study(notebook=what, grid=[parse_grid(notebook, given.grid)])
    changes: dict[str, Any] = {}
    if given.set:
        changes["parameters"] = study.parameters | dict(_parameter(notebook, text) for text in given.set)
    if given.timeout is not None:
        changes["timeout"] = given.timeout
    return Study.from_dict(study.to_dict() | changes), notebook


def _parameter(notebook: "Notebook", text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise LabError(f"--set takes NAME=VALUE, for example quick=false, not {text!r}")
    return name, notebook.parameter(name).parse(value)


def _tell(reports: "list[CellReport]", failed: "list[CellReport]", out: str, problem: str) -> None:
    count = {state: sum(report.state == state for report in reports) for state in ("done", "skipped", "failed")}
    print(f"{count['done']} run, {count['skipped']} done before, {count['failed']} failed\n")
    for report in failed:
        assert report.failure is not None
        print(f"failed: {report.name}\n  {report.failure.kind}: {report.failure.message}")
        if report.failure.source:
            print("  in the cell\n" + "\n".join(f"  | {line}" for line in report.failure.source.splitlines()))
        print(f"  executed so far: {report.folder / 'notebook.ipynb'}\n")
    if failed:
        print("the same command tries them again\n")
    if problem and len(failed) < len(reports):
        print(f"no table: {problem}")


def _tell_verdicts(judged: "pd.DataFrame") -> None:
    from rrepa_lab.measurements.claims import JUDGED, claim_lines

    print("\n" + "\n".join([*(line.replace("**", "") for line in claim_lines(judged)), "", JUDGED]))


def _facts(report: "CellReport") -> Mapping[str, Any]:
    return {
        "cell": report.name,
        "state": report.state,
        "seconds": report.seconds,
        "folder": str(report.folder),
        "failure": report.failure.to_dict() if report.failure else None,
    }


# --- compare ----------------------------------------------------------------------------------------------------------


def _compare(given: argparse.Namespace) -> int:
    from rrepa_lab.evaluation.compare import gather
    from rrepa_lab.measurements.compare import markdown, tabulate, wide

    found = gather(given.sources)
    try:
        table = tabulate(found, apart=given.apart)
        each = tabulate(found, over_seeds=False, apart=given.apart)
    except LabError as error:
        raise LabError(f"{error}; --apart gives each a column of its own") from None
    shown = each if given.each else table
    write_csv(given.csv, shown)
    if given.markdown:
        write_text(Path(given.markdown), markdown(table))
    if given.html:
        from rrepa_lab.viz.comparison import report

        write_text(Path(given.html), report(table, "Comparison of " + ", ".join(given.sources)))
    if given.json:
        print_json(shown.to_dict("records"))
    elif given.each:
        print_rows(shown.drop(columns="protocol").to_dict("records"), False)
    else:
        print_rows(wide(table).to_dict("records"), False)
        from rrepa_lab.measurements.compare import protocols

        hint(given, protocols(table))
    return 0
