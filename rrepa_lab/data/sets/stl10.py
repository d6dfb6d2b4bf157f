"""STL-10: 5,000 + 8,000 colour pictures of 96 x 96 in 10 classes (Coates et al. 2011); the unlabelled ones are not read."""

from pathlib import Path

import numpy as np

from rrepa_lab.data.config import DATA_SETS
from rrepa_lab.data.sets._published import Pictures, PublishedSet, without_checksums


class Stl10(PublishedSet):
    """The binary version of the set, in `stl10_binary`."""

    name, folder = "stl10", "stl10_binary"
    files = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

    def read(self, root: Path, train: bool, download: bool) -> Pictures:
        """By torchvision's STL10; what is downloaded is compared with its checksum."""
        from torchvision.datasets import STL10

        if download:
            STL10(root, split="train", download=True)
        found = without_checksums(STL10, training_files=2)(root, split="train" if train else "test")
        if len(found.data) != len(found.labels):
            raise ValueError(f"{len(found.data)} pictures and {len(found.labels)} labels")
        return Pictures(np.ascontiguousarray(found.data.transpose(0, 2, 3, 1)), found.labels.astype(np.int64))


DATA_SETS.register("stl10")(Stl10())
