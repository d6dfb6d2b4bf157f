"""Pictures in a table as HTML: small, quick to make, legible in light and dark, and described by alternative text."""

import base64
import re
from collections.abc import Collection, Mapping
from html import escape

from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.errors import LabError
from rrepa_lab.viz.images import encoded, grid, picture

THUMBNAIL = 32  # pixels across at most
LONG_WORD = 8  # characters that fit under a small picture


def data_uri(image: Tensor) -> str:
    """One image (C, H, W) in [-1, 1] as a PNG in a `data:` address, a pixel a pixel; values outside are clipped."""
    return _address(picture(image), "PNG")


def sheet_uri(images: Tensor, columns: int) -> str:
    """Thumbnails of images (B, C, H, W) in [-1, 1] side by side without gaps, in one `data:` address.

    Images of more than THUMBNAIL pixels are brought to that size; tiny ones stay exact, larger ones are a JPEG.
    """
    if max(images.shape[2:]) > THUMBNAIL:
        images = F.interpolate(images, size=(THUMBNAIL, THUMBNAIL), mode="area")
    return _address(grid(images, columns, scale=1, gap=0), "PNG" if images.shape[-1] < THUMBNAIL else "JPEG")


def _address(image: Image, form: str) -> str:
    return f"data:image/{form.lower()};base64,{base64.b64encode(encoded(image, form)).decode()}"


def image_tag(image: Tensor, alt: str) -> str:
    """The image as an element; how large its pixels are drawn is for the style sheet to say (class `pixels`)."""
    return f'<img class="pixels" src="{data_uri(image)}" alt="{escape(alt, quote=True)}">'


def picture_table(
    rows: Mapping[str, Mapping[str, Tensor]], caption: str = "", marked: str | Collection[str] = (), what: str = "image"
) -> str:
    """Images (C, H, W) in [-1, 1] by row name and column name, as `spaces.tiles` takes them: a strip for each row.

    Args:
        marked: the column that is pointed at, as the present one of several stages; or columns to put into a frame.
        what: begins the description of every picture, "image, digits-none, after block 3".

    Raises: LabError for nothing to show.
    """
    if not rows or not all(rows.values()):
        raise LabError("there are no pictures to show")
    strips = []
    for name, row in rows.items():
        frames = []
        for column, image in row.items():
            here = ""
            if column == marked:
                here = ' class="marked" aria-current="step"'
            elif not isinstance(marked, str) and column in marked:
                here = ' class="marked"'
            shown = image_tag(image, f"{what}, {name}, {column}")
            named = escape(column).replace("_", "_<wbr>")
            frames.append(f"<figure{here}>{shown}<figcaption>{named}</figcaption></figure>")
        wide = " wide" if any(len(word) > LONG_WORD for column in row for word in re.split("[ _]", column)) else ""
        strips.append(f'<section><h4>{escape(name)}</h4><div class="strip{wide}">{"".join(frames)}</div></section>')
    note = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return f'<div class="pictures">{"".join(strips)}{note}</div>'
