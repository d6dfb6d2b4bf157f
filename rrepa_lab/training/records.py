"""metrics.jsonl: one JSON object a report, appended while training, read back as a table."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from rrepa_lab.files import write_text


class Records:
    """The metrics file of one run."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "metrics.jsonl"

    def append(self, row: dict[str, Any]) -> None:
        """Add one line."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def rewind(self, step: int) -> None:
        """Forget what was written after this step: a resumed run writes it again."""
        rows = [row for row in self._rows() if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def table(self) -> pd.DataFrame:
        """One row a report, one column a measurement; similarities as `similarity.<tap>`."""
        return pd.json_normalize(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # the last line of a run that was cut off
                break
        return rows
