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
    """How far a view may be from its image; a change whose limit is 0 (of crops: 1) is left out."""

    degrees: float = Field(15.0, ge=0, description="largest rotation of a view")
    shift: float = Field(1.0, ge=0, description="largest shift of a view, pixels")
    scale: float = Field(0.15, ge=0, description="largest relative change of size of a view")
    shear: float = Field(0.2, ge=0, description="largest shear of a view")
    noise_std: float = Field(0.1, ge=0, description="of the noise on a view, whose numbers are in [-1, 1]")
    crop: float = Field(1.0, gt=0, le=1, description="smallest area of a random crop, part of the image; 1: no crops")
    flip: float = Field(0.0, ge=0, le=1, description="part of the views that are mirrored")
    jitter: float = Field(1.0, ge=0, le=1, description="part of the views whose colours change as the next four say")
    brightness: float = Field(0.0, ge=0, le=1, description="the factor is drawn within 1 ± this")
    contrast: float = Field(0.0, ge=0, le=1, description="the factor, about the mean of the image, is drawn within 1 ± this")
    saturation: float = Field(0.0, ge=0, le=1, description="the factor is drawn within 1 ± this; of colour images")
    hue: float = Field(0.0, ge=0, le=0.5, description="largest rotation of the colours, turns; of colour images")
    grey: float = Field(0.0, ge=0, le=1, description="part of the views without colour; of colour images")

    @property
    def moves(self) -> bool:
        """Whether a view is rotated, shifted, scaled or sheared."""
        return any((self.degrees, self.shift, self.scale, self.shear))

    @property
    def colours(self) -> bool:
        """Whether a change needs colour images."""
        return any((self.saturation, self.hue, self.grey))


# crops, mirror images and colours of SimCLR (arXiv 2002.05709, appendix A and B.9), at half its strength of colours
PHOTO_VIEWS = Views(
    degrees=0, shift=0, scale=0, shear=0, noise_std=0, crop=0.2, flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
    saturation=0.4, hue=0.1, grey=0.2,
)  # fmt: skip
ASPECT = 4 / 3  # largest ratio of the edges of a crop, either way

# NTSC: luma, and two numbers that say colour; rows give Y, I, Q of R, G, B
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def random_view(x: Tensor, views: Views, draw: torch.Generator) -> Tensor:
    """One random view of each image (B, C, H, W) in [-1, 1]; what comes in from outside is background (-1).

    Every image has numbers of its own: an affine change, a crop that is resized to the whole (bilinear, so that at a border of
    the image half a pixel of background is blended in), a mirror image, colours, and noise, in this order. All numbers come
    from `draw`, on the CPU.

    Source: random resized crops and colours as in SimCLR, arXiv 2002.05709.
    """
    grid = _affine(x, views, draw) if views.moves else None
    if views.crop < 1 or views.flip:
        grid = _cropped(grid, len(x), views, draw)
    if grid is not None:
        places = F.affine_grid(grid, list(x.shape), align_corners=False)
        x = F.grid_sample(x + 1, places, align_corners=False) - 1
    if any((views.brightness, views.contrast, views.colours)):
        x = _recoloured(x, views, draw)
    return x + views.noise_std * torch.randn(x.shape, generator=draw) if views.noise_std else x


def _within(limit: float, count: int, draw: torch.Generator) -> Tensor:
    """(count,) uniform numbers within ± limit."""
    return (torch.rand(count, generator=draw) * 2 - 1) * limit


def _affine(x: Tensor, views: Views, draw: torch.Generator) -> Tensor:
    """(B, 2, 3): from places in the view to places in the image, both measured in half images."""

    def within(limit: float) -> Tensor:
        return _within(limit, len(x), draw)

    angle, shear = within(math.radians(views.degrees)), within(views.shear)
    size_x, size_y = 1 + within(views.scale), 1 + within(views.scale)
    # affine_grid measures in half images, so a pixel is 2 / W
    shift_x, shift_y = within(views.shift * 2 / x.shape[3]), within(views.shift * 2 / x.shape[2])
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * size_x, shear - sin, shift_x, sin, cos * size_y, shift_y], dim=1).view(-1, 2, 3)


def _cropped(before: Tensor | None, count: int, views: Views, draw: torch.Generator) -> Tensor:
    """(B, 2, 3) as `before`, of random crops and mirror images of what it gives; None stands for the image itself."""
    area = 1 - torch.rand(count, generator=draw) * (1 - views.crop)
    ratio = (_within(math.log(ASPECT), count, draw) / 2).exp() if views.crop < 1 else torch.ones(count)
    edges = torch.stack([(area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)], dim=1)  # (B, 2): x, y
    centres = (torch.rand(count, 2, generator=draw) * 2 - 1) * (1 - edges)
    mirrors = torch.where(torch.rand(count, generator=draw) < views.flip, -1.0, 1.0)
    scales = torch.diag_embed(edges * torch.stack([mirrors, torch.ones(count)], dim=1))
    if before is None:
        return torch.cat([scales, centres[:, :, None]], dim=2)
    linear, offset = before[:, :, :2], before[:, :, 2:]
    return torch.cat([linear @ scales, linear @ centres[:, :, None] + offset], dim=2)


def _recoloured(x: Tensor, views: Views, draw: torch.Generator) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] with other brightness, contrast, saturation and hue, some of them grey; clipped.

    Each is linear in the colours of an image, so that all of them are one matrix and one number for each image.
    """
    count, channels = x.shape[:2]
    drawn = torch.rand(count, generator=draw) < views.jitter

    def factor(limit: float) -> Tensor:
        return torch.where(drawn, 1 + _within(limit, count, draw), 1.0)

    bright, contrast, saturation = factor(views.brightness), factor(views.contrast), factor(views.saturation)
    angle = torch.where(drawn, _within(2 * math.pi * views.hue, count, draw), 0.0)
    saturation = torch.where(torch.rand(count, generator=draw) < views.grey, 0.0, saturation)
    unit = (x + 1) / 2
    luma = YIQ[0] if channels == 3 else torch.ones(channels) / channels
    mean = bright * (unit.mean(dim=(2, 3)) @ luma)
    scale, offset = bright * contrast, (1 - contrast) * mean
    if channels == 3 and views.colours:
        cos, sin = saturation * angle.cos(), saturation * angle.sin()
        one, zero = torch.ones(count), torch.zeros(count)
        turned = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
        unit = (torch.linalg.inv(YIQ) @ turned @ YIQ @ unit.flatten(2)).view(x.shape)
    return (unit * scale[:, None, None, None] + offset[:, None, None, None]).clamp(0, 1) * 2 - 1
