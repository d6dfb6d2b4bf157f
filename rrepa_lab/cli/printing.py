"""What commands print: tables for people, or JSON alone for programs."""

import argparse
import json
from typing import Any


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Names and values, a line each, or one JSON object."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        shown = f"{value:.4g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{key:<{width}}  {shown if shown not in (None, '') else '-'}")


def print_rows(rows: list[dict[Any, Any]], as_json: bool) -> None:
    """A table, or a JSON list with null for what was not measured."""
    if as_json:
        # JSON knows no nan: a measurement that does not exist is null
        plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]  # noqa: PLR0124
        print(json.dumps(plain, indent=2, allow_nan=False))
    elif rows:
        from tabulate import tabulate

        print(tabulate(rows, headers="keys", floatfmt=".4f", disable_numparse=[0]))
    else:
        print("nothing found")


def hint(given: argparse.Namespace, text: str) -> None:
    """The next useful command, for people."""
    if not given.json:
        print(f"\n{text}")
