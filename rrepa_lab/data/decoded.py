"""Sets whose pictures are decoded, resized and cropped once, and read from a memory map from then on.

The array is one of `data.cache`, below the user's cache directory: uint8 (N, H, W, C), keyed by fingerprint and stamp of the
set and by the size of an image.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rrepa_lab.data.cache import ArraySpec, cached_array, is_complete
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.fingerprint import cache_key
from rrepa_lab.data.images import Batch, ImageSet
from rrepa_lab.data.loaders import stream
from rrepa_lab.data.pictures import DECODER
from rrepa_lab.data.pixels import to_integers, to_unit
from rrepa_lab.progress import progress
from rrepa_lab.readers import MIB

MOST_WORKERS = 8
FEW = 2000  # pictures that are decoded in this process: starting others would take longer
BAR = 5000  # pictures from which a bar is shown


class CachedImages:
    """A set read from its decoded pictures where they are at hand, else from its source.

    `prepare` makes them; until then, and where they may not be kept, the source is read. Attributes that are not those of
    every ImageSet (`files`, `ignored`) are the source's.

    Args:
        config: image size, channels, `cache` and `cache_limit`.
    """

    def __init__(self, source: ImageSet, config: DataConfig) -> None:
        self.source, self.config = source, config
        self.classes, self.levels = source.classes, source.levels
        self._array: np.ndarray | None = None
        self._looked = False

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self.source.labels

    @property
    def fingerprint(self) -> str:
        """That of the source."""
        return self.source.fingerprint

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "source":  # a copy that is being unpickled has no source yet
            raise AttributeError(name)
        return getattr(self.source, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None, "_looked": False}  # another process opens the map itself

    @property
    def spec(self) -> ArraySpec:
        """Which array holds the decoded pictures."""
        size, channels = self.config.image_size, self.config.channels
        about = {**cache_key(self.source), "decoder": DECODER, "name": self.config.name}
        return ArraySpec("pictures", (len(self), size, size, channels), "uint8", about)

    @property
    def keeps(self) -> bool:
        """Whether the settings have the decoded pictures kept on disk."""
        size = len(self) * self.config.image_size**2 * self.config.channels
        return self.config.cache == "on" or size <= self.config.cache_limit * MIB

    @property
    def decoded(self) -> bool:
        """Whether the pictures are read from the memory map."""
        return self._open() is not None

    def prepare(self) -> None:
        """Decode all pictures into the cache, if the settings have them kept there and they are not.

        Raises: LabError naming a file that cannot be read, or a disk that cannot be written; the rows done are kept.
        """
        if not self.keeps or self._open() is not None:
            return
        count = len(self)
        with progress(count, "picture", label="decoding") if count >= BAR else nullcontext() as bar:

            def watch(done: int, _total: int) -> None:
                if bar is not None:
                    bar.update(done - bar.n)

            self._array = cached_array(self.spec, self._decode, watch)

    def _decode(self, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        rows = sum(map(len, ranges))
        workers = 0 if rows < FEW else min(MOST_WORKERS, os.cpu_count() or 1)
        for x, _ in stream(self.source, [list(part) for part in ranges], workers):
            yield to_integers(x, 256).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    def _open(self) -> np.ndarray | None:
        """The map, if it is complete; whether it is, is looked up once."""
        if self._array is None and not self._looked:
            self._looked = True
            if self.keeps and is_complete(self.spec):
                self._array = cached_array(self.spec, self._decode)
        return self._array

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Batch of these rows."""
        array = self._open()
        if array is None:
            return self.source.__getitems__(indices)
        rows = np.asarray(indices, np.int64)
        x = to_unit(torch.from_numpy(array[rows]).permute(0, 3, 1, 2).contiguous(), 256)
        return Batch(x, self.labels[torch.from_numpy(rows)])


def with_cache(images: ImageSet, config: DataConfig) -> ImageSet:
    """The set, read from decoded pictures where `data.cache` has them kept; the set itself where they need no decoding."""
    decoded = getattr(images, "decoded", None)  # False of sets that decode files, or resize what lies in memory
    useful = decoded is False or (decoded is None and config.cache == "on")
    return CachedImages(images, config) if useful and config.cache != "off" and images.levels == 256 else images


def prepare(images: ImageSet) -> ImageSet:
    """Have a set decode all its pictures now, if it keeps them (`CachedImages.prepare`); returns the set itself."""
    make = getattr(images, "prepare", None)
    if make is not None:
        make()
    return images
