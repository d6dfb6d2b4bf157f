"""The teacher's features of all training images, computed once and looked up by row and view.

A view is an image as it is, or mirrored. Small tables lie in memory on the device (float32, on the flow's grid); others on disk
(float16, memory-mapped), keyed by the fingerprints of the images and of the teacher, on the coarser of the two grids: features
of a finer teacher are averaged before they are stored, those of a coarser one are interpolated when they are read.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rrepa_lab.data.augment import views_of
from rrepa_lab.data.cache import ArraySpec, cached_with_bar
from rrepa_lab.data.fingerprint import cache_key
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.loaders import stream

CHUNK = 64  # images in one pass of the teacher when a table is made
# Features have norms of order 1 to 100; float16 rounds each number by at most 5e-4 of itself, which changes a cosine by less
# than 1e-6. Values beyond its range are cut off.
DTYPE, LARGEST = "float16", 65504.0


@dataclass(frozen=True)
class FeatureTable:
    """Features (N, V, n, E) of the views of N images: V is 2 where images are mirrored (plain first), else 1.

    Args:
        values: a tensor on the device, or an array on disk.
        on_grid: features (B, n, E) as they are stored -> (B, T, E) on the flow's grid.
    """

    values: Tensor | np.ndarray
    device: torch.device
    on_grid: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.values)

    def __call__(self, rows: Sequence[int], mirrored: Tensor | None = None) -> Tensor:
        """(B, T, E), float32 on the device, of these rows; mirrored (B,) says of which view."""
        view = torch.zeros(len(rows), dtype=torch.long) if mirrored is None else mirrored.long().cpu()
        if isinstance(self.values, Tensor):
            return self.values[torch.tensor(rows, device=self.device), view.to(self.device)]
        found = torch.from_numpy(self.values[np.asarray(rows), view.numpy()])
        return self.on_grid(found.to(self.device).float())


Read = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> features (B, n, E) as they are stored


def in_memory(images: ImageSet, views: int, read: Read, device: torch.device, num_workers: int) -> Tensor:
    """(N, V, n, E), made in the order of the rows, so that its numbers depend on the images alone."""
    parts = [read(x.to(device)) for x in _passes(images, views, num_workers)]
    return torch.cat(parts).unflatten(0, (len(images), views))


def feature_spec(images: ImageSet, views: int, patches: int, dim: int, teacher: str, picture: Sequence[int]) -> ArraySpec:
    """The array of a table on disk.

    Args:
        teacher: fingerprint of weights, preprocessing and layer.
        picture: (C, H, W) that it is given.
    """
    about = cache_key(images) | {"teacher": teacher, "picture": list(picture)}
    return ArraySpec("features", (len(images), views, patches, dim), DTYPE, about)


def on_disk(images: ImageSet, spec: ArraySpec, read: Read, device: torch.device, num_workers: int) -> np.ndarray:
    """The array of `spec`, made first where the cache does not hold it, with a progress bar on a terminal.

    The teacher computes in float32, whatever the precision of the training is.

    Raises: LabError as `data.cache.cached_array`, and for images that cannot be read.
    """
    views = spec.shape[1]

    def fill(ranges: Sequence[range]) -> Iterable[np.ndarray]:
        for rows in ranges:
            with torch.autocast(device.type, enabled=False):  # within it a CPU does not join float16 tensors either
                parts = [read(x.to(device)).float().clamp(-LARGEST, LARGEST) for x in _passes(images, views, num_workers, rows)]
                made = torch.cat([part.half().cpu() for part in parts])
            yield made.unflatten(0, (len(rows), views)).numpy()

    return cached_with_bar(spec, fill, "teacher")


def _passes(images: ImageSet, views: int, num_workers: int, rows: range | None = None) -> Iterable[Tensor]:
    """Images of some rows (all by default) for one pass each; the views of an image stand side by side."""
    chosen = torch.arange(len(images)) if rows is None else torch.tensor(list(rows))
    chunks = [part.tolist() for part in chosen.split(CHUNK)]
    for x, _ in stream(images, chunks, num_workers):
        yield views_of(x, views).flatten(0, 1)
