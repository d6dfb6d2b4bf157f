"""What commands read: their parsers, and the words a person types for settings, numbers and runs."""

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rrepa_lab.errors import LabError, LabWarning, unknown
from rrepa_lab.files import check_writable
from rrepa_lab.values import number_range, read_value


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


def add_output(command: argparse.ArgumentParser, *flags: str, **more: Any) -> None:
    """A file that is written at the end; that it can be is checked before the work begins, by `check_outputs`."""
    action = command.add_argument(*flags, **more)
    command.set_defaults(outputs=[*(command.get_default("outputs") or []), action.dest])


def check_outputs(given: argparse.Namespace) -> None:
    """LabError if a file that the command is to write cannot be written."""
    for name in getattr(given, "outputs", []):
        path = getattr(given, name)
        if path:
            check_writable(Path(path))


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults, but not for switches and for what has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, [], "") else super()._get_help_string(action)


def setting(text: str) -> tuple[str, Any]:
    """Read "train.steps=200": a number, boolean, none or list as JSON, Python and YAML write them, else the text."""
    key, sign, value = text.partition("=")
    if not sign:
        raise LabError(f"--set takes KEY=VALUE, for example train.steps=200, not {text!r}")
    return key, read_value(value)


def integers(option: str, text: str) -> list[int]:
    """Read "3", "1,4,7" and "0..9" (both ends included), also mixed."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            numbers += number_range(part, option)
    except LabError:
        raise
    except ValueError:
        raise LabError(f"{option} takes integers such as 3, 1,4,7 or 0..9, not {text!r}") from None
    if not numbers:
        raise LabError(f"{option} {text} is empty: the first number is above the last")
    return numbers


def class_labels(option: str, text: str, classes: Sequence[str]) -> list[int]:
    """Read "all", names of classes and numbers, also mixed: "cat,dog", "3", "0..9"; labels count `classes` from 0.

    A name counts before a number: where classes are called 1, 2 and 3, "1" is the first of them, which has the number 0.
    """
    if not classes:
        raise LabError(f"{option} {text}: the run has no classes")
    if text.strip() == "all":
        return list(range(len(classes)))
    labels: list[int] = []
    for part in text.split(","):
        name = part.strip()
        if name in classes:
            labels.append(classes.index(name))
            if name.isdecimal() and labels[-1] != int(name) < len(classes):
                note = f"{option} {name} is the class called {name} (number {labels[-1]}), not number {name}"
                warnings.warn(f"{note}, which is called {classes[int(name)]}", LabWarning, stacklevel=2)
            continue
        try:
            labels += number_range(part, option)
        except LabError:
            raise
        except ValueError:
            raise unknown("class", part.strip(), [*classes, "all"]) from None
    if not labels:
        raise LabError(f"{option} {text} is empty: the first number is above the last")
    wrong = [label for label in labels if not 0 <= label < len(classes)]
    if wrong:
        raise LabError(f"{option}: label {wrong[0]} is out of range: 0..{len(classes) - 1}; classes: {short(classes)}")
    return labels


def short(names: Sequence[str], most: int = 10) -> str:
    """The first of some names in a line."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def words(text: str) -> list[str]:
    """Read "linear,knn"; nothing gives none."""
    return [word.strip() for word in text.split(",") if word.strip()]


def sample_options(classes: int) -> str:
    """Options of `rrepa-lab sample` that fit a run of so many classes, for hints."""
    if not classes:
        return "--seeds 0..15 --out grid.png"
    return f"--labels {'all' if classes <= 10 else '0..9'} --seeds 0..9 --out grid.png"
