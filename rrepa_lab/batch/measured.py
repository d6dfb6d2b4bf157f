"""What was measured of a study in earlier sessions: a CSV file beside the study file, and its training curves beside that.

    <name>.csv           a row for each cell, training seed, metric and protocol
    <name>-curves.csv    a row for each cell, training seed, metric and step

A cell is recognised by the parameters that the study gives it, kept as JSON in the column `parameters`. Cells that the file
holds are not run again, and table and verdicts of a batch are of them and of the new cells. The file is one that `rl.compare`
reads, too. No path of a machine is in it.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rrepa_lab.batch.cell import Record, Task, finished
from rrepa_lab.batch.study import GridCell, Study, cells, load_study
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.compare import gather
from rrepa_lab.files import write_text
from rrepa_lab.measurements.compare import UNSET, Finding, as_text
from rrepa_lab.measurements.curves import Curve
from rrepa_lab.measurements.results import NAME, read_result
from rrepa_lab.readers import MissingFileError, read_table

# settings that every table has; others are those that the claims name, or that differ within a `settings` of the grid
USUAL_SETTINGS = (
    "align.strategy", "align.blocks", "align.layers", "align.weight", "align.refinements", "align.projector", "align.sharing",
    "align.target", "align.teacher", "align.labels", "align.schedule", "align.similarity", "encoder.model",
)  # fmt: skip
ROW = (
    "source", "train_seed", "metric", "value", "unit", "n", "protocol", "low", "high", "interval", "version",
    "training_seconds", "seconds", "parameters",
)  # fmt: skip
CURVE_ROW = ("source", "train_seed", "step", "metric", "value")
_NUMBERS = ("value", "low", "high", "training_seconds", "seconds")
_DIGITS = 6


class Measured(NamedTuple):
    """Both tables, every cell as text."""

    rows: pd.DataFrame
    curves: pd.DataFrame

    @property
    def cells(self) -> set[str]:
        """The identities of the cells that are in it, see `GridCell.identity`."""
        return set(self.rows["parameters"])

    def findings(self) -> list[Finding]:
        """The measurements."""
        found = []
        for row in self.rows.to_dict("records"):
            seed, n = (int(row[name]) if row[name] else None for name in ("train_seed", "n"))
            value = float(row["value"] or "nan")
            settings = _settings(row, self.rows)
            found.append(Finding(row["source"], settings, seed, row["metric"], value, row["unit"], n, row["protocol"]))
        return found

    def training_curves(self) -> list[Curve]:
        """The curves, points in the order of their steps."""
        found = []
        for (_, seed, metric), part in self.curves.groupby(["source", "train_seed", "metric"], sort=False):
            points = sorted((int(step), float(value)) for step, value in zip(part["step"], part["value"], strict=True))
            steps, values = zip(*points, strict=True)
            settings = _settings(part.iloc[0].to_dict(), self.curves)
            found.append(Curve(settings, int(str(seed)), str(metric), steps, values))
        return found


def read_measured(study: Study, planned: Sequence[GridCell]) -> Measured:
    """The tables of a study; empty ones where nothing is kept yet.

    Args:
        planned: cells of the study: the rows must be of these.

    Raises: LabError for a damaged table, a row without a place in the study (it names the parameters that differ), and a
        measurement that is there twice.
    """
    empty = Measured(pd.DataFrame(columns=list(ROW)), pd.DataFrame(columns=list(CURVE_ROW)))
    if not study.measured:
        return empty
    path = Path(study.measured)
    rows, curves = _read(path, ROW), _read(curves_path(path), CURVE_ROW)
    if rows is None:
        return empty
    _check_rows(path, rows, planned)
    if curves is None:
        return Measured(rows, empty.curves)
    _check_curves(curves_path(path), curves)
    # a session that ended between the two files left curves of a cell that does not count as measured
    return Measured(rows, curves[curves["source"].isin(set(rows["source"]))].reset_index(drop=True))


def curves_path(path: Path) -> Path:
    """Where the training curves of a table are."""
    return path.with_name(f"{path.stem}-curves.csv")


def with_new(study: Study, tasks: Iterable[Task]) -> Measured:
    """What is kept, and the finished cells of a batch that are not; in the order of the study.

    A cell that is kept is not replaced. Raises: LabError as `read_measured`.
    """
    tasks = list(tasks)
    return _with_new(read_measured(study, [task.cell for task in tasks]), study, tasks)


def _with_new(kept: Measured, study: Study, tasks: Sequence[Task]) -> Measured:
    known = kept.cells
    new = [(task, record) for task in tasks if task.cell.identity not in known and (record := finished(task))]
    if not new:
        return kept
    rows, curves = list[dict[str, Any]](), list[dict[str, Any]]()
    for task, record in new:
        of_cell, its_curves = _rows_of(study, task, record)
        rows, curves = rows + of_cell, curves + its_curves
    places = {task.cell.name: place for place, task in enumerate(tasks)}
    return Measured(_merge(kept.rows, rows, ROW, places), _merge(kept.curves, curves, CURVE_ROW, places))


def with_also(study: Study) -> tuple[list[Finding], list[Curve]]:
    """The measurements and curves of the studies that a study names in `also`; LabError as `read_measured`."""
    found, curves = list[Finding](), list[Curve]()
    for source in study.also:
        other, notebook = load_study(source)
        kept = read_measured(other, cells(other, notebook))
        found, curves = found + kept.findings(), curves + kept.training_curves()
    return found, curves


def keep(study: Study, tasks: Iterable[Task]) -> int:
    """Add the finished cells of a batch to the tables of its study; returns how many were added.

    To do it again changes nothing. Raises: LabError for a study that names no table, or one that is damaged.
    """
    if not study.measured:
        raise LabError(f"study {study.title!r} names no table of its measurements: add `measured: NAME.csv` to its file")
    tasks = list(tasks)
    before = read_measured(study, [task.cell for task in tasks])
    after = _with_new(before, study, tasks)
    added = len(after.cells - before.cells)
    if added:  # the curves first: a cell counts as measured once it is in the other table
        path = Path(study.measured)
        write_text(curves_path(path), after.curves.to_csv(index=False, lineterminator="\n"))
        write_text(path, after.rows.to_csv(index=False, lineterminator="\n"))
    return added


def setting_names(study: Study) -> list[str]:
    """The settings under comparison, by their dotted names: the usual ones, those in claims, those of a grid's dictionaries."""
    names = list(USUAL_SETTINGS)
    for claim in study.claims:
        for contrast in claim.tested():
            names += [*contrast.better, *contrast.than]
    for axes in study.grid:
        for values in axes.values():
            listed = values if isinstance(values, list) else [values]
            names += [str(name) for value in listed if isinstance(value, Mapping) for name in value]
    return list(dict.fromkeys(names))


# --- writing ----------------------------------------------------------------------------------------------------------


def _rows_of(study: Study, task: Task, record: Record) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of both tables of a finished cell."""
    path = task.folder / NAME
    result = read_result(path)
    found = gather(path) if result.measurements else []
    names = setting_names(study)
    rows = []
    for one, row in zip(found, result.measurements, strict=True):
        given = {name: _text(one.settings.get(name, UNSET)) for name in dict.fromkeys([*names, *row.settings])}
        rows.append(
            given
            | {"source": task.cell.name, "train_seed": _text(one.seed), "metric": one.metric, "value": _text(one.value)}
            | {"unit": one.unit, "n": _text(one.n), "protocol": one.protocol}
            | {"low": _text(row.low), "high": _text(row.high), "interval": row.interval, "version": result.version}
            | {"training_seconds": _text(_seconds(result.facts)), "seconds": _text(round(record.seconds))}
            | {"parameters": task.cell.identity}
        )
    if not rows:
        raise LabError(f"{path} holds no measurement: its cell cannot be kept")
    _check_twice(path, pd.DataFrame(rows))
    common = {name: rows[0][name] for name in (*names, "source", "train_seed")}
    return rows, [common | point for point in _points(path, result.facts.get("curve", []))]


def _points(path: Path, curve: Any) -> list[dict[str, str]]:
    """The points of a curve as it stands in the facts of a result."""
    try:
        points = [(int(one["step"]), str(one["metric"]), float(one["value"])) for one in curve]
    except (TypeError, KeyError, ValueError):
        raise LabError(f"{path}: its curve must be a list of objects with step, metric and value") from None
    return [
        {"step": str(step), "metric": metric, "value": _text(value)} for step, metric, value in points if math.isfinite(value)
    ]


def _seconds(facts: Mapping[str, Any]) -> float | None:
    value = facts.get("training_seconds")
    return round(float(value)) if isinstance(value, int | float) else None


def _text(value: Any) -> str:
    """A value in a table: numbers with six digits, nothing as an empty text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(as_text(value))


def _merge(kept: pd.DataFrame, new: list[dict[str, Any]], last: Sequence[str], places: Mapping[str, int]) -> pd.DataFrame:
    """Kept and new rows in the order of the cells; a setting that a row does not have is "-"."""
    sources = {row["source"] for row in new}
    parts = [kept[~kept["source"].isin(sources)], pd.DataFrame(new)]
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    if table.empty:
        return kept
    settings = [str(name) for name in dict.fromkeys([*kept.columns, *table.columns]) if name not in last]
    table = table.reindex(columns=[*settings, *last])
    table[settings] = table[settings].fillna(UNSET)
    order = table["source"].map(places).sort_values(kind="stable").index
    return table.loc[order].reset_index(drop=True).fillna("")


# --- reading ----------------------------------------------------------------------------------------------------------


def _settings(row: Mapping[Any, Any], table: pd.DataFrame) -> dict[str, Any]:
    names = list(table.columns)[: list(table.columns).index("source")]
    return {str(name): row[name] for name in names if row[name] != UNSET}


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame | None:
    try:
        return read_table(path, columns, dtype=str, keep_default_na=False)
    except MissingFileError:
        return None


def _check_rows(path: Path, rows: pd.DataFrame, cells: Sequence[GridCell]) -> None:
    known = {cell.identity: cell for cell in cells}
    for line, row in enumerate(rows.to_dict("records"), start=2):
        _check_numbers(f"{path}, line {line}", row, _NUMBERS, ("train_seed", "n"))
        identity = row["parameters"]
        try:
            given = json.loads(identity)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise LabError(f"{path}, line {line} is damaged: its parameters are not a JSON object")
        if identity not in known or known[identity].name != row["source"]:
            raise LabError(f"{path}, line {line} is of no cell of the study: {_difference(row['source'], given, cells)}")
    _check_twice(path, rows)


def _check_curves(path: Path, curves: pd.DataFrame) -> None:
    for line, row in enumerate(curves.to_dict("records"), start=2):
        _check_numbers(f"{path}, line {line}", row, ("value",), ("train_seed", "step"))
        if not row["value"] or not row["step"]:
            raise LabError(f"{path}, line {line} is damaged: a point needs step and value")
    twice = curves.duplicated(["source", "train_seed", "metric", "step"])
    if twice.any():
        raise LabError(f"{path}, line {int(twice.to_numpy().argmax()) + 2} is there twice: a curve has one value at a step")


def _check_numbers(where: str, row: Mapping[Any, Any], numbers: Sequence[str], integers: Sequence[str]) -> None:
    for name in (*numbers, *integers):
        try:
            _ = (int if name in integers else float)(row[name] or "0")
        except (ValueError, TypeError):
            raise LabError(f"{where} is damaged: {name} is {str(row[name])[:40]!r}") from None


def _check_twice(path: Path, rows: pd.DataFrame) -> None:
    settings = list(rows.columns)[: list(rows.columns).index("source")]
    twice = rows.duplicated(["parameters", *settings, "train_seed", "metric", "protocol"])
    if twice.any():
        row = rows[twice].iloc[0]
        raise LabError(f"{path} has {row['metric']} of {row['source']} twice under one protocol")


def _difference(source: str, given: Mapping[str, Any], cells: Sequence[GridCell]) -> str:
    """In which parameters stored ones differ from those of the cell of that name."""
    same = [cell for cell in cells if cell.name == source]
    if not same:
        return f"the study has no cell {source!r}; is it the table of another study?"
    wanted = same[0].given
    listed = [
        f"{name} is {_shown(given, name)} there and {_shown(wanted, name)} in the study"
        for name in dict.fromkeys([*wanted, *given])
        if given.get(name) != wanted.get(name) or (name in given) != (name in wanted)
    ]
    return (
        f"{source}: {', '.join(listed)}; remove its rows, or restore the study" if listed else f"{source} is written otherwise"
    )


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "not given"
