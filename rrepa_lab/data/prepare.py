"""A picture from outside as a flow reads it: the one preparation of the page, its endpoints and the command line."""

from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.pictures import eight_bits, from_picture
from rrepa_lab.data.pixels import from_drawing

FAINT = 0.15  # part of the contrast below which a pixel counts as ground
FILLED = 7 / 8  # part of the height from which a digit fills its picture


class Prepared(NamedTuple):
    """An image and what was done to get it."""

    x: Tensor  # (1, C, size, size) in [-1, 1]
    how: str  # "" where its centre square was only averaged down


def prepare(picture: Image.Image, data: DataConfig) -> Prepared:
    """A picture, as `data.pictures.read_picture` gives it, for a flow of these data.

    For digits as `as_digit`, otherwise its centre square at the flow's size.
    """
    if data.name == "digits":
        return as_digit(picture, data.image_size)
    return Prepared(from_picture(picture, data.channels, data.image_size), "")


def as_digit(picture: Image.Image, size: int = 8) -> Prepared:
    """A picture of one digit -> (1, 1, size, size), light on dark, and cropped to its ink as scikit-learn's digits are.

    The ground is the median of the border; a darker digit on it is inverted. A digit that fills the height of its picture,
    such as one of the data set, is not cropped but averaged down, and so is a picture of one colour.
    """
    grey = np.asarray(eight_bits(picture).convert("L"), dtype=np.float32) / 255
    ground = float(np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])))
    low, high = float(grey.min()), float(grey.max())
    turned = ground - low > high - ground
    contrast = max(ground - low, high - ground)
    if contrast < 1 / 16:
        return Prepared(from_picture(picture, 1, size), "")
    ink = ((ground - grey if turned else grey - ground) / contrast).clip(0, 1)
    ink[ink < FAINT] = 0
    rows = np.flatnonzero(ink.any(axis=1))
    inverted = "inverted to light on dark" if turned else ""
    if rows[-1] + 1 - rows[0] >= FILLED * len(ink):
        x = from_picture(picture, 1, size)
        return Prepared(-x if turned else x, inverted)
    return Prepared(from_drawing(ink, size), f"{inverted} and cropped to the digit" if turned else "cropped to the digit")
