"""Image tensors become pictures: nothing is computed here."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rrepa_lab.data.pixels import to_uint8
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_atomically
from rrepa_lab.runs.names import DESCRIPTION

GAP = 1  # image pixels between the images of a sheet
LARGEST = {"WEBP": 16_383, "JPEG": 65_500, "PNG": 65_500}  # edge of a picture: of the format, and of what viewers open
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG"}


def picture(image: Tensor, scale: int = 1) -> Image.Image:
    """One image (C, H, W) in [-1, 1], each pixel drawn as a square of `scale` screen pixels."""
    return grid(image[None], columns=1, scale=scale, gap=0)


def grid(images: Tensor, columns: int | None = None, scale: int | None = None, gap: int = GAP, empty: int = 127) -> Image.Image:
    """Images (B, C, H, W) in [-1, 1] row by row, `gap` image pixels apart.

    Args:
        columns: images in a row; by default the picture comes out about square.
        scale: screen pixels for each image pixel; by default small images are enlarged to about 64.
        empty: grey value of gaps and of places left over.
    """
    pixels = to_uint8(images)
    count, height, width, channels = pixels.shape
    rows, columns, scale = _layout(count, height, columns, scale)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), empty, np.uint8)
    for index, image in enumerate(pixels):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def _layout(count: int, height: int, columns: int | None, scale: int | None) -> tuple[int, int, int]:
    """Rows, columns and scale of a sheet."""
    columns = columns or math.ceil(math.sqrt(count))
    return math.ceil(count / columns), columns, scale or max(1, 64 // height)


def check_sheet(path: Path | str, count: int, height: int, width: int, columns: int | None = None) -> None:
    """LabError if `grid` of so many images cannot be kept in a file of this name: its format, or its size."""
    form = picture_format(path)
    rows, columns, scale = _layout(count, height, columns, None)
    size = ((columns * (width + GAP) + GAP) * scale, (rows * (height + GAP) + GAP) * scale)
    if max(size) > LARGEST[form]:
        raise LabError(
            f"{path} would have {size[0]}x{size[1]} pixels, and a {form} file has at most {LARGEST[form]:,} along an edge: "
            "draw fewer images at once"
        )


def picture_format(path: Path | str) -> str:
    """The format that a file name asks for; LabError if it is none of .png, .webp and .jpg."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise LabError(f"a picture must be a .png, .webp or .jpg file, not {path}")
    return FORMATS[path.suffix.lower()]


def encoded(sheet: Image.Image, form: str = "PNG", description: str = "") -> bytes:
    """A picture as the bytes of a file of this format; a PNG file may keep what it shows, in Latin-1."""
    stream, options = io.BytesIO(), {}
    if description:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(DESCRIPTION, description)
    sheet.save(stream, format=form, **options)
    return stream.getvalue()


def save_picture(sheet: Image.Image, path: Path | str) -> None:
    """Write a picture atomically, in the format of its name."""
    kind = picture_format(path)
    write_atomically(Path(path), lambda temporary: sheet.save(temporary, format=kind))
