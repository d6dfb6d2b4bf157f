"""The command line: parse, call, print. Tables for people; with --json, JSON alone on standard output.

Exit status: 0 all well, 1 a check failed or the work was interrupted, 2 a mistake in what was asked for.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from rrepa_lab import __version__
from rrepa_lab.cli import batching, making, reading, telling
from rrepa_lab.cli.words import check_outputs
from rrepa_lab.errors import LabError, LabWarning


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rrepa-lab`."""
    parser = argparse.ArgumentParser(prog="rrepa-lab", description="Train, sample, classify and read normalizing flows.")
    parser.add_argument("--version", action="version", version=f"rrepa-lab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for room in (making, reading, batching, telling):
        room.register(commands)
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["app"]:  # the page reads its own flags
        return telling.open_page(words[1:])
    given = parser.parse_args(words)
    with warnings.catch_warnings():
        warnings.simplefilter("always", LabWarning)
        warnings.showwarning = _print_warning
        try:
            check_outputs(given)
            return given.run(given)
        except LabError as error:
            print(f"rrepa-lab: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("rrepa-lab: interrupted", file=sys.stderr)
            return 1


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, LabWarning):
        print(f"rrepa-lab: note: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)
