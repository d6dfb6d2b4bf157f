"""The command line: parse, call, print. Tables for people; with --json, JSON alone on standard output.

Exit status: 0 success, 1 a check failed or the work was interrupted, 2 invalid arguments or input.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from rrepa_lab import __version__
from rrepa_lab.cli import app
from rrepa_lab.cli.arguments import check_outputs, use_cache
from rrepa_lab.cli.commands import COMMANDS
from rrepa_lab.errors import LabError, LabWarning, ReportedElsewhere
from rrepa_lab.processes import check_alone

SHARED = ("train", "evaluate", "sample")  # what several processes do together


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rrepa-lab`: run the command that the arguments name.

    Args:    argv: the arguments after the program name; None takes those of the process.
    Returns: the exit status.
    Raises:  SystemExit from argparse: status 0 after --help or --version, 2 for a usage error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["app"]:  # app/demo.py parses its own flags, --help included
        return app.run(arguments[1:])
    args = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always", LabWarning)
        warnings.showwarning = _print_warning
        try:
            if args.command not in SHARED:
                check_alone(f"rrepa-lab {args.command}")
            check_outputs(args)
            use_cache(args)
            return args.run(args)
        except LabError as error:
            if not isinstance(error, ReportedElsewhere):
                print(f"rrepa-lab: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("rrepa-lab: interrupted", file=sys.stderr)
            return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rrepa-lab", description="Train, sample and analyse normalizing flows.")
    parser.add_argument("--version", action="version", version=f"rrepa-lab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for command in COMMANDS:
        command.register(commands)
    return parser


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
