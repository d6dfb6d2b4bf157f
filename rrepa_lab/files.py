"""Writing files so that a reader never sees half of one."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
from safetensors import SafetensorError

from rrepa_lab.errors import LabError

TEMPORARY = ".tmp"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place; on failure nothing is left.

    Raises: LabError in one line where the file cannot be written: no space, no permission, a path that cannot be.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            temporary.chmod(0o644)  # some writers make files that only their owner can read
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise LabError(f"{path} cannot be written: {error.strerror or error}") from error
    except (RuntimeError, SafetensorError) as error:  # what torch.save and safetensors make of an OSError
        if not _is_write_error(error):
            raise
        raise LabError(f"{path} cannot be written ({str(error).splitlines()[0]}): is the disk full?") from error


def check_writable(path: Path) -> None:
    """LabError if a file cannot be made at this path: found before the work whose result it is to hold.

    A file is made and removed in the nearest folder above it that exists; missing folders are not made.
    """
    try:
        folder = path.is_dir()
    except ValueError as error:  # a null byte
        raise LabError(f"{path} cannot be written: {error}") from None
    if folder:
        raise LabError(f"{path} cannot be written: it is a folder")
    try:
        with tempfile.TemporaryFile(dir=existing_folder(path.absolute().parent)):
            pass
    except OSError as error:
        raise LabError(f"{path} cannot be written: {error.strerror or error}") from None


def existing_folder(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def _is_write_error(error: Exception) -> bool:
    words = ("PytorchStreamWriter", "write", "No space", "I/O error", "IoError", "os error", "unexpected pos")
    return any(word in str(error) for word in words)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of `write_atomically` whose process is gone, or is this one."""
    for path in folder.glob(f".*{TEMPORARY}"):
        number = path.name.removesuffix(TEMPORARY).rpartition(".")[2]
        if not number.isdecimal() or int(number) == os.getpid() or not psutil.pid_exists(int(number)):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the file by this text (UTF-8), atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
