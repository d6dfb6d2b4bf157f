"""Picture files to tensors: the one reader of image folders, the command line and the page."""

import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.errors import LabError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MEGAPIXELS = 20
DECODER = 1  # of what is computed from a file; another number has all decoded pictures of caches made again
# a large picture shrinks in two steps: pixels each way that the first one leaves for each pixel of the result, at least
DECODED, AVERAGED = 16, 4
EXACT = 1024  # pixels each way up to which areas are averaged in one step

_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262  # EXIF and TIFF tags
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def read_picture(path: Path | str, least: int | None = None) -> Image.Image:
    """A picture file as RGB, eight bits a channel: upright as its EXIF tag says, transparent parts on white, the first frame.

    Sixteen bits are scaled to eight by the range of the file's format, floats from 0..1.

    Args:
        least: an edge that the result needs; a larger JPEG may then be decoded at a half, quarter or eighth of its size.

    Raises: LabError, in one line that names the file, if it is missing, empty, no picture, cut off, of more than 20
        megapixels (found in its header, before it is decoded), or of numbers whose range is not known.
    """
    _check_file(Path(path))
    with _opened(Path(path), Path(path).name) as opened:
        return _read(opened, least)


def picture_of_bytes(data: bytes, name: str, least: int | None = None) -> Image.Image:
    """The bytes of a picture file as `read_picture` reads it; `name` is what an error calls it."""
    if not data:
        raise LabError(f"{name} is empty: there is no picture in it")
    with _opened(BytesIO(data), name) as opened:
        return _read(opened, least)


class Header(NamedTuple):
    """What a picture file says of itself before it is decoded."""

    width: int
    height: int
    mode: str  # Pillow's: L, RGB, RGBA, P, CMYK, I;16
    frames: int  # of which the first is read


def read_header(path: Path | str) -> Header:
    """The header of a picture file; LabError for what `read_picture` would refuse by it."""
    _check_file(Path(path))
    with _opened(Path(path), Path(path).name) as opened:
        return Header(opened.width, opened.height, opened.mode, getattr(opened, "n_frames", 1))


def check_size(path: Path | str) -> None:
    """LabError for a file that `read_picture` would refuse by its header: no picture, or of more than 20 megapixels."""
    read_header(path)


def _read(opened: Image.Image, least: int | None) -> Image.Image:
    if least is not None:
        opened.draft(None, (least, least))
    opened.load()
    return _upright(opened, eight_bits(opened))


@contextmanager
def _opened(source: Path | BytesIO, name: str) -> Iterator[Image.Image]:
    """A picture whose header was read and is of a size that is decoded; what goes wrong within it is one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF and other parts beside the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=FORMATS) as opened:
                if opened.width * opened.height > MEGAPIXELS * 1e6:
                    raise Image.DecompressionBombError
                yield opened
    except LabError as error:
        raise LabError(f"{name} {error}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise LabError(f"{name} is too large: pictures may have up to {MEGAPIXELS} megapixels") from None
    except UnidentifiedImageError:
        raise LabError(f"{name} is not a picture: give a PNG, JPEG, WebP, GIF, BMP or TIFF file") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they stumble on
        raise LabError(f"{name} is a picture that cannot be read to its end ({type(error).__name__})") from None


def _check_file(path: Path) -> None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        raise LabError(f"no picture at {path}") from None
    if stat.S_ISDIR(found.st_mode):
        raise LabError(f"no picture at {path}")
    if not stat.S_ISREG(found.st_mode):
        raise LabError(f"{path.name} is not a picture: it is a pipe or a device")
    if not found.st_size:
        raise LabError(f"{path.name} is empty: there is no picture in it")


def _upright(opened: Image.Image, picture: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(opened.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF part leaves the pixels as they are
        turn = None
    return picture if turn is None else picture.transpose(turn)


def eight_bits(picture: Image.Image) -> Image.Image:
    """Any loaded picture as RGB; LabError for 32-bit integers, floats outside 0..1, and colours that Pillow cannot convert."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _scaled(picture)
    try:
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except ValueError:
        raise LabError(f"has colours of the kind {picture.mode}, which are not read: save it as RGB") from None


def _scaled(picture: Image.Image) -> Image.Image:
    """Grey values of 16 bits, or floats, as 8 bits."""
    values = np.asarray(picture).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    tags = getattr(picture, "tag_v2", {})
    if picture.mode == "F":
        if not (low >= 0 and high <= 1):
            raise LabError(f"holds floats from {low:.3g} to {high:.3g}, and only 0..1 has a known range: scale them")
        most = 1
    elif picture.mode == "I":
        if picture.format not in ("PNG", "PPM"):  # which Pillow scales to 16 bits
            raise LabError(f"holds integers from {low:.0f} to {high:.0f} whose range is not known: save it with 8 or 16 bits")
        most = 65535
    else:
        most = 2 ** int(np.max(tags.get(_BITS, 16))) - 1
    if picture.mode != "F" and tags.get(_PHOTOMETRIC) == 0:  # TIFF: zero is white
        values = most - values
    grey = Image.fromarray((values * (255 / most)).round().clip(0, 255).astype(np.uint8))
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(np.asarray(picture) == clear, 0, 255).astype(np.uint8)))
    return grey


def from_picture(picture: Image.Image, channels: int, size: int) -> Tensor:
    """Any picture -> (1, C, size, size) in [-1, 1]: the centre square, averaged over areas or, if smaller, bicubic."""
    if picture.mode not in ("L", "RGB"):
        picture = eight_bits(picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    picture = picture.crop((left, top, left + edge, top + edge))
    step = max(1, edge // max(AVERAGED * size, EXACT // 2))
    if step > 1:  # whole numbers of pixels first, which bounds the memory that floats take
        picture = picture.reduce(step)
    cells = picture.width
    array = np.asarray(picture, dtype=np.float32).reshape(cells, cells, channels)
    x = torch.from_numpy(array.copy()).permute(2, 0, 1) / 127.5 - 1
    if edge < size:
        return F.interpolate(x[None], size=(size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
    areas = _areas(edge, cells, step, size)
    return (areas @ x @ areas.T).clamp(-1, 1)[None]


def _areas(edge: int, cells: int, step: int, size: int) -> Tensor:
    """(size, cells): how much of each cell, `step` pixels wide and the last one less, lies in each pixel of the result."""
    sides = (torch.arange(cells + 1, dtype=torch.float64) * step).clamp(max=edge)
    bounds = torch.arange(size + 1, dtype=torch.float64) * (edge / size)
    high = torch.minimum(sides[None, 1:], bounds[1:, None])
    low = torch.maximum(sides[None, :-1], bounds[:-1, None])
    shares = (high - low).clamp(min=0)
    return (shares / shares.sum(dim=1, keepdim=True)).float()


def load_picture(path: Path | str, channels: int, size: int) -> Tensor:
    """A picture file -> (1, C, size, size) in [-1, 1]: `read_picture`, then `from_picture`, with the errors of the first."""
    return from_picture(read_picture(path, DECODED * size), channels, size)
