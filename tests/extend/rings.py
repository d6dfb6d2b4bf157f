"""A data set: rings of two sizes, drawn by a formula."""

from collections.abc import Sequence

import torch

import rrepa_lab as rl
from rrepa_lab.data.config import DATA_SETS
from rrepa_lab.data.images import TensorImages

SIZES = {"train": 96, "test": 48}


class Rings:
    """8 x 8 images; the radius says the class, the centre varies."""

    levels = 256

    def classes(self, config: rl.DataConfig) -> list[str]:
        """Two."""
        return ["small", "large"]

    def splits(self, config: rl.DataConfig) -> dict[str, str]:
        """Train and test."""
        return {split: f"{split} = {count} rings, seed {len(split)}" for split, count in SIZES.items()}

    def load(self, config: rl.DataConfig, split: str, classes: Sequence[str] | None) -> TensorImages:
        """The same images in every call."""
        y = torch.arange(SIZES[split]) % 2
        centre = 3.5 + torch.rand(len(y), 2, 1, 1, generator=torch.Generator().manual_seed(len(split))) - 0.5
        rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        radius = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2).sqrt()
        x = torch.exp(-((radius - 1.5 - 1.5 * y[:, None, None]) ** 2)) * 2 - 1
        return TensorImages(x[:, None], y, self.classes(config), self.levels)


DATA_SETS.register("rings")(Rings())
