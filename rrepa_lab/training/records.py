"""metrics.jsonl: one JSON object a report, appended while training, read back as a table."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rrepa_lab.errors import LabError
from rrepa_lab.files import write_text

NAME = "metrics.jsonl"
LARGEST = 256 * 2**20  # bytes that are read


class Row(BaseModel):
    """A line of metrics.jsonl; further measurements may stand beside these."""

    model_config = ConfigDict(extra="allow")

    step: int = Field(ge=0)
    loss: float | None = None
    nats_per_dim: float | None = None
    similarity: dict[str, float] = {}
    seconds: float | None = None
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
        return pd.json_normalize(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """The records as dictionaries, in the order of the file; none if there is no file."""
        try:
            if not self.path.exists():
                return []
            if not self.path.is_file():
                raise LabError(f"{self.path} is not a file")
            if self.path.stat().st_size > LARGEST:
                raise LabError(f"{self.path} has {self.path.stat().st_size} bytes, which is more than a training writes")
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise LabError(f"{self.path} cannot be read: {error.strerror}") from None
        return [row for row in map(_row, lines) if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
        Row.model_validate(values, strict=True)
    except (ValueError, ValidationError, RecursionError):
        return None
    return {key: value for key, value in values.items() if isinstance(value, int | float | str | dict | None)}
