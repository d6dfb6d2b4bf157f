"""What the encoder sees in the training images: anew for every batch, or once per image where images never change."""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.align.encoder import Encoder
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.loaders import stream
from rrepa_lab.errors import LabWarning

CHUNK = 64  # images the encoder reads at once when a table is made


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


def grid_hint(encoder: Encoder, side: int) -> str:
    """What to set so that an encoder has one patch for each of the flow's side x side tokens; "" if it has at least one.

    A vision Transformer with patches of 16 pixels has a grid of 14x14 at 224 pixels. For 16x16 tokens its features are
    interpolated, while images of 256 pixels give 16x16 patches.
    """
    rows, columns = encoder.grid
    if min(rows, columns) >= side:
        return ""
    size = encoder.config.image_size * side // rows
    exact = encoder.config.image_size % rows == 0
    advice = f"; encoder.image_size={size} gives {side}x{side} patches, if the model takes that size" if exact else ""
    return f"the encoder has {rows}x{columns} patches for {side}x{side} tokens, and its features are interpolated{advice}"


class Teacher:
    """Targets of the alignment: the encoder's features on the grid of a flow with `side` tokens along an edge.

    With a table they are looked up by row, and the encoder itself is let go. A table is made up front and in the order of
    the rows, so that its numbers depend on the images alone: a resumed run makes the same one.
    """

    def __init__(self, encoder: Encoder, side: int) -> None:
        self.encoder: Encoder | None = encoder
        self.side, self.dim, self.grid = side, encoder.dim, encoder.grid
        self.table: Tensor | None = None
        hint = grid_hint(encoder, side)
        if hint:
            warnings.warn(hint, LabWarning, stacklevel=3)

    def table_bytes(self, images: int) -> int:
        """Size of a table of so many images, float32."""
        return images * self.side**2 * self.dim * 4

    def remember(self, images: ImageSet, device: torch.device, workers: int = 0) -> Tensor:
        """Read a whole split and keep its features on the device; returns the labels (n,)."""
        chunks = [part.tolist() for part in torch.arange(len(images)).split(CHUNK)]
        table = torch.empty(len(images), self.side**2, self.dim, device=device)
        labels = []
        for rows, (x, y) in zip(chunks, stream(images, chunks, workers), strict=True):
            table[rows[0] : rows[-1] + 1] = self(x.to(device), rows)
            labels.append(y)
        self.table, self.encoder = table, None
        return torch.cat(labels)

    def __call__(self, clean: Tensor, rows: list[int]) -> Tensor:
        """Features (B, T, E) of clean images (B, C, H, W), which stand at these rows of their split."""
        if self.table is not None:
            return self.table[torch.tensor(rows, device=self.table.device)]
        assert self.encoder is not None
        return match_grid(self.encoder(clean), self.grid, self.side)
