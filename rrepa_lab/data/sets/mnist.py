"""MNIST: 60,000 + 10,000 grey handwritten digits of 28 x 28 (LeCun et al. 1998)."""

from pathlib import Path
from typing import Any

import numpy as np

from rrepa_lab.data.config import DATA_SETS
from rrepa_lab.data.sets._published import Pictures, PublishedSet


class Mnist(PublishedSet):
    """The four files of the set, unpacked, in `MNIST/raw`."""

    grey = True
    name, folder = "mnist", "MNIST/raw"
    files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    names = tuple(map(str, range(10)))

    def reader(self) -> Any:
        """torchvision's class."""
        from torchvision.datasets import MNIST

        return MNIST

    def read(self, root: Path, train: bool, download: bool) -> Pictures:
        """By torchvision's class."""
        found = self.reader()(root, train=train, download=download)
        if len(found.data) != len(found.targets):
            raise ValueError(f"{len(found.data)} pictures and {len(found.targets)} labels")
        return Pictures(found.data.numpy(), found.targets.numpy().astype(np.int64))


DATA_SETS.register("mnist")(Mnist())
