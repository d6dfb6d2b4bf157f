"""`rrepa-lab batch`: run a notebook for every cell of a parameter grid."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.arguments import Commands, add_command, add_set
from rrepa_lab.cli.printing import hint, print_json, print_rows
from rrepa_lab.errors import LabError

if TYPE_CHECKING:
    import pandas as pd

    from rrepa_lab.batch.cell import Task
    from rrepa_lab.batch.driver import CellReport
    from rrepa_lab.batch.notebook import Notebook
    from rrepa_lab.batch.study import Study

MEASURED = "measured before"  # state of a cell that the table of its study holds


def register(commands: Commands) -> None:
    """Add the command."""
    batch = add_command(
        commands, "batch", run, "Run a notebook for every cell of a parameter grid; the same command resumes it."
    )
    batch.add_argument("source", metavar="NOTEBOOK|STUDY.yaml", help="path, or the name of a bundled notebook or study")
    batch.add_argument(
        "--grid", action="append", default=[], metavar="NAME=VALUES", help="an axis: strategy=none,reverse or seed=0..2"
    )
    add_set(batch, "a parameter of every cell: quick=false")
    batch.add_argument("--out", help="folder of the batch")
    batch.add_argument("--jobs", type=int, help="number of notebooks run in parallel (none: one per core)")
    batch.add_argument("--threads", type=int, help="per notebook (none: the cores divided by the jobs)")
    batch.add_argument("--scheduler", metavar="ADDRESS", help="run on a Dask cluster instead: tcp://host:8786")
    batch.add_argument("--timeout", type=float, help="seconds that one run of the notebook may take")
    batch.add_argument(
        "--keep",
        action="store_true",
        help="add each cell that ends to the CSV file that the study names (measured: NAME.csv)",
    )
    batch.add_argument("--dry-run", action="store_true", help="list the cells, without running them")


def run(args: argparse.Namespace) -> int:
    """Run the cells that are neither done nor measured before, and print the table of results.

    Status 1 if a cell failed or there is no table.
    """
    from rrepa_lab.batch.driver import plan
    from rrepa_lab.batch.measured import read_measured
    from rrepa_lab.batch.summary import summarise

    study, notebook = _study(args)
    if args.out is None and not args.dry_run:
        raise LabError("an output folder is required: add --out runs/NAME")
    tasks = plan(study, notebook, args.out or "runs")
    before = read_measured(study, [task.cell for task in tasks]).cells
    if args.dry_run:
        _print_cells(args, study, tasks, before)
        return 0
    reports = _execute(args, study, notebook, tasks, before)
    table, verdicts, problem = None, None, ""
    try:
        table, verdicts = summarise(study, tasks, Path(args.out))
    except LabError as error:
        problem = str(error)
    if args.json:
        print_json([_facts(report) for report in reports])
    else:
        _print_outcome(reports, problem)
        if table is not None:
            _print_results(args, table, verdicts)
    return 1 if problem or any(report.state == "failed" for report in reports) else 0


def _study(args: argparse.Namespace) -> "tuple[Study, Notebook]":
    """The study of a YAML file, or the one that the options describe; --set and --timeout change either."""
    from rrepa_lab.batch.notebook import find_notebook, read_notebook
    from rrepa_lab.batch.study import Study, load_study, parse_grid
    from rrepa_lab.paths import assets

    source = str(args.source)
    is_study = source.endswith((".yaml", ".yml")) or (assets() / "studies" / f"{source}.yaml").is_file()
    if is_study:
        study, notebook = load_study(source)
        if args.grid:
            raise LabError("a study file has its own grid: leave out --grid, or name the notebook instead")
    else:
        notebook = read_notebook(find_notebook(source))
        study = Study(notebook=source, grid=[parse_grid(notebook, args.grid)])
    changes: dict[str, Any] = {}
    if args.set:
        changes["parameters"] = study.parameters | dict(_parse_parameter(notebook, text) for text in args.set)
    if args.timeout is not None:
        changes["timeout"] = args.timeout
    return _check_table(args, Study.from_dict(study.to_dict() | changes)), notebook


def _check_table(args: argparse.Namespace, study: "Study") -> "Study":
    """The study; without its table of measurements where --set makes other cells of it than those that are kept there."""
    from rrepa_lab.batch.notebook import PLACES

    changed = [name for name in (text.partition("=")[0] for text in args.set) if name not in PLACES]
    if args.keep and not study.measured:
        raise LabError("--keep needs a study file that names its table: measured: NAME.csv")
    if args.keep and changed:
        raise LabError(
            f"--keep takes the cells of the study as they are: leave out --set {changed[0]}, or change the study file"
        )
    if study.measured and changed:
        hint(args, f"--set {changed[0]} makes other cells than those of {Path(study.measured).name}, which is left aside")
        return study.model_copy(update={"measured": ""})
    return study


def _parse_parameter(notebook: "Notebook", text: str) -> tuple[str, Any]:
    """Name and value of "quick=false", by the type that the parameter has in the notebook."""
    name, sign, value = text.partition("=")
    if not sign:
        raise LabError(f"--set takes NAME=VALUE, for example quick=false, not {text!r}")
    return name, notebook.parameter(name).parse(value)


def _print_cells(args: argparse.Namespace, study: "Study", tasks: "list[Task]", before: set[str]) -> None:
    """--dry-run: every cell, measured before, done or to run; with --json its parameters too."""
    from rrepa_lab.batch.cell import finished

    states = [
        MEASURED if task.cell.identity in before else "done" if args.out and finished(task) else "to run" for task in tasks
    ]
    rows = [
        {"cell": task.cell.name, "state": state} | (task.cell.parameters if args.json else {})
        for task, state in zip(tasks, states, strict=True)
    ]
    print_rows(rows, args.json)
    kept = f"{states.count(MEASURED)} {MEASURED} ({Path(study.measured).name}), " if study.measured else ""
    name, waiting = tasks[0].notebook.stem, states.count("to run")
    hint(args, f"{len(rows)} cells of {name}, {kept}{waiting} to run; leave out --dry-run to run them")


def _execute(
    args: argparse.Namespace, study: "Study", notebook: "Notebook", tasks: "list[Task]", before: set[str]
) -> "list[CellReport]":
    """Run the cells with a progress bar; a report of every cell, those done or measured before included."""
    from tqdm import tqdm

    from rrepa_lab.batch.cell import finished
    from rrepa_lab.batch.driver import run_batch
    from rrepa_lab.batch.measured import keep

    reports = []
    done = sum(task.cell.identity in before or finished(task) is not None for task in tasks)
    options = {"jobs": args.jobs, "threads": args.threads, "scheduler": args.scheduler}
    if args.keep:  # what an interrupted batch left in the folder
        keep(study, tasks)
    with tqdm(total=len(tasks), initial=done, unit="run", disable=None, dynamic_ncols=True) as bar:
        for report in run_batch(study, notebook, args.out, measured=before, **options):
            reports.append(report)
            if report.state not in ("skipped", "measured"):
                bar.write(f"{report.state} in {report.seconds:.0f} s: {report.name}", file=sys.stderr)
                bar.update()
            if args.keep and report.state == "done":
                keep(study, tasks)
    return reports


def _print_outcome(reports: "list[CellReport]", problem: str) -> None:
    """Counts, the error of every cell that failed, and why there is no table."""
    states = ("done", "skipped", "measured", "failed")
    count = {state: sum(report.state == state for report in reports) for state in states}
    kept = f"{count['measured']} {MEASURED}, " if count["measured"] else ""
    print(f"{count['done']} run, {count['skipped']} done before, {kept}{count['failed']} failed\n")
    for report in reports:
        if report.failure is not None:
            print(f"failed: {report.name}\n  {report.failure.kind}: {report.failure.message}")
            if report.failure.source:
                print("  in the cell\n" + "\n".join(f"  | {line}" for line in report.failure.source.splitlines()))
            print(f"  executed so far: {report.folder / 'notebook.ipynb'}\n")
    if count["failed"]:
        print("the same command runs them again\n")
    if problem and count["failed"] < len(reports):
        print(f"no table: {problem}")


def _print_results(args: argparse.Namespace, table: "pd.DataFrame", verdicts: "pd.DataFrame | None") -> None:
    from rrepa_lab.measurements.compare import wide

    print_rows(wide(table).to_dict("records"), False)
    if verdicts is not None:
        print_verdicts(verdicts)
    hint(args, f"tables and a page are in {args.out}: table.csv, table.md, report.html")


def print_verdicts(verdicts: "pd.DataFrame") -> None:
    """The claims of a study, one line each, and how they were tested; `verdicts` is a table of `analysis.claims.verdicts`."""
    from rrepa_lab.measurements.claims import VERDICT_RULE, claim_lines

    print("\n" + "\n".join([*(line.replace("**", "") for line in claim_lines(verdicts)), "", VERDICT_RULE]))


def _facts(report: "CellReport") -> Mapping[str, Any]:
    return {
        "cell": report.name,
        "state": report.state,
        "seconds": report.seconds,
        "folder": str(report.folder),
        "failure": report.failure.to_dict() if report.failure else None,
    }
