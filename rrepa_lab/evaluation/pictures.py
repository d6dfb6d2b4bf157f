"""Pictures that are scored: of a file in ADM's layout, a folder, a tensor, a split, or drawn from a run as they are needed."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rrepa_lab.data.fingerprint import digest, file_facts, fingerprint_of_tensors
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.pictures import read_picture
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.adm import AdmFile

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}


class PictureSet(Protocol):
    """Pictures in a fixed order."""

    @property
    def words(self) -> str:
        """What they are, for a protocol."""
        ...

    @property
    def sha256(self) -> str:
        """16 hex digits that depend on the pictures and their order."""
        ...

    @property
    def labels(self) -> Tensor:
        """(n,) int64, -1 where there is none."""
        ...

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> Tensor:
        """Pictures (B, C, H, W) of these rows: bytes, or floats in [-1, 1]."""
        ...


class TensorPictures:
    """Pictures in memory: (n, C, H, W), bytes or floats in [-1, 1]."""

    def __init__(self, x: Tensor, labels: Tensor | None = None, words: str = "a tensor") -> None:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise LabError(f"pictures must be (n, 1 or 3, height, width), not {tuple(x.shape)}")
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise LabError(f"pictures of {x.dtype} have no stated scale: give uint8 in 0..255, or floats in [-1, 1]")
        self.x, self.words = x, words
        self.labels = torch.full((len(x),), -1) if labels is None else labels
        if len(self.labels) != len(x):
            raise LabError(f"{len(self.labels)} labels for {len(x)} pictures")

    @cached_property
    def sha256(self) -> str:
        """Of all numbers."""
        return fingerprint_of_tensors((self.x,), ())

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: Tensor) -> Tensor:
        """Pictures of these rows."""
        return self.x[rows]


class FilePictures:
    """The pictures of a .npz file in ADM's layout, read as they are needed; see `evaluation.adm`."""

    def __init__(self, file: AdmFile) -> None:
        self.file, self.words = file, file.path.name
        self.x, labels = file.pictures, file.labels
        self.labels = torch.full((len(self.x),), -1) if labels is None else torch.from_numpy(labels)

    @property
    def sha256(self) -> str:
        """Of the file."""
        return self.file.sha256

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: Tensor) -> Tensor:
        """Pictures of these rows, bytes."""
        return torch.from_numpy(np.array(self.x[rows.numpy()])).permute(0, 3, 1, 2)


class FolderPictures:
    """All picture files below a folder, in the order of their names, at their own size, which must be one for all."""

    def __init__(self, folder: Path | str) -> None:
        self.root = Path(folder).expanduser()
        self.files = sorted(
            str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.suffix.lower() in SUFFIXES
        )
        if not self.files:
            raise LabError(f"{self.root} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        self.words = f"folder {self.root.absolute().name}"
        self.labels = torch.full((len(self.files),), -1)
        self.size: tuple[int, int] | None = None

    @cached_property
    def sha256(self) -> str:
        """Of names, sizes and a sample of the bytes."""
        return file_facts(self.root, self.files).fingerprint

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, rows: Tensor) -> Tensor:
        """Pictures of these rows, bytes, in colour."""
        return torch.stack([self._read(self.files[row]) for row in rows.tolist()])

    def _read(self, name: str) -> Tensor:
        picture = read_picture(self.root / name)
        self.size = picture.size if self.size is None else self.size
        if picture.size != self.size:
            sizes = " and ".join(f"{w}x{h}" for w, h in (self.size, picture.size))
            raise LabError(f"{self.root} holds pictures of several sizes ({sizes}, {name}): bring them to one size first")
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class SplitPictures:
    """The images of a split, or of a part of it.

    Args:
        mirrored: every picture is followed, after all of them, by its mirror image: the expectation of random flips.
    """

    def __init__(self, images: ImageSet, words: str, mirrored: bool = False) -> None:
        self.images, self.mirrored = images, mirrored
        self.words = words + (" and their mirror images" if mirrored else "")

    @property
    def sha256(self) -> str:
        """The fingerprint of the images."""
        return digest(self.images.fingerprint, "mirrored") if self.mirrored else self.images.fingerprint

    @property
    def labels(self) -> Tensor:
        """(n,) int64."""
        return self.images.labels.repeat(2) if self.mirrored else self.images.labels

    def __len__(self) -> int:
        return len(self.images) * (2 if self.mirrored else 1)

    def batch(self, rows: Tensor) -> Tensor:
        """Pictures of these rows: bytes where the set has 256 levels, floats in [-1, 1] else."""
        n = len(self.images)
        x = self.images.__getitems__((rows % n).tolist()).x
        x = torch.where((rows < n)[:, None, None, None], x, x.flip(3)) if self.mirrored else x
        return ((x + 1) * 127.5).round().to(torch.uint8) if self.images.levels == 256 else x


class SomePictures:
    """Some rows of a set."""

    def __init__(self, pictures: PictureSet, rows: Tensor, words: str) -> None:
        self.pictures, self.rows, self.words = pictures, rows, words

    @cached_property
    def sha256(self) -> str:
        """Of the whole set and the rows."""
        return digest(self.pictures.sha256, ",".join(map(str, self.rows.tolist())))

    @property
    def labels(self) -> Tensor:
        """(n,) int64."""
        return self.pictures.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor) -> Tensor:
        """Pictures of these rows of the part."""
        return self.pictures.batch(self.rows[rows])


def picture_set(source: Any, what: str = "samples") -> PictureSet:
    """Pictures from what a user names: a .npz file in ADM's layout, a folder, a tensor, an array (n, H, W, C), or a set.

    Raises: LabError for anything else, and for a file or folder without pictures.
    """
    if isinstance(source, Tensor):
        return TensorPictures(source)
    if isinstance(source, np.ndarray):
        return TensorPictures(torch.from_numpy(source).permute(0, 3, 1, 2), words="an array")
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            return FolderPictures(path)
        if path.suffix == ".npz":
            file = AdmFile(path)
            if not file.has_pictures:
                raise LabError(f"{path} holds statistics and no pictures (arr_0): give it as --reference, not as {what}")
            return FilePictures(file)
        raise LabError(f"{what}: {path} is neither a folder of pictures nor a .npz file of them")
    if hasattr(source, "batch") and hasattr(source, "sha256"):
        return source
    raise LabError(f"{what} must be a .npz file, a folder, a tensor or an array of pictures, not {type(source).__name__}")


def rows_in_parts(count: int, size: int) -> Sequence[Tensor]:
    """The rows 0..count - 1 in parts of at most `size`."""
    return torch.arange(count).split(size) if count else []
