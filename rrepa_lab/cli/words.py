"""What commands read: their parsers, and the words a person types for settings, numbers and runs."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from rrepa_lab.errors import LabError


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    """A subcommand that `run` carries out; all of them know --json."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, formatter_class=Formatter)
    command.add_argument("--json", action="store_true", help="print JSON for programs, and nothing else, on standard output")
    command.set_defaults(run=run)
    return command


def add_run(command: argparse.ArgumentParser) -> None:
    """The run to work on, and the device."""
    command.add_argument("run_name", metavar="RUN", help="bundled or local run, run directory, or Hub id")
    add_device(command)


def add_device(command: argparse.ArgumentParser, default: str = "cpu") -> None:
    """--device."""
    command.add_argument("--device", default=default, help="auto, cpu or cuda")


def add_set(command: argparse.ArgumentParser, help: str = "override a setting: train.steps=200") -> None:
    """--set KEY=VALUE."""
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults, but not for switches and for what has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, [], "") else super()._get_help_string(action)


def setting(text: str) -> tuple[str, Any]:
    """Read "train.steps=200": the value as JSON if it is JSON, else as it stands."""
    key, sign, value = text.partition("=")
    if not sign:
        raise LabError(f"--set takes KEY=VALUE, for example train.steps=200, not {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def integers(option: str, text: str) -> list[int]:
    """Read "3", "1,4,7" and "0..9" (both ends included), also mixed."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            low, dots, high = part.partition("..")
            numbers += range(int(low), int(high) + 1) if dots else [int(low)]
    except ValueError:
        raise LabError(f"{option} takes integers such as 3, 1,4,7 or 0..9, not {text!r}") from None
    if not numbers:
        raise LabError(f"{option} {text} is empty: the first number is above the last")
    return numbers


def words(text: str) -> list[str]:
    """Read "linear,knn"; nothing gives none."""
    return [word.strip() for word in text.split(",") if word.strip()]


def sample_options(classes: int) -> str:
    """Options of `rrepa-lab sample` that fit a run of so many classes, for hints."""
    labels = f"--labels 0..{min(classes, 10) - 1} --seeds 0..9" if classes else "--seeds 0..15"
    return f"{labels} --out grid.png"
