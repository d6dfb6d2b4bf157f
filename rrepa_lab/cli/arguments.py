"""The arguments that commands share, and the parsers of settings, numbers, lists and class labels."""

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rrepa_lab.errors import LabError, LabWarning, unknown
from rrepa_lab.files import check_writable
from rrepa_lab.values import number_range, read_value

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # what `add_subparsers` returns


def add_command(commands: Commands, name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    """Add a subcommand with --json; `run` takes the parsed arguments and returns the exit status."""
    command = commands.add_parser(name, help=help, description=help, formatter_class=Formatter)
    command.add_argument("--json", action="store_true", help="print JSON for programs, and nothing else, on standard output")
    command.set_defaults(run=run)
    return command


def add_run(command: argparse.ArgumentParser) -> None:
    """Add the positional argument RUN, and --device."""
    command.add_argument("run_name", metavar="RUN", help="bundled or local run, run directory, or Hub id")
    add_cache(command)
    add_device(command)


def add_cache(command: argparse.ArgumentParser) -> None:
    """Add --cache DIR, which `use_cache` obeys."""
    command.add_argument("--cache", dest="cache_folder", metavar="DIR", help="keep decoded pictures there ($RREPA_CACHE)")


def use_cache(args: argparse.Namespace) -> None:
    """Set $RREPA_CACHE, also for the processes that a command starts, where --cache was given."""
    if getattr(args, "cache_folder", None):
        os.environ["RREPA_CACHE"] = str(Path(args.cache_folder).expanduser().absolute())


def add_device(command: argparse.ArgumentParser, default: str = "cpu") -> None:
    """Add --device."""
    command.add_argument("--device", default=default, help="auto, cpu or cuda")


def add_set(command: argparse.ArgumentParser, help: str = "override a setting: train.steps=200") -> None:
    """Add --set KEY=VALUE, which can be repeated."""
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help)


def add_noise_samples(
    command: argparse.ArgumentParser, help: str, type: Callable[[str], Any] = int, default: Any = None
) -> None:
    """--noise-samples; --draws is its name in version 0.1."""
    command.add_argument("--noise-samples", "--draws", type=type, default=default, metavar="N", help=help)


def add_output(command: argparse.ArgumentParser, *flags: str, **more: Any) -> None:
    """Add an option that names an output file; `check_outputs` tests it before the command starts."""
    action = command.add_argument(*flags, **more)
    command.set_defaults(outputs=[*(command.get_default("outputs") or []), action.dest])


def add_csv(command: argparse.ArgumentParser) -> None:
    """Add --csv FILE."""
    add_output(command, "--csv", metavar="FILE", help="also write the table, protocol columns included")


def check_outputs(args: argparse.Namespace) -> None:
    """Raise LabError if an output file of `add_output` cannot be written."""
    for name in getattr(args, "outputs", []):
        path = getattr(args, name)
        if path:
            check_writable(Path(path))


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with default values, except of switches and of options without a default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, [], "") else super()._get_help_string(action)


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse "train.steps=200": a number, boolean, none or list as JSON, Python and YAML write them, else the text."""
    key, sign, value = text.partition("=")
    if not sign:
        raise LabError(f"--set takes KEY=VALUE, for example train.steps=200, not {text!r}")
    return key, read_value(value)


def parse_integers(option: str, text: str) -> list[int]:
    """Parse "3", "1,4,7" and "0..9" (both ends included), also mixed."""
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


def parse_labels(option: str, text: str, classes: Sequence[str]) -> list[int]:
    """Parse "all", names of classes and numbers, also mixed: "cat,dog", "3", "0..9"; labels count `classes` from 0.

    A name takes precedence over a number: where classes are called 1, 2 and 3, "1" is the first of them, label 0.
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
        raise LabError(f"{option}: label {wrong[0]} is out of range: 0..{len(classes) - 1}; classes: {_abbreviate(classes)}")
    return labels


def _abbreviate(names: Sequence[str], most: int = 10) -> str:
    """The first names, separated by commas, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def parse_list(text: str) -> list[str]:
    """Parse "linear,knn"; empty text gives an empty list."""
    return [part.strip() for part in text.split(",") if part.strip()]
