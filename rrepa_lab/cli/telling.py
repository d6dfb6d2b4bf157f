"""Commands that tell what there is, and the page: describe, doctor, app."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from rrepa_lab.cli.printing import hint, print_facts, print_rows
from rrepa_lab.cli.words import add_command
from rrepa_lab.errors import LabError


def register(commands: Any) -> None:
    """Add these commands."""
    describe = add_command(commands, "describe", _describe, "List the runs, or tell what one run or preset is.")
    describe.add_argument("source", nargs="?", metavar="RUN|PRESET|config.json", help="what to describe (none: list the runs)")
    describe.add_argument("--routing", action="store_true", help="the gradient atlas: which parameters each strategy reaches")

    add_command(commands, "doctor", _doctor, "Check the installation: versions, device, bundled files.")
    commands.add_parser("app", help="Open the page; takes the arguments of app/demo.py.")  # see `main`


def _describe(given: argparse.Namespace) -> int:
    from rrepa_lab.runs.describe import describe_config
    from rrepa_lab.runs.presets import read_config
    from rrepa_lab.runs.store import available, load

    if given.source is None:
        rows = [
            {"name": info.name, "strategy": info.strategy, "data": info.data, "summary": info.summary} for info in available()
        ]
        print_rows(rows, given.json)
        hint(given, "one of them in full: rrepa-lab describe digits-reverse --routing")
        return 0
    source: Any
    try:
        source = load(given.source)
        config = source.config
    except LabError as error:
        try:
            source = config = read_config(given.source)
        except LabError:
            raise error from None
    if not given.routing:
        print_facts(describe_config(config), given.json)
        hint(given, f"where its gradient goes: rrepa-lab describe {given.source} --routing")
        return 0
    from rrepa_lab.analysis.routing import routing

    table = routing(source)
    if given.json:
        print_rows(table.to_dict("records"), True)
        return 0
    table["norm"] = [f"{value:.2e}" if value else "0" for value in table["gradient_norm"]]
    wide = table.pivot(index="group", columns=["tap", "strategy"], values="norm")
    print(f"Gradient norm of the alignment loss of {config.name}, by strategy and parameters ({table.n[0]} images, float64):\n")
    print(
        wide.loc[
            table["group"].drop_duplicates(), table[["tap", "strategy"]].drop_duplicates().apply(tuple, axis=1)
        ].to_string()
    )
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from rrepa_lab.cli.doctor import examine

    table = examine()
    print_rows(table.to_dict("records"), given.json)
    if table["ok"].all():
        hint(given, "all well; open the page: rrepa-lab app")
        return 0
    return 1


def open_page(words: Sequence[str]) -> int:
    """Become app/demo.py, with these arguments."""
    from rrepa_lab.paths import bundled

    os.execv(sys.executable, [sys.executable, str(bundled("app") / "demo.py"), *words])
