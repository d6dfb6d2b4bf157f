"""CIFAR-10: 50,000 + 10,000 colour pictures of 32 x 32 in 10 classes (Krizhevsky 2009)."""

from pathlib import Path
from typing import Any

import numpy as np

from rrepa_lab.data.config import DATA_SETS
from rrepa_lab.data.sets._published import Pictures, PublishedSet, check_pickle, without_checksums


class Cifar10(PublishedSet):
    """The python version of the set, in `cifar-10-batches-py`."""

    name, folder = "cifar10", "cifar-10-batches-py"
    files = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def read(self, root: Path, train: bool, download: bool) -> Pictures:
        """By torchvision's CIFAR10."""
        from torchvision.datasets import CIFAR10

        return read_cifar(CIFAR10, self, root, train, download)


def read_cifar(reader: Any, which: PublishedSet, root: Path, train: bool, download: bool) -> Pictures:
    """A half of CIFAR-10 or CIFAR-100; what is downloaded is compared with its checksum, other files are checked here."""
    if download:
        reader(root, train=train, download=True)

    for name in which.files:
        check_pickle(root / which.folder / name)
    found = without_checksums(reader)(root, train=train)
    return Pictures(np.ascontiguousarray(found.data), np.asarray(found.targets, np.int64))


DATA_SETS.register("cifar10")(Cifar10())
