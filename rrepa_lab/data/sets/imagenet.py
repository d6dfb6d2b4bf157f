"""ImageNet and sets laid out like it, train/<synset>/ and val/<synset>/, with readable names where a list is at hand."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from rrepa_lab.data import layout
from rrepa_lab.data.config import DATA_SETS, DataConfig
from rrepa_lab.data.sets.folder import FolderImages
from rrepa_lab.errors import LabError
from rrepa_lab.readers import read_json, read_text

# lists of names as they are published: "n01440764 tench, Tinca tinca" a line, or {"0": ["n01440764", "tench"]}
NAME_LISTS = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt", "imagenet_class_index.json")


class ImageNet:
    """The folders train and val; val serves as `test`, and data.holdout sets aside a part of train as `val`.

    Classes are in the order of their synsets, as everywhere. They are called by the first of their names where one of
    NAME_LISTS lies beside train/ or up to three folders above it, else by the synset. Other folders (test/, whose labels are
    not public) are not read.
    """

    levels = 256

    def classes(self, config: DataConfig) -> list[str]:
        """The class folders of train/, or of val/ where there is no train/."""
        parts = self._parts(config)
        synsets = layout.filled_classes(parts.get("train", parts["test"]).folder)
        if not synsets:
            raise LabError(f"{parts['test'].folder} holds no class folders: sort the pictures into train/<synset>/<picture>")
        names = self._names(config)
        return [names[synset] for synset in synsets]

    def splits(self, config: DataConfig) -> dict[str, str]:
        """test = val/, and val a part of train/ where data.holdout is set."""
        return {split: part.rule for split, part in self._parts(config).items()}

    def load(self, config: DataConfig, split: str, classes: Sequence[str] | None) -> FolderImages:
        """The pictures of a split, decoded as they are needed."""
        parts = self._parts(config)
        if split not in parts:
            why = "set data.holdout, for example to 0.01" if split == "val" else f"there is no train/ in {config.root}"
            raise LabError(f"imagenet has no `{split}` split: {why}")
        names = self.classes(config) if classes is None else list(classes)
        own = self._names(config)
        if not layout.class_folders(parts[split].folder):
            raise LabError(f"{parts[split].folder} holds no class folders: sort the pictures into <synset>/<picture>")
        synsets = {name: synset for synset, name in own.items()}
        strangers = [own[synset] for synset in layout.class_folders(parts[split].folder) if own[synset] not in names]
        if strangers:
            advice = f"lay a list of names ({NAME_LISTS[0]}) beside train/" if strangers[0] in synsets.values() else "rename it"
            what = f"the class {strangers[0]!r} in {parts[split].folder} is not one of {layout.first_names(names)}"
            raise LabError(f"{what}: {advice}, or take it out")
        found = FolderImages(parts[split], [synsets.get(name, name) for name in names], config.image_size, config.channels)
        found.classes = names
        return found

    def _parts(self, config: DataConfig) -> dict[str, layout.Part]:
        root = config.root
        if not (root / "val").is_dir():
            raise LabError(f"no val/ at {root}: imagenet needs train/<synset>/<picture> and val/<synset>/<picture> there")
        found = layout.carved(root / "train", config.holdout, 0) if (root / "train").is_dir() else {}
        return found | {"test": layout.Part(root / "val", "test", 0, 0, "test = val/ (the published validation pictures)")}

    def _names(self, config: DataConfig) -> dict[str, str]:
        """Synset of either folder -> name; a name that two synsets share has the synset behind it."""
        listed = published_names(config.root)
        synsets = sorted({synset for part in self._parts(config).values() for synset in layout.class_folders(part.folder)})
        first = {synset: listed.get(synset, synset).split(",")[0].strip() or synset for synset in synsets}
        count = Counter(first.values())
        return {key: name if count[name] == 1 else f"{name} ({key})" for key, name in first.items()}


def published_names(root: Path) -> Mapping[str, str]:
    """Synset -> its names, from the first of NAME_LISTS in this folder or the three above it; empty without one."""
    for folder in [root, *root.parents][:4]:
        for name in NAME_LISTS:
            if (folder / name).is_file():
                return _read_names(folder / name, (folder / name).stat().st_mtime_ns)
    return {}


@lru_cache(maxsize=8)
def _read_names(path: Path, time: int) -> Mapping[str, str]:
    if path.suffix == ".json":
        rows = [row for row in read_json(path).values() if isinstance(row, list) and len(row) > 1]
        return {str(row[0]): str(row[1]).replace("_", " ") for row in rows}
    lines = [line.strip().partition("\t" if "\t" in line else " ") for line in read_text(path).splitlines()]
    return {synset: names for synset, _, names in lines if names}


DATA_SETS.register("imagenet")(ImageNet())
