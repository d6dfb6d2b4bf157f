"""The latents of a training split, encoded once and read by row and view: no picture is decoded or encoded again in a step."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from rrepa_lab.data.augment import views_of
from rrepa_lab.data.cache import ArraySpec, cached_with_bar
from rrepa_lab.data.fingerprint import cache_key
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.loaders import stream
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.space.contract import Space

# Latents have a standard deviation of 1, and the step from one float16 to the next is at most 0.002 below 4: a hundredth of the
# noise of 0.2 that a flow of latents is trained under. float32 would double the disk space (42 GB for ImageNet at 256 pixels).
DTYPE = "float16"


class LatentTable:
    """Latents (N, V, *shape) of the images of a split, on disk: V is 2 where images are mirrored (plain first), else 1."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    def __call__(self, rows: Sequence[int], mirrored: Tensor | None) -> Tensor:
        """x (B, *shape), float32 on the CPU, of these rows; mirrored (B,) says of which view."""
        view = np.zeros(len(rows), dtype=np.int64) if mirrored is None else mirrored.long().numpy()
        return torch.from_numpy(self.table[np.asarray(rows), view].astype(np.float32))


def wants_table(config: RunConfig, count: int) -> bool:
    """Whether the latents of `count` training images are kept: where they never change, and are read again."""
    space, t = config.space, config.train
    if space.is_pixels or space.cache == "off" or space.sample or config.data.shift:
        return False
    return space.cache == "on" or t.steps * t.batch > count * views(config)


def views(config: RunConfig) -> int:
    """Views of a training image: itself, and mirrored where `data.flip` is set."""
    return 2 if config.data.flip else 1


def latent_table(config: RunConfig, space: Space, images: ImageSet) -> LatentTable:
    """The table of a split; made first where the cache does not hold it, with a progress bar on a terminal.

    Raises: LabError as `data.cache.cached_array`, and for images that cannot be read.
    """
    about = cache_key(images) | {
        "picture": list(space.picture_shape), "space": config.space.kind, "statistics": space.statistics,
    }  # fmt: skip
    spec = ArraySpec("latents", (len(images), views(config), *space.shape), DTYPE, about)

    def fill(ranges: Sequence[range]) -> Iterable[np.ndarray]:
        for x, _ in stream(images, [list(rows) for rows in ranges], config.train.worker_count):
            shown = views_of(x, spec.shape[1]).unbind(1)
            yield torch.stack([space.encode(view).cpu() for view in shown], dim=1).numpy().astype(DTYPE)

    return LatentTable(cached_with_bar(spec, fill, "latents"))
