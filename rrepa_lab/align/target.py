"""Targets of the alignment: the teacher's features on the grid of the flow's tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.align.teacher import Teacher
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.loaders import stream

CHUNK = 64  # images in one pass of the teacher when a table is made


def match_grid(features: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Resample patch features (B, n, E) from the encoder's grid to the flow's (B, side * side, E).

    Averages where the encoder is finer, interpolates where it is coarser; the same tensor when the grids agree.
    """
    if grid == (side, side):
        return features
    maps = features.transpose(1, 2).unflatten(2, grid)
    if min(grid) >= side:
        maps = F.adaptive_avg_pool2d(maps, side)
    else:
        maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def grid_hint(teacher: Teacher, side: int) -> str:
    """What to set so that a teacher has one patch for each of the flow's side x side tokens; "" if it has at least one.

    A vision Transformer with patches of 16 pixels has a grid of 14x14 at 224 pixels. For 16x16 tokens its features are
    interpolated, while images of 256 pixels give 16x16 patches.
    """
    rows, columns = teacher.grid
    if min(rows, columns) >= side:
        return ""
    size = teacher.config.image_size * side // rows
    exact = teacher.config.image_size % rows == 0
    advice = f"; encoder.image_size={size} gives {side}x{side} patches, if the model takes that size" if exact else ""
    return f"the teacher has {rows}x{columns} patches for {side}x{side} tokens, and its features are interpolated{advice}"


class Targets:
    """Maps clean images to the teacher's features on the grid of a flow with `side` tokens along an edge.

    With a table they are taken from it by row, and the teacher itself is released. A table is made up front and in the order
    of the rows, so that its numbers depend on the images alone: a resumed run makes the same one.
    """

    def __init__(self, teacher: Teacher, side: int) -> None:
        self.teacher: Teacher | None = teacher
        self.side, self.dim, self.grid = side, teacher.dim, teacher.grid
        self.table: Tensor | None = None

    def table_bytes(self, images: int) -> int:
        """Size of a table of so many images, float32."""
        return images * self.side**2 * self.dim * 4

    def precompute(self, images: ImageSet, device: torch.device, num_workers: int = 0) -> Tensor:
        """Keep the features of a whole split on the device; returns its labels (n,)."""
        chunks = [part.tolist() for part in torch.arange(len(images)).split(CHUNK)]
        table = torch.empty(len(images), self.side**2, self.dim, device=device)
        labels = []
        for rows, (x, y) in zip(chunks, stream(images, chunks, num_workers), strict=True):
            table[rows[0] : rows[-1] + 1] = self(x.to(device))
            labels.append(y)
        self.table, self.teacher = table, None
        return torch.cat(labels)

    def __call__(self, clean: Tensor, rows: list[int] | None = None) -> Tensor:
        """Features (B, T, E) of clean images (B, C, H, W) in [-1, 1].

        Args:
            rows: their rows in the split that a table was made of.
        """
        if self.table is not None and rows is not None:
            return self.table[torch.tensor(rows, device=self.table.device)]
        assert self.teacher is not None
        return self.on_grid(self.teacher(clean))

    def on_grid(self, patches: Tensor) -> Tensor:
        """The teacher's features (B, n, E) on the flow's grid (B, T, E)."""
        return match_grid(patches, self.grid, self.side)
