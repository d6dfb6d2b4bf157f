"""The splits of a run's data: which there are, by which rule, and their images."""

from collections.abc import Sequence
from contextlib import suppress

from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.decoded import with_cache
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.layout import SPLITS
from rrepa_lab.errors import LabError


def load_split(config: DataConfig, split: str, classes: Sequence[str] | None = None) -> ImageSet:
    """The images of one split: `train`, `val` or `test`; `split_rule` says how they are chosen.

    Args:
        classes: the class names that label ids count, those of a run; by default the classes of the set. A class without
            images in this split keeps its id, and is named in the attribute `missing`.

    Raises: LabError for an unknown split, one that the set does not have, and a class that is not among `classes`.

    Example:
        >>> images = load_split(DataConfig(name="digits"), "test")
        >>> len(images), images.__getitems__([0, 1]).x.shape
        (360, torch.Size([2, 1, 8, 8]))
    """
    if split not in SPLITS:
        raise LabError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return config.set.load(config, split, classes)


def read_split(config: DataConfig, split: str, classes: Sequence[str] | None = None) -> ImageSet:
    """The same images as `load_split`, decoded once and read from the cache where `data.cache` has them kept there.

    They are decoded when all of them are needed (`data.decoded.prepare`); a few are read from their files until then.
    """
    return with_cache(load_split(config, split, classes), config)


def class_names(config: DataConfig) -> list[str]:
    """The classes of a data set, in the order of their ids; none for pictures without class folders."""
    return config.set.classes(config)


def splits(config: DataConfig) -> tuple[str, ...]:
    """The splits that a data set has: `val` is missing where nothing is set aside for it."""
    found = config.set.splits(config)
    return tuple(split for split in SPLITS if split in found)


def available_splits(config: DataConfig) -> tuple[str, ...]:
    """The splits that can be found here, none where the data set is missing; no image is read and nothing downloaded."""
    with suppress(LabError):
        return splits(config.model_copy(update={"download": False}))
    return ()


def validation_split(config: DataConfig) -> str:
    """The split that a training is validated on: `val`, or `test` where there is no `val`."""
    return "val" if "val" in splits(config) else "test"


def split_rule(config: DataConfig, split: str) -> str:
    """How the images of a split are chosen, in words: "test = val/ (no test folder)"."""
    return config.set.splits(config).get(split, f"no {split}")
