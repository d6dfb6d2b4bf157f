"""Names to images: `digits` works offline; `folder` reads any set of pictures in folders, see `data.folder`."""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rrepa_lab.config import Config
from rrepa_lab.data import folder
from rrepa_lab.data.folder import SPLITS
from rrepa_lab.data.images import Batch, ImageSet, TensorImages, missing_classes
from rrepa_lab.data.pictures import load_picture
from rrepa_lab.data.pixels import to_integers, to_unit
from rrepa_lab.data.subset import whole
from rrepa_lab.errors import LabError

__all__ = [
    "SPLITS", "Batch", "DataConfig", "DataFacts", "FolderImages", "ImageSet", "TensorImages", "check_data", "class_names",
    "describe_data", "load_split", "split_rule", "splits", "validation_split", "whole",
]  # fmt: skip


class DataConfig(Config):
    """Which images a run is trained on."""

    name: Literal["digits", "folder"] = "digits"
    path: str | None = Field(None, description="an image folder: <split>/<class>/<picture>, or <class>/<picture>")
    image_size: int = Field(8, ge=1, description="height and width; folder images are resized and cropped to it")
    channels: Literal[1, 3] = 1
    flip: bool = Field(False, description="mirror half of the training images; not for digits or text")
    shift: int = Field(0, ge=0, description="move training images by up to so many pixels, each way; the rest is background")
    shift_probability: float = Field(1.0, ge=0, le=1, description="part of the training images that are shifted")
    holdout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="part of the training split set aside as `val`; 0: a tenth of a folder without splits",
    )

    @property
    def levels(self) -> int:
        """Integer values that a number of an image can take: 17 for digits, 256 for 8-bit pictures."""
        return 17 if self.name == "digits" else 256

    @property
    def augments(self) -> bool:
        """Whether a training image differs from one epoch to the next, noise aside."""
        return self.flip or bool(self.shift and self.shift_probability)

    @property
    def root(self) -> Path:
        """The image folder, absolute; LabError if data.path is not set."""
        if self.path is None:
            raise LabError(
                "data.path is not set: give the image folder (train --set data.path=photos, import-tarflow --data photos, "
                "or the config.json of a run)"
            )
        return Path(self.path).expanduser().absolute()


class FolderImages:
    """A split read from picture files as they are needed: centre square, resized, 256 levels."""

    levels = 256

    def __init__(self, part: folder.Part, classes: Sequence[str] | None, size: int, channels: int) -> None:
        found = folder.listing(part, classes)
        self.root, self.size, self.channels = part.folder, size, channels
        self.classes, self.ignored = found.classes, dict(found.ignored)
        self.files = [name for names in found.files for name in names]
        numbers = range(len(found.files)) if found.classes else [-1]
        counts = torch.tensor([len(names) for names in found.files])
        self.labels: Tensor = torch.tensor(numbers, dtype=torch.long).repeat_interleave(counts)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def missing(self) -> list[str]:
        """Classes without a picture in this split."""
        return missing_classes(self.labels, self.classes)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of these files; LabError naming a file that cannot be read."""
        rows = [int(i) for i in indices]
        return Batch(torch.cat([self._read(self.files[row]) for row in rows]), self.labels[rows])

    def _read(self, name: str) -> Tensor:
        try:
            x = load_picture(self.root / name, self.channels, self.size)
        except LabError as error:
            raise LabError(f"{self.root / name}: {error}; mend the file, or take it out") from None
        return to_unit(to_integers(x, 256), 256)


def load_split(config: DataConfig, split: str, classes: Sequence[str] | None = None) -> ImageSet:
    """The images of one split: `train`, `val` or `test`; `split_rule` says where they come from.

    Digits: `train_test_split(test_size=0.2, stratify=y, random_state=0)` on scikit-learn's order, x = X / 8 - 1.

    Args:
        classes: the class names that labels count, those of a run; by default the classes of the set. A class without
            images in this split keeps its number, and is named in the attribute `missing`.

    Raises: LabError for an unknown split, one that the set does not have, and a class that is not among `classes`.
    """
    if split not in SPLITS:
        raise LabError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if config.name == "digits":
        if (config.image_size, config.channels) != (8, 1):
            raise LabError(f"digits are 1 x 8 x 8, not {config.channels} x {config.image_size} x {config.image_size}")
        return _digits(split, config.holdout)
    found = folder.parts(config.root, config.holdout)
    if split not in found:
        why = "set data.holdout, for example to 0.1" if split == "val" else "it holds held-out pictures only"
        raise LabError(f"{config.root} has no `{split}` split: {why}")
    if classes is None:
        classes = folder.class_names(config.root, config.holdout)
    return FolderImages(found[split], classes, config.image_size, config.channels)


def class_names(config: DataConfig) -> list[str]:
    """The classes of a set, in the order of their numbers; none for pictures without class folders."""
    return load_split(config, "train").classes if config.name == "digits" else folder.class_names(config.root, config.holdout)


def splits(config: DataConfig) -> tuple[str, ...]:
    """The splits that a set has: `val` is missing where nothing is set aside for it."""
    if config.name == "digits":
        return SPLITS if config.holdout else ("train", "test")
    found = folder.parts(config.root, config.holdout)
    return tuple(split for split in SPLITS if split in found)


def validation_split(config: DataConfig) -> str:
    """The split that a training is watched on: `val`, or `test` where there is no `val`."""
    return "val" if "val" in splits(config) else "test"


def split_rule(config: DataConfig, split: str) -> str:
    """Where the images of a split come from, in words: "test = val/ (no test folder)"."""
    if config.name == "digits":
        held = config.holdout
        train = "80% of the digits" if not held else f"{1 - held:.0%} of those outside test"
        parts = {"train": train, "test": "20% of the digits"} | ({"val": f"{held:.0%} of those outside test"} if held else {})
        return f"{split} = {parts[split]}, stratified, seed 0" if split in parts else f"no {split}: data.holdout is not set"
    found = folder.parts(config.root, config.holdout)
    return found[split].rule if split in found else f"no {split}"


class DataFacts(NamedTuple):
    """What a data set holds, found out before anything is trained on it."""

    classes: list[str]
    counts: dict[str, dict[str, int]]  # split -> class -> images; the class "" stands for images without a label
    ignored: dict[str, int]  # kind of entry -> how many were left out
    rules: dict[str, str]  # split -> where it comes from, in words
    missing: dict[str, list[str]]  # split -> classes without an image in it
    levels: int  # integer values a number can take


def check_data(config: DataConfig, classes: Sequence[str] | None = None) -> DataFacts:
    """Read the listing of every split, not the pictures; LabError in one line for what would end a training later."""
    names = list(classes) if classes is not None else class_names(config)
    counts, ignored, rules, missing, levels = {}, {}, {}, {}, 0
    for split in splits(config):
        images = load_split(config, split, names)
        found = torch.bincount(images.labels + 1, minlength=len(images.classes) + 1).tolist()
        counts[split] = dict(zip(images.classes, found[1:], strict=True)) if images.classes else {"": found[0]}
        rules[split], missing[split] = split_rule(config, split), missing_classes(images.labels, images.classes)
        levels = images.levels
        if isinstance(images, FolderImages):
            for kind, count in images.ignored.items():
                ignored[f"{kind} in {images.root.name}/"] = count
    if "train" not in counts:
        raise LabError(f"{config.root} has no train/: there is nothing to train on")
    return DataFacts(names, counts, ignored, rules, missing, levels)


def describe_data(config: DataConfig) -> dict[str, str]:
    """The facts of `check_data` in words: classes, images and rule of each split, and what was ignored."""
    facts = check_data(config)
    names = ", ".join(facts.classes[:10]) + (", ..." if len(facts.classes) > 10 else "")
    told = {"classes": f"{len(facts.classes)}: {names}" if names else "none: pictures without class folders"}
    for split, counts in facts.counts.items():
        lacking = f"; none of {', '.join(facts.missing[split])}" if facts.missing[split] else ""
        told[split] = f"{sum(counts.values())} images ({facts.rules[split]}){lacking}"
    if facts.ignored:
        told["ignored"] = ", ".join(f"{count} {kind}" for kind, count in facts.ignored.items())
    return told


@lru_cache
def _digits(split: str, holdout: float) -> TensorImages:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    train, test = train_test_split(rows, test_size=0.2, stratify=digits.target, random_state=0)
    parts = {"train": train, "test": test}
    if holdout:
        classes, held = len(digits.target_names), math.ceil(holdout * len(train))
        if min(held, len(train) - held) < classes:
            raise LabError(
                f"data.holdout={holdout:g} divides {len(train)} training images into {len(train) - held} and {held}: "
                f"each part needs at least one image of each of the {classes} classes"
            )
        kept, val = train_test_split(train, test_size=holdout, stratify=digits.target[train], random_state=0)
        parts |= {"train": kept, "val": val}
    if split not in parts:
        raise LabError("digits have no `val` split unless data.holdout is set, for example --set data.holdout=0.2")
    chosen = parts[split]
    x = to_unit(torch.from_numpy(digits.images[chosen])[:, None], levels=17)
    return TensorImages(x, torch.from_numpy(digits.target[chosen]).long(), [str(name) for name in digits.target_names], 17)
