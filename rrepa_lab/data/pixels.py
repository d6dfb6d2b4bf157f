"""Pixel values: scaling to [-1, 1] and back, training noise, dequantization, pictures from outside."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.errors import LabError


def to_unit(values: Tensor, levels: int) -> Tensor:
    """Integers 0..levels-1 -> float32 in [-1, 1]; 17 levels for digits, 256 for 8-bit images."""
    return values.float() * (2 / (levels - 1)) - 1


def to_integers(x: Tensor, levels: int) -> Tensor:
    """[-1, 1] -> nearest integer 0..levels-1, as floats; values outside are clipped."""
    return ((x.clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()


def dequantize(x: Tensor, levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform dequantization: (integer + u) / levels * 2 - 1 with u in [0, 1), drawn on the CPU."""
    u = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return (to_integers(x, levels) + u) * (2 / levels) - 1


def add_noise(x: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """x + std * eps with standard normal eps, drawn on the CPU so that a seed means the same everywhere."""
    return x + std * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)


def training_noise(x: Tensor, kind: str, std: float, levels: int, generator: torch.Generator | None = None) -> Tensor:
    """The noise a flow is trained under: `kind` is "gaussian" with this `std`, or "uniform" dequantization of `levels`."""
    return add_noise(x, std, generator) if kind == "gaussian" else dequantize(x, levels, generator)


def to_uint8(x: Tensor) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8; C is 1 or 3."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def read_picture(path: Path | str) -> Image.Image:
    """A picture file as RGB, eight bits a channel: turned as its camera says, transparent parts on white, 16 bits scaled down.

    Raises: LabError for a file that is missing, empty, no picture, broken off, or larger than 89 megapixels.
    """
    path = Path(path)
    try:
        if not path.stat().st_size:
            raise LabError(f"{path.name} is empty: there is no picture in it")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                picture = opened if opened.getexif().get(0x0112, 1) == 1 else ImageOps.exif_transpose(opened)
                return _eight_bits(picture)
    except (FileNotFoundError, IsADirectoryError):
        raise LabError(f"no picture at {path}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise LabError(f"{path.name} is too large: pictures may have up to 89 megapixels") from None
    except UnidentifiedImageError:
        raise LabError(f"{path.name} is not a picture: give a PNG, JPEG, WebP, GIF, BMP or TIFF file") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, LabError):
            raise
        raise LabError(f"{path.name} is a picture that cannot be read to its end ({type(error).__name__})") from None


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits a pixel, which PIL would clip at 255
        values = np.asarray(picture).astype(np.float64)
        picture = Image.fromarray((values * (255 / (65535 if values.max() > 255 else 255))).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def from_picture(picture: Image.Image, channels: int, size: int) -> Tensor:
    """Any picture -> (1, C, size, size) in [-1, 1]: centre square, area-averaged or bicubic."""
    picture = picture.convert("L" if channels == 1 else "RGB")
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    picture = picture.crop((left, top, left + edge, top + edge))
    array = np.asarray(picture, dtype=np.float32).reshape(edge, edge, channels)
    x = torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    if edge >= size:
        return F.interpolate(x, size=(size, size), mode="area")
    return F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)


def from_drawing(ink: np.ndarray, size: int = 8) -> Tensor:
    """A drawn digit -> (1, 1, size, size) in [-1, 1], centred and scaled like scikit-learn's digits.

    Args:
        ink: (H, W) floats, 0 where nothing is drawn, 1 where there is ink.

    The drawing is cropped to its ink, scaled to fill the height, and averaged over areas. Raises: LabError if it is empty.
    """
    rows, columns = np.nonzero(ink > 0.1)
    if len(rows) == 0:
        raise LabError("the drawing is empty: draw a digit first")
    glyph = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    edge = max(glyph.shape)
    square = np.zeros((edge, edge), np.float32)
    left, top = (edge - glyph.shape[1]) // 2, (edge - glyph.shape[0]) // 2
    square[top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph
    # a multiple of the target size first, so that every area average covers whole pixels
    fine = F.interpolate(torch.from_numpy(square)[None, None], size=(16 * size, 16 * size), mode="bilinear", antialias=True)
    coarse = F.interpolate(fine, size=(size, size), mode="area")
    return (coarse / coarse.max()).clamp(0, 1) * 2 - 1
