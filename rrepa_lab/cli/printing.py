"""What commands print: tables for people, or JSON alone for programs."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrepa_lab.files import write_text

if TYPE_CHECKING:
    import pandas as pd


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Names and values, a line each, or one JSON object."""
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        shown = f"{value:.4g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{key:<{width}}  {shown if shown not in (None, '') else '-'}")


def print_rows(rows: list[dict[Any, Any]], as_json: bool, floats: str = ".4f") -> None:
    """A table with numbers in the format `floats`, or a JSON list."""
    if as_json:
        print_json(rows)
    elif rows:
        from tabulate import tabulate

        print(tabulate(_plain(rows), headers="keys", floatfmt=floats, disable_numparse=[0], missingval="-"))
    else:
        print("nothing found")


def print_json(value: Any) -> None:
    """JSON alone; it knows no nan, so a measurement that does not exist is null."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if value != value else value  # noqa: PLR0124


def write_csv(path: str | None, table: "pd.DataFrame") -> None:
    """The table as a file, if a path was given."""
    if path:
        write_text(Path(path), table.to_csv(index=False))


def hint(given: argparse.Namespace, text: str) -> None:
    """The next useful command, for people."""
    if not given.json:
        print(f"\n{text}")
