"""Which images a run is trained on: the settings, and the data sets that they name.

A data set is one file below `data/sets/` (or anywhere else) that registers an object with the methods of `DataSet`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from rrepa_lab.config import Config
from rrepa_lab.data.images import ImageSet
from rrepa_lab.errors import LabError
from rrepa_lab.registry import Registry


class DataConfig(Config):
    """Which images a run is trained on.

    Example:
        >>> config = DataConfig(name="digits", holdout=0.2)
        >>> config.levels, config.augments
        (17, False)
    """

    name: str = Field("digits", description="a registered data set: digits, folder, cifar10, imagenet, hub:<owner>/<name>")
    path: str | None = Field(
        None, description="an image folder, <split>/<class>/<picture> or <class>/<picture>; or the files of a published set"
    )
    download: bool = Field(False, description="fetch a published set that is not at data.path")
    cache: Literal["auto", "on", "off"] = Field(
        "auto", description="decode pictures once into the user's cache directory; auto: of files, up to cache_limit"
    )
    cache_limit: int = Field(4096, ge=0, description="MiB of a decoded split, at most, for cache=auto; larger: streamed")
    image_size: int = Field(8, ge=1, description="height and width; folder images are resized and cropped to it")
    channels: Literal[1, 3] = 1
    teacher_size: int | None = Field(
        None,
        ge=1,
        description="the teacher sees the original picture at this size, before the flow's resize; null: the flow's own",
    )
    flip: bool = Field(False, description="mirror half of the training images; not for digits or text")
    shift: int = Field(0, ge=0, description="move training images by up to so many pixels, each way; the rest is background")
    shift_probability: float = Field(1.0, ge=0, le=1, description="part of the training images that are shifted")
    holdout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="part of the training split set aside as `val`; 0: a tenth of a folder without splits",
    )

    bounds: list[str] = Field(
        [], description="where a folder was divided into splits, by class; filled in by a training, and kept with the run"
    )

    @field_validator("name")
    @classmethod
    def _registered(cls, name: str) -> str:
        return DATA_SETS.check(name)

    @model_validator(mode="after")
    def _teacher_sees_the_same(self) -> Self:
        if self.shift and self.teacher_size not in (None, self.image_size):
            raise ValueError(
                f"teacher_size is {self.teacher_size} and shift is {self.shift}: the original is not shifted; set data.shift=0"
            )
        return self

    @property
    def set(self) -> "DataSet":
        """The data set of this name."""
        return DATA_SETS[self.name]

    @property
    def levels(self) -> int:
        """Integer values that a number of an image can take: 17 for digits, 256 for 8-bit pictures."""
        return self.set.levels

    @property
    def augments(self) -> bool:
        """Whether a training image differs from one epoch to the next, noise aside."""
        return self.flip or bool(self.shift and self.shift_probability)

    @property
    def words(self) -> str:
        """The name of the data set; of an image folder also its own name: "folder photos"."""
        return f"{self.name} {self.root.name}" if self.name == "folder" and self.path is not None else self.name

    @property
    def root(self) -> Path:
        """data.path, absolute; LabError if it is not set."""
        if self.path is None:
            raise LabError(
                "data.path is not set: give the image folder (train --set data.path=photos, import-tarflow --data photos, "
                "or the config.json of a run)"
            )
        return Path(self.path).expanduser().absolute()


class DataSet(Protocol):
    """A named collection of images with its splits; `DATA_SETS.register(name)` adds one, `DATA_SETS.family` many.

    A set of grey pictures says so in an attribute `grey`.
    """

    levels: int  # integer values that a number of an image can take

    def classes(self, config: DataConfig) -> list[str]:
        """Class names in the order of their ids; none for images without labels."""
        ...

    def splits(self, config: DataConfig) -> dict[str, str]:
        """The splits that there are, of train, val and test: name -> the rule by which its images are chosen, in words."""
        ...

    def load(self, config: DataConfig, split: str, classes: Sequence[str] | None) -> ImageSet:
        """The images of one of these splits.

        Args:
            classes: the class names that label ids count, those of a run; None for those of the set.

        Raises: LabError for images that are not at hand, or a class that is not among `classes`.
        """
        ...


def named_data(name: str, size: int | None = None) -> dict[str, Any]:
    """Settings of a data set by its name, or of the colour pictures of a folder by its path.

    Args:
        size: height and width of a picture; 32 by default, and 8 for digits.

    Example:
        >>> DataConfig.from_dict(named_data("cifar10")).image_size
        32
    """
    if name == "digits":
        return {"name": "digits"}
    edge = 32 if size is None else size
    if name in DATA_SETS and name != "folder":
        return {"name": name, "image_size": edge, "channels": 3}
    return {"name": "folder", "path": str(Path(name).expanduser().absolute()), "image_size": edge, "channels": 3}


DATA_SETS: Registry[DataSet] = Registry("data set", "rrepa_lab.data.sets", order=("digits", "folder"))
