"""Fingerprints: whether two sets hold the same images in the same order, found out without decoding them."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

SAMPLED, SAMPLE_BYTES = 64, 2**16  # files of a set whose beginnings are read, and bytes of each


class FileFacts(NamedTuple):
    """What the entries of files in their folders say of them."""

    fingerprint: str  # of names, sizes and a sample of the bytes: the same wherever the files lie
    stamp: str  # of the folder and the times of the last changes: another one where a file was replaced in its place


def digest(*parts: str | bytes) -> str:
    """16 hex digits of these parts; where one ends and the next begins counts.

    Example:
        >>> digest("ab", "c") != digest("a", "bc")
        True
    """
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = part if isinstance(part, bytes) else encoded(part)
        found.update(len(text).to_bytes(8, "little"))
        found.update(text)
    return found.hexdigest()


def encoded(name: str) -> bytes:
    """A file's name as bytes, in Unicode's composed form; bytes that are no UTF-8 stay as they are."""
    return unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")


def fingerprint_of_tensors(tensors: Iterable[Tensor], classes: Sequence[str]) -> str:
    """Of numbers in memory: their shapes, types and values, and the class names."""
    parts: list[str | bytes] = [*classes]
    for tensor in tensors:
        parts += [f"{tuple(tensor.shape)} {tensor.dtype}", tensor.detach().cpu().contiguous().numpy().tobytes()]
    return digest(*parts)


def file_facts(root: Path, names: Sequence[str]) -> FileFacts:
    """Of files by their names below `root`, in this order.

    Every entry is read (0.2 s for the 50,000 files of CIFAR-10 on a local disk), and the first 64 KiB of 64 files that are
    spread over the set: pictures without compression may have equal names and sizes in two sets.
    """
    place = str(root)
    sizes, times = [], []
    for name in names:
        size, time = _size_and_time(f"{place}/{name}")
        sizes.append(size)
        times.append(time)
    step = max(1, len(names) // SAMPLED)
    samples = [_beginning(f"{place}/{name}") for name in names[::step][:SAMPLED]]
    listed = b"\n".join(b"%s\0%d" % (encoded(name), size) for name, size in zip(names, sizes, strict=True))
    return FileFacts(digest(listed, *samples), digest(os.path.realpath(place), ",".join(map(str, times))))


def _size_and_time(path: str) -> tuple[int, int]:
    """Size and time of the last change; -1 for a file that is gone, which is reported where it is read."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _beginning(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(SAMPLE_BYTES)
    except (OSError, ValueError):
        return b""


def cache_key(images: Any) -> dict[str, str]:
    """What an array computed from all images of a set depends on: its fingerprint and, for files, their stamp."""
    return {"data": images.fingerprint, "stamp": getattr(images, "stamp", "")}
