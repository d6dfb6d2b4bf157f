"""Random changes of training images: shifts that keep the label, and the random views of self-supervised training."""

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.config import Config
from rrepa_lab.data.streams import RowStreams


def mirrored(x: Tensor, which: Tensor | None) -> Tensor:
    """Images (B, C, H, W) with those of `which` (B,), bool, mirrored; None mirrors none."""
    return x if which is None else torch.where(which[:, None, None, None], x.flip(3), x)


def drawn_mirrors(draws: RowStreams) -> Tensor:
    """Which images of these streams are mirrored (B,), bool: half of them, at random."""
    return draws.scalars()[:, 0] < 0.5


def views_of(x: Tensor, views: int) -> Tensor:
    """Images (B, C, H, W) and, of two views, their mirror images: (B, views, C, H, W)."""
    return torch.stack([x, x.flip(3)][:views], dim=1)


def shifted(x: Tensor, most: int, probability: float, draws: RowStreams) -> Tensor:
    """Move each image by whole pixels, at random; what comes in from outside is background.

    Args:
        x: (B, C, H, W) in [-1, 1].
        most: largest shift in either direction, pixels; rows and columns are drawn independently, uniformly.
        probability: of an image to be moved.
        draws: streams of the B images.

    Returns: (B, C, H, W).
    """
    count, _, height, width = x.shape
    numbers = draws.scalars(3)
    moves = (numbers[:, :2] * (2 * most + 1)).long() - most
    moves = moves * (numbers[:, 2:] < probability)
    padded = F.pad(x, (most, most, most, most), value=-1.0)
    rows = torch.arange(height) + most - moves[:, :1]
    columns = torch.arange(width) + most - moves[:, 1:]
    images = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Views(Config):
    """How far a view may be from its image."""

    degrees: float = Field(15.0, ge=0, description="largest rotation of a view")
    shift: float = Field(1.0, ge=0, description="largest shift of a view, pixels")
    scale: float = Field(0.15, ge=0, description="largest relative change of size of a view")
    shear: float = Field(0.2, ge=0, description="largest shear of a view")
    noise_std: float = Field(0.1, ge=0)


def random_view(x: Tensor, views: Views, draw: torch.Generator) -> Tensor:
    """One random view of each image (B, C, H, W): an affine change of its own, and noise; outside is background (-1)."""

    def within(limit: float) -> Tensor:
        return (torch.rand(len(x), generator=draw) * 2 - 1) * limit

    angle, shear = within(math.radians(views.degrees)), within(views.shear)
    size_x, size_y = 1 + within(views.scale), 1 + within(views.scale)
    # affine_grid measures in half images, so a pixel is 2 / W
    shift_x, shift_y = within(views.shift * 2 / x.shape[3]), within(views.shift * 2 / x.shape[2])
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos * size_x, shear - sin, shift_x, sin, cos * size_y, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1
    return moved + views.noise_std * torch.randn(x.shape, generator=draw)
