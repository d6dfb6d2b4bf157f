"""What the published sets share: torchvision's own files below `data.path`, or the same pictures in class folders."""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from rrepa_lab.data import layout
from rrepa_lab.data.arrays import ArrayImages, rows_of_split
from rrepa_lab.data.config import DATA_SETS, DataConfig
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.sets.folder import FolderImages
from rrepa_lab.errors import LabError
from rrepa_lab.paths import data_root


class Pictures(NamedTuple):
    """One half of a published set, as torchvision reads it."""

    pictures: np.ndarray  # (N, H, W) or (N, H, W, 3) uint8
    labels: np.ndarray  # (N,) int64


class PublishedSet(ABC):
    """A set that torchvision knows.

    `data.path` is the folder that torchvision would be given as its root, or an image folder (<split>/<class>/<picture>)
    whose class folders have the names of the classes. Without it the set is looked for in `paths.data_root`: torchvision's
    files, or an image folder with the name of the set. It is downloaded only with data.download=true.
    """

    levels = 256
    name: ClassVar[str]  # in data.name
    folder: ClassVar[str]  # of torchvision's files, below its root
    files: ClassVar[tuple[str, ...]]  # that it needs there
    names: ClassVar[tuple[str, ...]]  # of the classes, in the order of their ids

    @abstractmethod
    def read(self, root: Path, train: bool, download: bool) -> Pictures:
        """The training or test half by torchvision, downloaded first if that is asked for."""

    def classes(self, config: DataConfig) -> list[str]:
        """The published names, in the published order."""
        self._source(config)
        return list(self.names)

    def splits(self, config: DataConfig) -> dict[str, str]:
        """Train and test as they were published, and a part of train as val where data.holdout is set."""
        root, is_folder = self._source(config)
        if is_folder:
            return {split: part.rule for split, part in layout.parts(root, config.holdout).items()}
        held = config.holdout
        rules = {"train": "the published training pictures" + (f" but for {held:.0%}, stratified, seed 0" if held else "")}
        if held:
            rules["val"] = f"{held:.0%} of the published training pictures, stratified, seed 0"
        rules["test"] = "the published test pictures"
        return {split: f"{split} = {rule}" for split, rule in rules.items()}

    def load(self, config: DataConfig, split: str, classes: Sequence[str] | None) -> ImageSet:
        """A split: in memory, or of a folder as the pictures are needed."""
        root, is_folder = self._source(config)
        known = list(self.names) if classes is None else list(classes)
        if set(known) - {*self.names}:
            raise LabError(f"{self.name} has no class {min(set(known) - {*self.names})!r}: {layout.first_names(self.names)}")
        if split not in self.splits(config):
            raise LabError(f"{self.name} has no `{split}` split: set data.holdout, for example to 0.1")
        if is_folder:
            return self._of_folder(config, root, split, known)
        pictures, labels = self._read(root, split != "test", False)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.names):
            raise LabError(f"{root / self.folder} has labels {labels.min()}..{labels.max()}, not those of {self.name}")
        if len(labels) == 0:
            raise LabError(f"{root / self.folder} holds no pictures for {split}")
        rows = np.arange(len(labels)) if split == "test" else rows_of_split(labels, split, config.holdout)
        numbers = np.array([known.index(name) if name in known else -1 for name in self.names])
        return ArrayImages(pictures, numbers[labels], known, rows, config.image_size, config.channels)

    def _of_folder(self, config: DataConfig, root: Path, split: str, known: list[str]) -> ImageSet:
        """Pictures in class folders, which may write the names in their own manner: sweet-pepper, T-shirt_top."""
        part = layout.parts(root, config.holdout)[split]
        found = layout.class_names(root, config.holdout)
        if not found:
            raise LabError(f"{root} holds pictures without class folders: {self.name} has {layout.first_names(self.names)}")
        own = {_letters(name): name for name in layout.listing(part).classes}
        strangers = [name for key, name in own.items() if key not in map(_letters, self.names)]
        if strangers:
            what = f"the class {strangers[0]!r} in {part.folder} is not one of {self.name}: {layout.first_names(self.names)}"
            raise LabError(f"{what}; rename it, or take the folder as it is with data.name=folder")
        images = FolderImages(part, [own.get(_letters(name), name) for name in known], config.image_size, config.channels)
        images.classes = known
        return images

    def _source(self, config: DataConfig) -> tuple[Path, bool]:
        """Where the pictures are, and whether it is an image folder; they are downloaded first where that is asked for."""
        given = data_root() if config.path is None else config.root
        pictures = given / self.name if config.path is None else given
        own = given / self.folder
        root = given.parent if given.name == Path(self.folder).parts[0] and not own.is_dir() else given
        own = root / self.folder
        lacking = [name for name in self.files if not (own / name).is_file()]
        if not lacking:
            return root, False
        if not own.is_dir() and _has_folders(pictures):
            return pictures, True
        if config.download:
            self._read(root, True, True)
            return root, False
        if own.is_dir():
            raise LabError(f"{own} lacks {lacking[0]}: set data.download=true, or copy it there")
        where, below, fetch = f"there is nothing of it at {given}", "", "data.download=true"
        if config.path is None:
            where, below = f"data.path is not set, and {given} ($RREPA_DATA) holds nothing of it", f"{self.name}/ with "
            fetch = f"rrepa-lab data describe {self.name} --set {fetch}"
        raise LabError(
            f"{self.name}: {where}; expected {self.folder}/ with {self.files[0]} and {len(self.files) - 1} more files, or "
            f"{below}train/<class>/<picture> and test/<class>/<picture>; {fetch} fetches it"
        )

    def _read(self, root: Path, train: bool, download: bool) -> Pictures:
        times = [path.stat().st_mtime_ns for name in self.files if (path := root / self.folder / name).is_file()]
        try:
            return _read(self.name, root, train, download, max(times, default=0))
        except (LabError, MemoryError):
            raise
        except Exception as error:  # torchvision raises whatever a damaged file makes it stumble on
            what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            verb = "downloaded to" if download else "read from"
            again = "try again, or copy it there" if download else f"delete {root / self.folder} and download it again"
            raise LabError(f"{self.name} cannot be {verb} {root} ({what}): {again}") from None


@lru_cache(maxsize=4)
def _read(name: str, root: Path, train: bool, download: bool, time: int) -> Pictures:
    """`time` is that of the files' last change, so that others are read anew."""
    found = DATA_SETS[name]
    assert isinstance(found, PublishedSet)
    return found.read(root, train, download)


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(layout.visible(path.name) and path.is_dir() for path in folder.iterdir())


def _letters(name: str) -> str:
    """The letters and digits of a name, in lower case."""
    return "".join(filter(str.isalnum, name.casefold()))


def without_checksums(reader: Any, training_files: int | None = None) -> Any:
    """A reader of torchvision that takes files which are there as they are; what it downloads has been checked before.

    Args:
        training_files: of those that it lists for training, how many are needed.
    """
    lists: dict[str, Any] = {
        "train_list": [[name, None] for name, _ in reader.train_list[:training_files]],
        "test_list": [[name, None] for name, _ in reader.test_list],
    }
    if hasattr(reader, "meta"):
        lists["meta"] = {**reader.meta, "md5": None}
    return type(reader.__name__, (reader,), lists)


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of arrays and plain values; anything else in them, which could run code, is refused."""

    allowed = frozenset((
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"), ("numpy.core.numeric", "_frombuffer"),
    ))  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return super().find_class(module, name)


def check_pickle(path: Path) -> None:
    """LabError unless a pickle holds arrays and plain values alone, so that it is safe to read."""
    try:
        with path.open("rb") as file:
            _ArraysOnly(file, encoding="latin1").load()
    except (LabError, MemoryError):
        raise
    except Exception as error:
        raise LabError(f"{path} is damaged, or no file of this set ({error}): download it again") from None
