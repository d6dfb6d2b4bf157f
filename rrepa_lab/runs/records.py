"""metrics.jsonl: one JSON object a report, appended while training, read back as a table."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rrepa_lab.files import write_text
from rrepa_lab.readers import MissingFileError, read_text

NAME = "metrics.jsonl"
REPORTED = ("step", "loss", "nats_per_dim", "seconds")  # columns of every table that is not empty
TEXTS = ("precision", "hardware")  # the columns that hold no numbers
LARGEST_NUMBER = 1e300  # of a measurement; whole numbers beyond it are no floats
LARGEST = 256 * 2**20  # bytes that are read


class Row(BaseModel):
    """A line of metrics.jsonl; further measurements may stand beside these."""

    model_config = ConfigDict(extra="allow")

    step: int = Field(ge=0)
    loss: float | None = None
    nats_per_dim: float | None = None
    similarity: dict[str, float] = {}
    seconds: float | None = None
    data_wait: float | None = None
    held_out_nats_per_dim: float | None = None
    held_out_accuracy: float | None = None
    train_nats_per_dim: float | None = None
    train_accuracy: float | None = None


class Records:
    """The metrics file of one run."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME

    def append(self, row: dict[str, Any]) -> None:
        """Add one line."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def rewrite(self, rows: Iterable[dict[str, Any]]) -> None:
        """Replace the file by these rows."""
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def table(self) -> pd.DataFrame:
        """One row a report, one column a measurement; similarities as `similarity.<tap>`.

        Lines that are no record (the last one of a run that was cut off) are left out. Raises: LabError for a file that
        cannot be read, or is larger than 256 MiB.
        """
        rows = self.rows()
        table = pd.json_normalize(rows)
        numbers = [name for name in table.columns if name not in TEXTS]
        table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce")
        return table.reindex(columns=list(dict.fromkeys([*REPORTED, *table.columns]))) if rows else table

    def rows(self) -> list[dict[str, Any]]:
        """The records as dictionaries, in the order of the file; none if there is no file."""
        try:
            lines = read_text(self.path, LARGEST, errors="replace").splitlines()
        except MissingFileError:
            return []
        return [row for row in map(_row, lines) if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
        Row.model_validate(values, strict=True)
    except (ValueError, ValidationError, RecursionError):
        return None
    return {key: value if key in TEXTS and isinstance(value, str) else _numbers(value) for key, value in values.items()}


def _numbers(value: Any) -> Any:
    """A measurement, None, or several by name; NaN for what is no number."""
    if isinstance(value, dict):
        return {str(key): _numbers(part) if not isinstance(part, dict) else float("nan") for key, part in value.items()}
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER
    return value if number else float("nan")
