"""The result.json that every notebook ends with: what was measured, on which runs, under which protocol.

One schema for notebooks, batches, `rl.compare` and the page.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field, field_validator

from rrepa_lab import __version__
from rrepa_lab.config import Config
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_text
from rrepa_lab.measurements.metrics import present_metric
from rrepa_lab.measurements.schema import COLUMNS
from rrepa_lab.paths import runs_root
from rrepa_lab.readers import MissingFileError, read_json, validate
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.run import Run

NAME = "result.json"
FORMAT = 1
# columns of a tidy table that say which run it is, and what was found; all others are settings or protocol
_IDENTITY = {"run", "strategy", "data", "encoder", "train_seed"}
_FOUND = {
    "metric", "value", "unit", "n", "protocol", "standard_error", "low", "high", "interval", "device", "floor", "above_floor",
    "best_tap",
}  # fmt: skip


def present_protocol(text: str) -> str:
    """A protocol with the present names of columns: version 0.1 wrote "draws 4" for "n_noise_samples 4"."""
    return re.sub(r"(^|; )draws (?=\d)", r"\1n_noise_samples ", text)


class Measurement(Config):
    """One number, with all that is needed to hold it against another."""

    run: str = Field("", description="name of the run, a key of Result.runs; empty if none was measured")
    settings: dict[str, Any] = Field({}, description="what was varied beside the run: guidance, tap")
    metric: str
    value: float | None = Field(description="None where the measurement does not exist")
    unit: str = ""
    n: int | None = Field(None, description="images or samples it is taken over")
    low: float | None = Field(None, description="lower end of its interval over images or samples, if there is one")
    high: float | None = Field(None, description="upper end")
    interval: str = Field("", description="of low and high: over what, and how")
    protocol: str = Field("", description="split, noise, seeds, evaluator: all that must agree to be compared")

    @field_validator("metric")
    @classmethod
    def _present_metric(cls, name: str) -> str:
        return present_metric(name)

    @field_validator("protocol")
    @classmethod
    def _present_columns(cls, text: str) -> str:
        return present_protocol(text)


class Result(Config):
    """What a notebook found."""

    format: int = FORMAT
    version: str = Field(description="of rrepa_lab")
    notebook: str
    runs: dict[str, RunConfig] = Field({}, description="name of a run -> its configuration")
    measurements: list[Measurement] = Field([], description="in the order of the notebook's tables")
    facts: dict[str, Any] = Field({}, description="anything else worth keeping")


def out_folder(out_dir: str, notebook: str) -> Path:
    """The folder a notebook writes to: `out_dir`, or runs/notebooks/<notebook> where none was given."""
    return Path(out_dir) if out_dir else runs_root() / "notebooks" / notebook


def write_result(
    out: Path | str,
    notebook: str,
    table: pd.DataFrame | Sequence[pd.DataFrame] = (),
    runs: Iterable[Run] = (),
    by: Sequence[str] = (),
    **facts: Any,
) -> pd.DataFrame:
    """Write `out`/result.json, atomically.

    Args:
        table: tidy tables of rl.evaluate, rl.probe, rl.similarity and the like: columns metric, value and any others.
        runs: the runs that `table` speaks of by name.
        by: columns of `table` that are settings under comparison ("guidance", "tap"); the remaining ones are protocol.
        facts: anything else, as plain JSON values.

    Returns: metric, value, unit and n of what was written, with the run and the settings, to be shown as the last line
        of a notebook.

    Raises: LabError if two of the runs share a name but not a configuration, or `by` names no column.

    Example:
        >>> import rrepa_lab as rl
        >>> import tempfile
        >>> run = rl.load("digits-none")
        >>> with tempfile.TemporaryDirectory() as out:
        ...     table = rl.write_result(out, "my_notebook", rl.evaluate(run, samples=0, limit=20), [run])
        >>> table.columns.tolist()
        ['run', 'metric', 'value', 'unit', 'n']
    """
    tables = [table] if isinstance(table, pd.DataFrame) else list(table)
    known: dict[str, RunConfig] = {}
    for run in runs:
        if known.setdefault(run.name, run.config) != run.config:
            raise LabError(f"two of the runs are called {run.name!r}: give one another name")
    for name in by:
        if not any(name in part for part in tables):
            raise LabError(f"the tables have no column {name!r} to compare by")
    rows = [row for part in tables for row in measurements(part, by)]
    result = Result(version=__version__, notebook=notebook, runs=known, measurements=rows, facts=facts)
    write_text(Path(out) / NAME, json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
    shown = [
        {"run": row.run, **row.settings, "metric": row.metric, "value": row.value, "unit": row.unit, "n": row.n} for row in rows
    ]
    return pd.DataFrame(shown)


def measurements(table: pd.DataFrame, by: Sequence[str] = ()) -> list[Measurement]:
    """The rows of a tidy table in the schema of a result; `by` as in `write_result`."""
    return [_measurement({str(name): value for name, value in row.items()}, by) for row in table.to_dict("records")]


def read_result(path: Path | str) -> Result:
    """A result.json; LabError if it is missing, cut short, or of another format."""
    path = Path(path)
    try:
        values = read_json(path)
    except MissingFileError:
        raise LabError(f"no result at {path}") from None
    if "format" not in values:
        raise LabError(f"{path} is not a result of an rrepa_lab notebook")
    if values["format"] != FORMAT:
        raise LabError(f"{path} has format {str(values['format'])[:40]}; this version reads format {FORMAT}")
    return validate(Result, values, str(path), stored=True)


def _measurement(row: dict[str, Any], by: Sequence[str]) -> Measurement:
    """A row of a tidy table; columns that are neither identity nor setting become part of the protocol."""
    parts = [str(row["protocol"])] if _there(row.get("protocol")) else []
    plain = {"space"} if row.get("space") == "pixels" else set()  # said of latents alone
    rest = [key for key in row if key not in _IDENTITY | _FOUND | plain and key not in by]
    parts += [f"{key} {_whole(key, row[key])}" for key in rest if _there(row[key])]
    value, n = float(row["value"]), row.get("n")
    return Measurement(
        run=str(row.get("run", "")),
        settings={key: _plain(row[key]) for key in by if key in row and _there(row[key])},
        metric=str(row["metric"]),
        value=value if math.isfinite(value) else None,
        unit=str(row["unit"]) if _there(row.get("unit")) else "",
        n=int(n) if _there(n) else None,  # type: ignore[arg-type]
        low=_number(row.get("low")),
        high=_number(row.get("high")),
        interval=str(row["interval"]) if _there(row.get("interval")) else "",
        protocol="; ".join(parts),
    )


def _whole(column: str, value: Any) -> Any:
    """An integer where a column of integers has become one of floats, since some rows have none."""
    integer = column in COLUMNS and COLUMNS[column].kind == "integer" and isinstance(value, float) and value.is_integer()
    return int(value) if integer else value


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if _there(value) and math.isfinite(value) else None


def _there(value: Any) -> bool:
    return value is not None and value == value and value != ""  # noqa: PLR0124


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
