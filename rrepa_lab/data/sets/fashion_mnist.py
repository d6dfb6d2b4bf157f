"""Fashion-MNIST: 60,000 + 10,000 grey pictures of clothes, 28 x 28 (Xiao et al. 2017)."""

from typing import Any

from rrepa_lab.data.config import DATA_SETS
from rrepa_lab.data.sets.mnist import Mnist


class FashionMnist(Mnist):
    """The four files of the set, unpacked, in `FashionMNIST/raw`."""

    name, folder = "fashion-mnist", "FashionMNIST/raw"
    names = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

    def reader(self) -> Any:
        """torchvision's class."""
        from torchvision.datasets import FashionMNIST

        return FashionMNIST


DATA_SETS.register("fashion-mnist")(FashionMnist())
