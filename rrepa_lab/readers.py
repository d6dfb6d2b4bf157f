"""One reader for the files of runs, studies and results, which may come from elsewhere.

A regular file of limited size, in UTF-8, of the expected form; or a LabError of one line that names file and fault. Pipes
and devices are never opened: reading them may not end.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from rrepa_lab.config import Config
from rrepa_lab.errors import LabError
from rrepa_lab.values import load_yaml

MIB = 2**20
Record = TypeVar("Record", bound=Config)


class MissingFileError(LabError):
    """There is no such file."""


def check_file(path: Path, limit: int | None = None) -> None:
    """LabError unless `path` is a regular file of at most `limit` bytes; MissingFileError if there is nothing."""
    try:
        if not path.exists():
            raise MissingFileError(f"{path} does not exist")
        if not path.is_file():
            raise LabError(f"{path} is not a file")
        size = path.stat().st_size
    except LabError:
        raise
    except (OSError, ValueError) as error:  # no permission, a name too long, a null byte
        raise LabError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if limit is not None and size > limit:
        raise LabError(f"{path} has {size:,} bytes; at most {limit:,} are read")


def read_text(path: Path, limit: int = 64 * MIB, errors: str = "strict") -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Args:
        limit: bytes; a larger file is refused.
        errors: "strict" refuses bytes that are no UTF-8, "replace" puts U+FFFD in their place.

    Raises: LabError; MissingFileError if there is no file.
    """
    check_file(path, limit)
    try:
        return path.read_text(encoding="utf-8-sig", errors=errors)
    except UnicodeDecodeError:
        raise LabError(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror or error}") from None


def read_json(path: Path, limit: int = 64 * MIB) -> dict[str, Any]:
    """The JSON object in a file; LabError for anything else, MissingFileError if there is no file."""
    text = read_text(path, limit)
    try:
        values = json.loads(text)
    except RecursionError:
        raise LabError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise LabError(f"{path} is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise LabError(f"{path} must hold a JSON object")
    return values


def read_yaml(path: Path, limit: int = MIB) -> dict[str, Any]:
    """The YAML mapping in a file, its keys as text; LabError for anything else, MissingFileError if there is no file."""
    text = read_text(path, limit)
    try:
        values = load_yaml(text)
    except LabError as error:
        raise LabError(f"{path} is not a YAML file that can be read: {error}") from None
    if not isinstance(values, Mapping):
        raise LabError(f"{path} must hold a YAML mapping")
    return {str(key): value for key, value in values.items()}


def read_table(path: Path, columns: Sequence[str] = (), limit: int = 256 * MIB, **options: Any) -> pd.DataFrame:
    """A CSV file as a table.

    Args:
        columns: those that it must have.
        options: of `pandas.read_csv`.

    Raises: LabError for what is no CSV or lacks a column; MissingFileError if there is no file.
    """
    check_file(path, limit)
    try:
        table = pd.read_csv(path, encoding="utf-8-sig", **options)
    except (ValueError, OverflowError, RecursionError) as error:  # also ParserError, EmptyDataError and UnicodeDecodeError
        raise LabError(f"{path} is not a CSV file: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror or error}") from None
    lacking = [name for name in columns if name not in table.columns]
    if lacking:
        raise LabError(f"{path} has no column {lacking[0]}; it needs {', '.join(columns)}")
    return table


def validate(cls: type[Record], values: Any, where: str, stored: bool = False) -> Record:
    """A configuration or record from plain values; LabError in one line, beginning with `where`.

    Args:
        stored: the kit wrote them, see `Config.from_dict`.
    """
    try:
        return cls.from_dict(values, stored)
    except LabError as error:
        raise LabError(f"{where}: {error}") from None
    except (RecursionError, OverflowError):
        raise LabError(f"{where} is nested too deeply, or holds a number too large") from None
