"""Data sets of the Hugging Face Hub, `hub:<owner>/<name>`, through the package `datasets` (extra [data])."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rrepa_lab.data.arrays import rows_of_split
from rrepa_lab.data.config import DATA_SETS, DataConfig
from rrepa_lab.data.fingerprint import SAMPLED, digest
from rrepa_lab.data.images import Batch, SplitImages
from rrepa_lab.data.layout import SHARE, SPLIT_NAMES, first_names
from rrepa_lab.data.pictures import DECODED, from_picture, picture_of_bytes, read_picture
from rrepa_lab.data.pixels import to_integers, to_unit
from rrepa_lab.errors import LabError

if TYPE_CHECKING:
    from datasets import Dataset

PREFERRED = ("label", "labels", "fine_label", "class", "target")  # columns that labels are taken from, the first that is there


class Source(NamedTuple):
    """One split of a set on the Hub, its pictures not decoded."""

    rows: Dataset
    picture: str  # column
    labels: np.ndarray  # (N,) int64, -1 without labels
    classes: list[str]


class HubImages(SplitImages):
    """Some rows of a split, decoded as they are needed: centre square, resized, 256 levels."""

    levels, decoded = 256, False

    def __init__(self, source: Source, rows: np.ndarray, classes: list[str], where: str, size: int, channels: int) -> None:
        self.source, self.rows, self.classes, self.where = source, rows, classes, where
        self.size, self.channels = size, channels
        own = np.array([*(classes.index(name) if name in classes else -1 for name in source.classes), -1], np.int64)
        self.labels: Tensor = torch.from_numpy(own[source.labels[rows]])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def stamp(self) -> str:
        """The fingerprint that `datasets` keeps of the files."""
        return str(self.source.rows._fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Of labels, class names, sizes of all pictures, and the bytes of 64 of them."""
        sizes = np.concatenate([np.zeros(0, np.int64), *_sizes(self.source)])[self.rows]
        step = max(1, len(self.rows) // SAMPLED)
        samples = [self._bytes(int(row)) for row in self.rows[::step][:SAMPLED]]
        return digest(*self.classes, sizes.tobytes(), self.labels.numpy().tobytes(), *samples)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of these rows; LabError naming a row that cannot be read."""
        chosen = [int(i) for i in indices]
        return Batch(torch.cat([self._read(int(self.rows[row])) for row in chosen]), self.labels[chosen])

    def _read(self, row: int) -> Tensor:
        found = self.source.rows[row][self.source.picture] or {}
        name = f"row {row} of {self.where}"
        try:
            if found.get("bytes"):
                picture = picture_of_bytes(found["bytes"], "the picture", DECODED * self.size)
            else:
                picture = read_picture(Path(found.get("path") or ""), DECODED * self.size)
        except LabError as error:
            raise LabError(f"{name}: {error}; take the row out") from None
        return to_unit(to_integers(from_picture(picture, self.channels, self.size), 256), 256)

    def _bytes(self, row: int) -> bytes:
        found = self.source.rows[row][self.source.picture] or {}
        if found.get("bytes"):
            return bytes(found["bytes"])
        path = Path(found.get("path") or "")
        return path.read_bytes() if path.is_file() else b""


class HubSet:
    """A set of the Hub by its id; `data.path` names a local copy (`save_to_disk`, or a folder that `load_dataset` reads)."""

    levels = 256

    def __init__(self, repo: str) -> None:
        owner, _, name = repo.partition("/")
        if not owner or not name or "/" in name:
            raise LabError(f"hub:{repo} is no data set of the Hub: give hub:<owner>/<name>")
        self.repo = repo

    def classes(self, config: DataConfig) -> list[str]:
        """The names of the label column; none without one."""
        parts = self._parts(config)
        return self._source(config, parts.get("train", parts["test"])[0]).classes

    def splits(self, config: DataConfig) -> dict[str, str]:
        """The set's own splits; those it lacks are parts of its training split, as for folders."""
        return {split: rule for split, (_, _, _, rule) in self._parts(config).items()}

    def load(self, config: DataConfig, split: str, classes: Sequence[str] | None) -> HubImages:
        """The pictures of a split, decoded as they are needed."""
        parts = self._parts(config)
        if split not in parts:
            raise LabError(f"hub:{self.repo} has no `{split}` split: {'set data.holdout' if split == 'val' else 'it has none'}")
        name, val, test, _ = parts[split]
        source = self._source(config, name)
        known = self.classes(config) if classes is None else list(classes)
        strangers = [one for one in source.classes if one not in known]
        if known and strangers:
            what = f"the class {strangers[0]!r} of hub:{self.repo} is not one of the classes {first_names(known)}"
            raise LabError(f"{what}: choose the data that the run was trained on")
        if known and not source.classes:
            raise LabError(f"the split {name} of hub:{self.repo} has no labels, and the classes are {first_names(known)}")
        rows = rows_of_split(source.labels, split, val, test) if val or test else np.arange(len(source.labels))
        if not len(rows):
            raise LabError(f"the split {name} of hub:{self.repo} holds no pictures for {split}")
        return HubImages(source, rows, known, f"the split {name} of hub:{self.repo}", config.image_size, config.channels)

    def _parts(self, config: DataConfig) -> dict[str, tuple[str, float, float, str]]:
        """Split -> the split of the set it is taken from, the parts of that for val and test, and the rule in words."""
        found = self._open(config)
        own = {}
        for split, spellings in SPLIT_NAMES.items():
            name = next((name for name in found if name.casefold() in spellings), None)
            if name is not None:
                own[split] = name
        if not own:
            own = {"train": next(iter(found))}
        held = config.holdout
        if {"val", "test"} <= own.keys():
            return {split: (name, 0.0, 0.0, f"{split} = the split {name}") for split, name in own.items()}
        last = own.get("test") or own.get("val")
        val, test = (held, 0.0) if last else (held or SHARE, SHARE)
        if val + test > 0.999:
            raise LabError(f"data.holdout is {val}: with {test:.0%} for test nothing is left to train on")
        parts = {}
        for split, share in {"train": 1 - val - test, "val": val, "test": test}.items():
            if "train" in own and share:
                what = "the split" if share == 1 else f"{share:.0%} of the split"
                how = "" if share == 1 else ", stratified, seed 0"
                parts[split] = (own["train"], val, test, f"{split} = {what} {own['train']}{how}")
        if last:
            parts["test"] = (last, 0.0, 0.0, f"test = the split {last}")
        return parts

    def _open(self, config: DataConfig) -> Mapping[str, Dataset]:
        if find_spec("datasets") is None:
            raise LabError(f"hub:{self.repo} needs the package datasets: pip install 'rrepa_lab[data]'")
        return _open(self.repo, None if config.path is None else config.root, config.download)

    def _source(self, config: DataConfig, name: str) -> Source:
        return _source(self.repo, None if config.path is None else config.root, config.download, name)


@lru_cache(maxsize=4)
def _open(repo: str, path: Path | None, download: bool) -> Mapping[str, Dataset]:
    """The splits of a set by their own names: from a local copy, the cache of `datasets`, or the Hub if that is asked for."""
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    def saved(folder: Path) -> bool:
        return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()

    where = f"hub:{repo} " + (f"at {path}" if path else "from the Hub" if download else "from the cache of datasets")
    if path is not None and not path.is_dir():
        raise LabError(f"{where}: there is no such folder; leave data.path out, and set data.download=true to fetch it")
    try:
        if path is not None:
            found = load_from_disk(str(path)) if saved(path) else load_dataset(str(path))
        else:
            found = load_dataset(repo) if download else _cached(repo)
    except Exception as error:  # of network, parsers and file systems
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = (
            "set data.download=true to fetch it, or data.path to a local copy" if not (path or download) else "is it whole?"
        )
        raise LabError(f"{where} cannot be read ({what[:200]}): {advice}") from None
    if isinstance(found, Dataset):
        return {"train": found}
    assert isinstance(found, DatasetDict)
    return {str(name): part for name, part in found.items()}


def _cached(repo: str) -> Any:
    """What `load_dataset` left in its cache; nothing is requested from the Hub."""
    from datasets import config
    from datasets.packaged_modules.cache.cache import Cache

    builder = Cache(cache_dir=str(config.HF_DATASETS_CACHE), dataset_name=repo.rpartition("/")[2], repo_id=repo,
                    version="auto", hash="auto")  # fmt: skip
    builder.download_and_prepare()
    return builder.as_dataset()


@lru_cache(maxsize=8)
def _source(repo: str, path: Path | None, download: bool, name: str) -> Source:
    """One split with its column of pictures, which are not decoded, and its labels."""
    from datasets import ClassLabel, Image

    rows = _open(repo, path, download)[name]
    pictures = [column for column, kind in rows.features.items() if isinstance(kind, Image)]
    if not pictures:
        raise LabError(f"the split {name} of hub:{repo} has no column of pictures; it has {first_names([*rows.features])}")
    labelled = [column for column, kind in rows.features.items() if isinstance(kind, ClassLabel)]
    labels = next((column for column in PREFERRED if column in labelled), labelled[0] if labelled else None)
    if labels is None:
        labels = next((column for column in PREFERRED if column in rows.features), None)
    rows = rows.cast_column(pictures[0], Image(decode=False))
    if labels is None:
        return Source(rows, pictures[0], np.full(len(rows), -1, np.int64), [])
    values = rows.select_columns([labels]).with_format("numpy")[:][labels]
    kind = rows.features[labels]
    if isinstance(kind, ClassLabel):
        return Source(rows, pictures[0], np.asarray(values, np.int64), list(kind.names))
    names, numbers = np.unique(np.asarray(values), return_inverse=True)
    return Source(rows, pictures[0], numbers.astype(np.int64), [str(one) for one in names.tolist()])


def _sizes(source: Source) -> Iterator[np.ndarray]:
    """Bytes of every picture, read off the offsets of the table where the pictures lie in it."""
    import pyarrow.compute as pc

    for batch in source.rows.select_columns([source.picture]).with_format("arrow").iter(batch_size=10_000):
        for chunk in batch[source.picture].chunks:
            inside = pc.fill_null(pc.binary_length(chunk.field("bytes")), -1).to_numpy(zero_copy_only=False).astype(np.int64)
            if (inside < 0).any():
                paths = chunk.field("path").to_pylist()
                inside = np.array([size if size >= 0 else _size(path) for size, path in zip(inside, paths, strict=True)])
            yield inside


def _size(path: str | None) -> int:
    return os.path.getsize(path) if path and os.path.isfile(path) else -1


DATA_SETS.family("hub")(HubSet)
