"""Pictures in a table as HTML: small, quick to make, legible in light and dark, and told to those who cannot see them."""

import base64
import io
from collections.abc import Mapping
from html import escape

from torch import Tensor

from rrepa_lab.errors import LabError
from rrepa_lab.viz.images import picture


def data_uri(image: Tensor) -> str:
    """One image (C, H, W) in [-1, 1] as a PNG in a `data:` address, a pixel a pixel; values outside are clipped."""
    stream = io.BytesIO()
    picture(image).save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def image_tag(image: Tensor, alt: str) -> str:
    """The image as an element; how large its pixels are drawn is for the style sheet to say (class `pixels`)."""
    return f'<img class="pixels" src="{data_uri(image)}" alt="{escape(alt, quote=True)}">'


def picture_table(
    rows: Mapping[str, Mapping[str, Tensor]], caption: str = "", marked: str | None = None, what: str = "image"
) -> str:
    """Images (C, H, W) in [-1, 1] by row name and column name, as `spaces.tiles` takes them: a strip for each row.

    Args:
        marked: the column that is pointed at.
        what: begins the description of every picture, "image, digits-none, after block 3".

    Raises: LabError for nothing to show.
    """
    if not rows or not all(rows.values()):
        raise LabError("there are no pictures to show")
    strips = []
    for name, row in rows.items():
        frames = []
        for column, image in row.items():
            here = ' class="marked" aria-current="step"' if column == marked else ""
            frames.append(
                f"<figure{here}>{image_tag(image, f'{what}, {name}, {column}')}<figcaption>{escape(column)}</figcaption></figure>"
            )
        strips.append(f'<section><h4>{escape(name)}</h4><div class="strip">{"".join(frames)}</div></section>')
    note = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return f'<div class="pictures">{"".join(strips)}{note}</div>'
