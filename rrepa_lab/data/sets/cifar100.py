"""CIFAR-100: 50,000 + 10,000 colour pictures of 32 x 32 in 100 classes (Krizhevsky 2009)."""

from pathlib import Path

from rrepa_lab.data.config import DATA_SETS
from rrepa_lab.data.sets._published import Pictures, PublishedSet
from rrepa_lab.data.sets.cifar10 import read_cifar

NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar
cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl
hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


class Cifar100(PublishedSet):
    """The python version of the set with its fine labels, in `cifar-100-python`."""

    name, folder = "cifar100", "cifar-100-python"
    files = ("train", "test", "meta")
    names = tuple(NAMES.split())

    def read(self, root: Path, train: bool, download: bool) -> Pictures:
        """By torchvision's CIFAR100."""
        from torchvision.datasets import CIFAR100

        return read_cifar(CIFAR100, self, root, train, download)


DATA_SETS.register("cifar100")(Cifar100())
