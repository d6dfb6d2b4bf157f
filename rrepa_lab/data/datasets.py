"""Names to images: `digits` works offline; `folder` reads any set laid out as <split>/<class>/<file>."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rrepa_lab.config import Config
from rrepa_lab.data.pixels import to_unit
from rrepa_lab.errors import LabError

SPLITS = ("train", "val", "test")


class DataConfig(Config):
    """Which images a run is trained on."""

    name: Literal["digits", "folder"] = "digits"
    path: str | None = Field(None, description="root of an image folder with train/ and val/ or test/ inside")
    image_size: int = Field(8, ge=1, description="height and width; folder images are resized and cropped to it")
    channels: Literal[1, 3] = 1
    flip: bool = Field(False, description="mirror half of the training images; not for digits or text")
    shift: int = Field(0, ge=0, description="move training images by up to so many pixels, each way; the rest is background")
    shift_probability: float = Field(1.0, ge=0, le=1, description="part of the training images that are shifted")
    holdout: float = Field(0.0, ge=0, lt=1, description="part of the training split set aside as `val`")

    @property
    def augments(self) -> bool:
        """Whether a training image differs from one epoch to the next, noise aside."""
        return self.flip or bool(self.shift and self.shift_probability)


class Batch(NamedTuple):
    """Images with their labels."""

    x: Tensor  # (B, C, H, W) float32 in [-1, 1]
    y: Tensor  # (B,) int64


@runtime_checkable
class ImageSet(Protocol):
    """A split: its length, batches by index, and what the numbers mean."""

    classes: list[str]
    levels: int  # integer values a number can take

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch: ...


class TensorImages:
    """A split that lies in memory."""

    def __init__(self, x: Tensor, y: Tensor, classes: list[str], levels: int) -> None:
        self.x, self.y, self.classes, self.levels = x, y, classes, levels

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of these rows."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        return Batch(self.x[rows], self.y[rows])


class FolderImages:
    """A split read from picture files as they are needed: shorter edge resized, centre cropped."""

    levels = 256

    def __init__(self, root: Path, config: DataConfig) -> None:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        if not root.is_dir():
            raise LabError(f"no image folder at {root}: expected <split>/<class>/<picture> below data.path")
        size = config.image_size
        prepare = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
        mode = "L" if config.channels == 1 else "RGB"
        self._files = ImageFolder(str(root), transform=lambda picture: prepare(picture.convert(mode)))
        self.classes = list(self._files.classes)

    def __len__(self) -> int:
        return len(self._files)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of these files."""
        pairs = [self._files[int(i)] for i in indices]
        return Batch(to_unit(torch.stack([x for x, _ in pairs]), 256), torch.tensor([y for _, y in pairs]))


def load_split(config: DataConfig, split: str) -> ImageSet:
    """The images of one split: `train`, `val` (needs data.holdout, or a val folder) or `test`.

    Digits: `train_test_split(test_size=0.2, stratify=y, random_state=0)` on scikit-learn's order, x = X / 8 - 1.
    """
    if split not in SPLITS:
        raise LabError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if config.name == "digits":
        if (config.image_size, config.channels) != (8, 1):
            raise LabError(f"digits are 1 x 8 x 8, not {config.channels} x {config.image_size} x {config.image_size}")
        return _digits(split, config.holdout)
    if config.path is None:
        raise LabError(
            "data.path is not set: give the image folder (train --set data.path=photos, import-tarflow --data photos, "
            "or the config.json of a run)"
        )
    return _folder(config, split)


def _folder(config: DataConfig, split: str) -> ImageSet:
    root = Path(str(config.path)).expanduser()
    # sets often come with one held-out folder only, under either name
    held_out = {"val": "test", "test": "val"}.get(split)
    if held_out and not (root / split).is_dir() and (root / held_out).is_dir():
        split = held_out
    return FolderImages(root / split, config)


@lru_cache
def _digits(split: str, holdout: float) -> TensorImages:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    train, test = train_test_split(rows, test_size=0.2, stratify=digits.target, random_state=0)
    parts = {"train": train, "test": test}
    if holdout:
        kept, val = train_test_split(train, test_size=holdout, stratify=digits.target[train], random_state=0)
        parts |= {"train": kept, "val": val}
    if split not in parts:
        raise LabError("digits have no `val` split unless data.holdout is set, for example --set data.holdout=0.2")
    chosen = parts[split]
    x = to_unit(torch.from_numpy(digits.images[chosen])[:, None], levels=17)
    return TensorImages(x, torch.from_numpy(digits.target[chosen]).long(), [str(name) for name in digits.target_names], 17)


def whole(images: ImageSet, limit: int | None = None) -> Batch:
    """A split as one batch, or its first `limit` images."""
    count = len(images) if limit is None else min(limit, len(images))
    return images.__getitems__(range(count))
