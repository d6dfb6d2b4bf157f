"""scikit-learn's handwritten digits: 1,797 images of 1 x 8 x 8 with 17 grey levels, part of a dependency."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from rrepa_lab.data.config import DATA_SETS, DataConfig
from rrepa_lab.data.images import TensorImages
from rrepa_lab.data.pixels import to_unit
from rrepa_lab.errors import LabError


class Digits:
    """`train_test_split(test_size=0.2, stratify=y, random_state=0)` on scikit-learn's order, x = X / 8 - 1."""

    levels, grey = 17, True

    def classes(self, config: DataConfig) -> list[str]:
        """ "0" to "9"."""
        return [str(digit) for digit in range(10)]

    def splits(self, config: DataConfig) -> dict[str, str]:
        """train and test, and val where `data.holdout` is set."""
        held = config.holdout
        parts = {"train": "80% of the digits" if not held else f"{1 - held:.0%} of those outside test"}
        if held:
            parts["val"] = f"{held:.0%} of those outside test"
        parts["test"] = "20% of the digits"
        return {split: f"{split} = {rule}, stratified, seed 0" for split, rule in parts.items()}

    def load(self, config: DataConfig, split: str, classes: Sequence[str] | None) -> TensorImages:
        """A split in memory; the class names are always those of the set."""
        if (config.image_size, config.channels) != (8, 1):
            raise LabError(f"digits are 1 x 8 x 8, not {config.channels} x {config.image_size} x {config.image_size}")
        return _split(split, config.holdout)


@lru_cache
def _split(split: str, holdout: float) -> TensorImages:
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


DATA_SETS.register("digits")(Digits())
