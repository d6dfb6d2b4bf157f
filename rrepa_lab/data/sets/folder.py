"""Pictures in folders; `data.layout` says which layouts are read and how they are divided into splits."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rrepa_lab.data import layout
from rrepa_lab.data.config import DATA_SETS, DataConfig
from rrepa_lab.data.fingerprint import FileFacts, file_facts
from rrepa_lab.data.images import Batch, SplitImages
from rrepa_lab.data.pictures import load_picture
from rrepa_lab.data.pixels import to_integers, to_unit
from rrepa_lab.errors import LabError


class FolderImages(SplitImages):
    """A split read from picture files as they are needed: centre square, resized, 256 levels."""

    levels, decoded = 256, False

    def __init__(
        self, part: layout.Part, classes: Sequence[str] | None, size: int, channels: int, described: Path | None = None
    ) -> None:
        found = layout.listing(part, classes)
        self.described = part.folder if described is None else described  # the folder of all splits, for messages
        self.root, self.size, self.channels = part.folder, size, channels
        self.classes = found.classes
        self.ignored = {f"{kind} in {part.folder.name}/": count for kind, count in found.ignored.items()}
        self.files = [name for names in found.files for name in names]
        numbers = range(len(found.files)) if found.classes else [-1]
        counts = torch.tensor([len(names) for names in found.files])
        self.labels: Tensor = torch.tensor(numbers, dtype=torch.long).repeat_interleave(counts)

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def _facts(self) -> FileFacts:
        return file_facts(self.root, self.files)

    @property
    def fingerprint(self) -> str:
        """Of the names in this order, the sizes, and a sample of the bytes."""
        return self._facts.fingerprint

    @property
    def stamp(self) -> str:
        """Of the folder and the times of the files' last changes."""
        return self._facts.stamp

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of these files; LabError naming a file that cannot be read."""
        rows = [int(i) for i in indices]
        return Batch(torch.cat([self._read(self.files[row]) for row in rows]), self.labels[rows])

    def _read(self, name: str) -> Tensor:
        try:
            x = load_picture(self.root / name, self.channels, self.size)
        except LabError as error:
            all_of_them = f"`rrepa-lab data describe {self.described} --decode` finds all of them"
            raise LabError(f"{self.root / name}: {error}; mend the file, or take it out; {all_of_them}") from None
        return to_unit(to_integers(x, 256), 256)


class Folder:
    """The image folder that `data.path` names."""

    levels = 256

    def classes(self, config: DataConfig) -> list[str]:
        """The class folders of train/, alphabetically."""
        return layout.class_names(config.root, config.holdout)

    def splits(self, config: DataConfig) -> dict[str, str]:
        """The folder's own splits, or parts of its training pictures."""
        return {split: part.rule for split, part in layout.parts(config.root, config.holdout).items()}

    def bounds(self, config: DataConfig, classes: Sequence[str]) -> list[str]:
        """Where the division into splits lies, for `data.bounds`."""
        return layout.bounds_of(config.root, config.holdout, classes)

    def load(self, config: DataConfig, split: str, classes: Sequence[str] | None) -> FolderImages:
        """The pictures of a split, decoded as they are needed."""
        found = layout.parts(config.root, config.holdout, config.bounds)
        if split not in found:
            why = "set data.holdout, for example to 0.1" if split == "val" else "it holds held-out pictures only"
            raise LabError(f"{config.root} has no `{split}` split: {why}")
        names = self.classes(config) if classes is None else classes
        return FolderImages(found[split], names, config.image_size, config.channels, config.root)


DATA_SETS.register("folder")(Folder())
