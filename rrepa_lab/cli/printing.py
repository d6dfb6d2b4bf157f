"""What commands print: tables for people, or JSON alone for programs."""

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrepa_lab.files import write_text

if TYPE_CHECKING:
    import pandas as pd

    from rrepa_lab.data.config import DataConfig


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Names and values, one line each, or one JSON object."""
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
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print_table([[row.get(key) for key in columns] for row in rows], [str(column) for column in columns], floats)
    else:
        print("nothing found")


def print_table(rows: list[list[Any]], columns: list[str], floats: str = ".4f") -> None:
    """A table whose columns may share a name, as those named after classes may; the first column is text."""
    from tabulate import tabulate

    print(tabulate(_plain(rows), headers=columns, floatfmt=floats, disable_numparse=[0], missingval="-"))


def print_json(value: Any) -> None:
    """JSON alone; nan, a measurement that does not exist, becomes null."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if value != value else value  # noqa: PLR0124


def write_csv(path: str | None, table: "pd.DataFrame") -> None:
    """Write the table, if there is a path."""
    if path:
        write_text(Path(path), table.to_csv(index=False))


def hint(args: argparse.Namespace, text: str) -> None:
    """Print the next useful command, unless --json is given."""
    if not args.json:
        print(f"\n{text}")


def sample_options(classes: int) -> str:
    """Options of `rrepa-lab sample` for a run with this number of classes (0: no labels), for hints."""
    if not classes:
        return "--seeds 0..15 --out grid.png"
    return f"--labels {'all' if classes <= 10 else '0..9'} --seeds 0..9 --out grid.png"


def changed_data(known: "DataConfig", wanted: "DataConfig") -> dict[str, Any]:
    """The settings by which data differ from those of a preset, for hints."""
    pairs = {f"data.{key}": (getattr(known, key), getattr(wanted, key)) for key in ("name", "path", "image_size", "channels")}
    return {key: value for key, (before, value) in pairs.items() if value not in (before, None)}


def set_words(settings: dict[str, Any]) -> str:
    """Settings as the end of a command line, " --set train.steps=200"."""
    return "".join(f" --set {key}={shlex.quote(str(value))}" for key, value in settings.items())
