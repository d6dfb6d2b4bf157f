"""Files in the layout of ADM's evaluator (guided-diffusion): pictures `arr_0`, labels `arr_1`, statistics `mu`, `sigma`, ...

| name | holds |
|---|---|
| arr_0 | pictures (n, H, W, 3) uint8 |
| arr_1 | their labels (n,), where there are any |
| mu, sigma | mean (2048,) and covariance (2048, 2048) of Inception's pooled features |
| mu_s, sigma_s | the same of 2,023 spatial ones |

Statistics that the kit writes of another network say which: `network`, `network_sha256`, `n`.
"""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.moments import Gaussian
from rrepa_lab.files import check_writable, sha256, write_atomically
from rrepa_lab.readers import MIB, check_file

INCEPTION_DIM = 2048
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


class AdmFile:
    """A .npz file, opened without reading its arrays; pictures are mapped from the disk where they are not compressed.

    Raises: LabError for what is no such file, or holds neither pictures nor statistics.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        check_file(self.path)
        try:
            with zipfile.ZipFile(self.path) as opened:
                names = [name.removesuffix(".npy") for name in opened.namelist() if name.endswith(".npy")]
                self.arrays = {name: _header(opened, name) for name in names}
        except (zipfile.BadZipFile, ValueError, OSError, KeyError) as error:
            raise LabError(f"{self.path} is not a .npz file that can be read: {error}") from None
        if not self.has_pictures and not self.has_statistics:
            held = ", ".join(self.arrays) or "nothing"
            raise LabError(f"{self.path} holds {held}, and neither pictures (arr_0) nor statistics (mu, sigma)")
        if self.has_pictures:
            shape, dtype = self.arrays["arr_0"]
            if len(shape) != 4 or shape[3] not in (1, 3) or dtype != np.dtype(np.uint8):
                raise LabError(f"{self.path}: arr_0 is {shape} {dtype}; pictures are (n, H, W, 3) uint8")

    @property
    def has_pictures(self) -> bool:
        """Whether there is arr_0."""
        return "arr_0" in self.arrays

    @property
    def has_statistics(self) -> bool:
        """Whether there are mu and sigma."""
        return {"mu", "sigma"} <= self.arrays.keys()

    @cached_property
    def sha256(self) -> str:
        """The first 16 hex digits of that of the file."""
        return sha256(self.path)[:16]

    @property
    def pictures(self) -> np.ndarray:
        """(n, H, W, C) uint8, memory-mapped unless it is compressed."""
        return self._mapped("arr_0")

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int64 of arr_1; None where there are none."""
        if "arr_1" not in self.arrays:
            return None
        found = self._loaded("arr_1").astype(np.int64)
        n = self.arrays["arr_0"][0][0]
        if found.shape != (n,):
            raise LabError(f"{self.path}: arr_1 is {found.shape}, and there are {n} pictures")
        return found

    def statistics(self, spatial: bool = False) -> Gaussian | None:
        """mu and sigma, or mu_s and sigma_s, in float64; None where there are none. `n` is 0 unless the file says it."""
        mean, covariance = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
        if not {mean, covariance} <= self.arrays.keys():
            return None
        try:
            return Gaussian(self._loaded(mean).astype(np.float64), self._loaded(covariance).astype(np.float64), self.n)
        except LabError as error:
            raise LabError(f"{self.path}: {error}") from None

    @property
    def n(self) -> int:
        """Pictures that the statistics were taken over; 0 where the file does not say it."""
        return int(self._loaded("n")) if "n" in self.arrays else 0

    @property
    def network(self) -> tuple[str, str]:
        """Name and SHA-256 of the network of the statistics; files of ADM say neither and are of "inception"."""
        if "network" not in self.arrays:
            return "inception", ""
        return str(self._loaded("network")), str(self._loaded("network_sha256"))

    def describe(self) -> dict[str, Any]:
        """What the file holds, in words."""
        size = self.path.stat().st_size / MIB
        found: dict[str, Any] = {"file": str(self.path), "size": f"{size:.1f} MiB", "sha256": sha256(self.path)}
        if self.has_pictures:
            n, h, w, c = self.arrays["arr_0"][0]
            found["pictures"] = f"{n} of {c}x{h}x{w}, uint8 (arr_0)"
            labels = self.labels
            if labels is not None:
                counts = np.unique(labels, return_counts=True)[1]
                found["labels"] = f"{len(counts)} classes, {counts.min()} to {counts.max()} pictures in a class (arr_1)"
        if self.has_statistics:
            d = self.arrays["mu"][0][0]
            of, hashed = self.network
            found["statistics"] = f"mean and covariance of {d} features of {of}{f' ({hashed})' if hashed else ''}"
            found["statistics"] += f", {self.n} pictures" if self.n else ", number of pictures not stated"
            if "mu_s" in self.arrays:
                found["spatial statistics"] = f"of {self.arrays['mu_s'][0][0]} features"
        others = [
            name for name in self.arrays if name not in ("arr_0", "arr_1", *_STATISTICS, "n", "network", "network_sha256")
        ]
        if others:
            found["others"] = ", ".join(others)
        return found

    def _loaded(self, name: str) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as opened:
                return opened[name]
        except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
            raise LabError(f"{self.path}: {name} cannot be read: {error}") from None

    def _mapped(self, name: str) -> np.ndarray:
        with zipfile.ZipFile(self.path) as opened:
            entry = opened.getinfo(f"{name}.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                return self._loaded(name)
            shape, dtype = self.arrays[name]
            with opened.open(entry) as member:
                fortran, header = _read_header(member)[1], member.tell()
        if fortran:
            return self._loaded(name)
        with self.path.open("rb") as file:  # the local header repeats the name, and has its own extra field
            file.seek(entry.header_offset + 26)
            name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
        start = entry.header_offset + 30 + name_length + extra_length + header
        return np.memmap(self.path, dtype, "r", start, shape)


def _header(opened: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with opened.open(f"{name}.npy") as member:
        shape, _, dtype = _read_header(member)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not read")
    return shape, dtype


def _read_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


@contextmanager
def picture_writer(path: Path | str, n: int, shape: tuple[int, int, int], labels: Tensor | None) -> Iterator[Any]:
    """A function that takes parts (B, C, H, W) of bytes, in order, which then stand in a .npz file as arr_0.

    Grey pictures are written in three equal channels, as ADM's evaluator reads them. The file appears when all n are written.

    Args:
        shape: (C, H, W).
        labels: (n,), written as arr_1; None for none.

    Raises: LabError where the file cannot be written.
    """
    path = Path(path).expanduser()
    check_writable(path)
    partial, written = path.with_name(f".{path.name}.{os.getpid()}.partial"), 0
    _, h, w = shape

    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as opened:
            with opened.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (n, h, w, 3)}
                np.lib.format.write_array_header_1_0(member, header)

                def write(part: Tensor) -> None:
                    nonlocal written
                    member.write(part.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
                    written += len(part)

                yield write
            if written != n:
                raise LabError(f"{path}: {written} of {n} pictures were written")
            if labels is not None:
                with opened.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, labels.cpu().numpy().astype(np.int64))
        os.replace(partial, path)
    except OSError as error:
        raise LabError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def write_statistics(path: Path | str, pooled: Gaussian, spatial: Gaussian | None, network: str, sha256: str) -> None:
    """Write statistics under ADM's names, atomically; of which network, and over how many pictures, stands beside them."""
    arrays: dict[str, Any] = {"mu": pooled.mean, "sigma": pooled.covariance}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    arrays |= {"n": np.int64(pooled.n), "network": np.str_(network), "network_sha256": np.str_(sha256)}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    write_atomically(Path(path).expanduser(), write)
