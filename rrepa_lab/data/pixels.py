"""Pixel values: scaling to [-1, 1] and back, training noise, dequantization, drawings."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.data.streams import Draws, normal_rows, uniform_rows
from rrepa_lab.errors import LabError


def to_unit(values: Tensor, levels: int) -> Tensor:
    """Integers 0..levels-1 -> float32 in [-1, 1]; 17 levels for digits, 256 for 8-bit images."""
    return values.float() * (2 / (levels - 1)) - 1


def to_integers(x: Tensor, levels: int) -> Tensor:
    """[-1, 1] -> nearest integer 0..levels-1, as floats; values outside are clipped."""
    return ((x.clamp(-1, 1) + 1) * ((levels - 1) / 2)).round()


def dequantize(x: Tensor, levels: int, draws: Draws = None) -> Tensor:
    """Uniform dequantization: (integer + u) / levels * 2 - 1 with u in [0, 1), drawn on the CPU."""
    u = uniform_rows(x.shape, draws, x.dtype).to(x.device)
    return (to_integers(x, levels) + u) * (2 / levels) - 1


def from_dequantized(x: Tensor, levels: int) -> Tensor:
    """The dequantization scale -> the data's: the integer whose bin [k, k + 1) / levels * 2 - 1 holds x, by `to_unit`.

    A flow trained under uniform noise models (integer + u) / levels * 2 - 1. Values outside go to the nearest bin.
    """
    return to_unit(((x + 1) * (levels / 2)).floor().clamp(0, levels - 1), levels).to(x.dtype)


def bin_centres(x: Tensor, levels: int) -> Tensor:
    """[-1, 1] -> the mean of `dequantize`: (integer + 0.5) / levels * 2 - 1."""
    return (to_integers(x, levels) + 0.5) * (2 / levels) - 1


def add_noise(x: Tensor, std: float, draws: Draws = None) -> Tensor:
    """x + std * eps with standard normal eps, drawn on the CPU so that a seed means the same everywhere."""
    return x + std * normal_rows(x.shape, draws, x.dtype).to(x.device)


def training_noise(x: Tensor, kind: str, std: float, levels: int, draws: Draws = None) -> Tensor:
    """The noise a flow is trained under: `kind` is "gaussian" with this `std`, or "uniform" dequantization of `levels`."""
    return add_noise(x, std, draws) if kind == "gaussian" else dequantize(x, levels, draws)


def to_uint8(x: Tensor) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8; C is 1 or 3."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


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
