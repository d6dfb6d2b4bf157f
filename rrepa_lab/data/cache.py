"""Arrays on disk that are made once and read through a memory map: decoded pictures, latents, a teacher's features.

An array is a folder below `paths.cache_root()`, named by a hash of everything its numbers depend on, with array.npy (rows
first, to be read by any program) and about.json, which is written last. A build that was interrupted goes on at the row it
had reached; what another version of the kit wrote, or what is damaged, is made again.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock

from rrepa_lab.errors import LabError
from rrepa_lab.files import existing_folder, write_text
from rrepa_lab.paths import cache_root
from rrepa_lab.readers import MIB, read_json

FORMAT = 1  # of a folder of the cache; another number is made again
ARRAY, PARTIAL, ABOUT, PROGRESS = "array.npy", "array.partial", "about.json", "progress.json"
CHUNK = 256  # rows between two notes of how far a build is
SPARE = 64 * MIB  # bytes that a build leaves free on the disk

# ranges of rows -> the rows of each range, in this order
Fill = Callable[[Sequence[range]], Iterable[np.ndarray]]
Watch = Callable[[int, int], object]  # rows done, rows in all


@dataclass(frozen=True)
class ArraySpec:
    """Which array: its size, and all that its numbers depend on.

    Args:
        kind: what it holds, for people: "pictures", "latents", "features".
        shape: rows first.
        dtype: a numpy name: "uint8", "float16".
        about: plain JSON values; a change of any of them is another array. `data`, the fingerprint of the images, is one.

    Example:
        >>> ArraySpec("pictures", (10, 32, 32, 3), "uint8", {"data": "1a2b"}).bytes
        30720
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    about: Mapping[str, Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.shape[0] * self.row_bytes

    @cached_property
    def description(self) -> dict[str, Any]:
        """What about.json holds, beside the date."""
        array = {"kind": self.kind, "shape": list(self.shape), "dtype": self.dtype}
        return {"format": FORMAT, **array, "about": json.loads(json.dumps(self.about))}

    @property
    def folder(self) -> Path:
        """Where it lies."""
        text = json.dumps(self.description, sort_keys=True)
        return cache_root() / f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


class CacheEntry(NamedTuple):
    """A folder of the cache."""

    folder: Path
    kind: str
    rows: int  # in all
    complete: bool
    bytes: int  # on disk
    about: dict[str, Any]


def cached_array(spec: ArraySpec, fill: Fill, watch: Watch | None = None) -> np.ndarray:
    """The array of this specification, read-only and memory-mapped; made first where it is not there or not complete.

    Args:
        fill: makes the rows of ranges, one range after the other; called with those that are still missing.
        watch: called after every range with the rows done and the rows in all.

    Another process that makes the same array is waited for. An error of `fill` leaves the rows that were done, from which the
    next call goes on.

    Raises: LabError where the disk is full or cannot be written to, and what `fill` raises.
    """
    folder = spec.folder
    if not is_complete(spec):
        _check_room(folder, spec)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                if not is_complete(spec):
                    _build(spec, fill, watch)
        except OSError as error:
            raise LabError(f"the cache {folder} cannot be written: {error.strerror or error}; {ADVICE}") from None
    return np.load(folder / ARRAY, mmap_mode="r", allow_pickle=False)


def cached_with_bar(spec: ArraySpec, fill: Fill, label: str) -> np.ndarray:
    """As `cached_array`, with a progress bar on a terminal while the array is made; `label` says of what."""
    from tqdm import tqdm

    silent = is_complete(spec) or not sys.stderr.isatty()
    with tqdm(total=spec.shape[0], unit="image", desc=label, disable=silent, leave=False) as bar:
        return cached_array(spec, fill, lambda done, _: bar.update(done - bar.n))


ADVICE = "free some space there, set another folder (--cache DIR or $RREPA_CACHE), or go without (data.cache=off)"


def is_complete(spec: ArraySpec) -> bool:
    """Whether the array was made to its end, by this version of the kit."""
    try:
        about = read_json(spec.folder / ABOUT, MIB)
        size = (spec.folder / ARRAY).stat().st_size
    except (LabError, OSError):
        return False
    return {key: about.get(key) for key in spec.description} == spec.description and size == _header_bytes(spec) + spec.bytes


def entries() -> list[CacheEntry]:
    """What the cache holds, the largest first; folders of other programs are left out."""
    found = []
    for folder in sorted(cache_root().glob("*-*")) if cache_root().is_dir() else []:
        noted = next((folder / name for name in (ABOUT, PROGRESS) if (folder / name).is_file()), None)
        try:
            values = read_json(noted, MIB) if noted else {}
        except LabError:
            values = {}
        if not {"kind", "shape", "about"} <= values.keys():
            continue
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        complete = noted is not None and noted.name == ABOUT
        found.append(CacheEntry(folder, str(values["kind"]), int(values["shape"][0]), complete, size, dict(values["about"])))
    return sorted(found, key=lambda entry: -entry.bytes)


def remove(entry: CacheEntry) -> None:
    """Delete a folder of the cache; LabError where that is not possible, or a process is writing to it."""
    try:
        with FileLock(entry.folder / ".lock", timeout=0):
            for name in (ABOUT, PROGRESS, ARRAY, PARTIAL):  # what says that it is complete goes first
                (entry.folder / name).unlink(missing_ok=True)
        shutil.rmtree(entry.folder)
    except (OSError, TimeoutError) as error:
        raise LabError(f"{entry.folder} cannot be removed: {error}") from None


def _build(spec: ArraySpec, fill: Fill, watch: Watch | None) -> None:
    """Fill the partial file from the row that was reached, then rename it and write about.json."""
    folder, total = spec.folder, spec.shape[0]
    for name in (ABOUT, ARRAY):
        (folder / name).unlink(missing_ok=True)
    done = _rows_done(spec)
    with (folder / PARTIAL).open("r+b" if done else "wb") as file:
        if not done:
            _write_header(file, spec)
        file.truncate(_header_bytes(spec) + done * spec.row_bytes)
        file.seek(0, os.SEEK_END)
        ranges = [range(first, min(first + CHUNK, total)) for first in range(done, total, CHUNK)]
        for rows, part in zip(ranges, _checked(spec, ranges, fill), strict=True):
            # written as a file, not through a map: a full disk is an error here, and would end the process there
            file.write(part.tobytes())
            file.flush()
            write_text(folder / PROGRESS, json.dumps(spec.description | {"rows": rows.stop}))
            if watch is not None:
                watch(rows.stop, total)
        os.fsync(file.fileno())
    os.replace(folder / PARTIAL, folder / ARRAY)
    write_text(folder / ABOUT, json.dumps(spec.description, indent=2) + "\n")
    (folder / PROGRESS).unlink(missing_ok=True)


def _checked(spec: ArraySpec, ranges: list[range], fill: Fill) -> Iterator[np.ndarray]:
    parts = iter(fill(ranges)) if ranges else iter(())
    for rows in ranges:
        part = np.ascontiguousarray(next(parts))
        if part.shape != (len(rows), *spec.shape[1:]) or part.dtype != np.dtype(spec.dtype):
            expected = (len(rows), *spec.shape[1:])
            raise ValueError(f"{spec.kind}: rows of {part.shape} {part.dtype}, expected {expected} {spec.dtype}")
        yield part


def _rows_done(spec: ArraySpec) -> int:
    """Rows of the partial file that can be kept."""
    try:
        noted = read_json(spec.folder / PROGRESS, MIB)
        size = (spec.folder / PARTIAL).stat().st_size
    except (LabError, OSError):
        return 0
    same = {key: noted.get(key) for key in spec.description} == spec.description
    done = noted.get("rows")
    if not same or not isinstance(done, int) or not 0 < done <= spec.shape[0]:
        return 0
    return done if size >= _header_bytes(spec) + done * spec.row_bytes else 0


def has_room(spec: ArraySpec) -> bool:
    """Whether the disk has room for the array, or holds it already."""
    try:
        if not is_complete(spec):
            _check_room(spec.folder, spec)
    except LabError:
        return False
    return True


def _check_room(folder: Path, spec: ArraySpec) -> None:
    """LabError where fewer bytes are free than the array takes."""
    free = shutil.disk_usage(existing_folder(folder)).free
    if spec.bytes + SPARE > free:
        need = f"{spec.bytes / MIB:.0f} MiB and {SPARE / MIB:.0f} to spare, and {free / MIB:.0f} MiB are free"
        raise LabError(f"the cache {folder} of {spec.shape[0]} {spec.kind} needs {need}; {ADVICE}")


def _write_header(file: BinaryIO, spec: ArraySpec) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(spec.dtype)), "fortran_order": False, "shape": spec.shape}
    np.lib.format.write_array_header_2_0(file, header)


def _header_bytes(spec: ArraySpec) -> int:
    from io import BytesIO

    file = BytesIO()
    _write_header(file, spec)
    return file.tell()
