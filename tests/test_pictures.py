"""Picture files of every kind, read through an image folder and singly: the same numbers, and the right ones."""

import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.pictures import from_picture, load_picture, read_picture
from rrepa_lab.data.sets.folder import FolderImages
from rrepa_lab.data.splits import load_split
from rrepa_lab.errors import LabError

RAMP = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (16, 1))
GREY = Image.fromarray(RAMP)
DEEP = RAMP.astype(np.uint16) * 257
EXPECTED = torch.from_numpy(RAMP).float() / 127.5 - 1


def in_folder(path, channels=1, size=16):
    """(C, size, size) of a file in `<root>/test/a`, as a split gives it."""
    data = DataConfig(name="folder", path=str(path.parents[2]), image_size=size, channels=channels)
    images = load_split(data, "test")
    assert isinstance(images, FolderImages)
    assert images.files == [f"a/{path.name}"]
    return images.__getitems__([0]).x[0]


def both(path, channels=1, size=16):
    """The same, and as a single file."""
    return in_folder(path, channels, size), from_picture(read_picture(path), channels, size)[0]


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "photos" / "test" / "a"
    folder.mkdir(parents=True)
    return folder


def palette(alpha):
    picture = GREY.convert("P")
    picture.info["transparency"] = bytes([alpha] * 256)
    return picture


def with_alpha(mode, alpha=255):
    picture = GREY.convert(mode)
    picture.putalpha(Image.new("L", (16, 16), alpha))
    return picture


def first_of_two(**more):
    return GREY, {"save_all": True, "append_images": [Image.new("L", (16, 16), 7)], **more}


KINDS = {
    "grey.png": lambda: (GREY, {}),
    "colour.png": lambda: (GREY.convert("RGB"), {}),
    "opaque.png": lambda: (with_alpha("RGB"), {}),
    "grey-alpha.png": lambda: (with_alpha("L"), {}),
    "palette.png": lambda: (GREY.convert("P"), {}),
    "palette-alpha.png": lambda: (palette(255), {"transparency": bytes([255] * 256)}),
    "sixteen.png": lambda: (Image.fromarray(DEEP), {}),
    "sixteen.tif": lambda: (Image.fromarray(DEEP), {}),
    "sixteen-lzw.tiff": lambda: (Image.fromarray(DEEP), {"compression": "tiff_lzw"}),
    "sixteen.pgm": lambda: (Image.fromarray(DEEP), {}),
    "unit.tif": lambda: (Image.fromarray((RAMP / 255).astype(np.float32)), {}),
    "cmyk.tif": lambda: (GREY.convert("RGB").convert("CMYK"), {}),
    "picture.webp": lambda: (GREY.convert("RGB"), {"lossless": True}),
    "animated.gif": first_of_two,
    "animated.png": first_of_two,
    "animated.webp": lambda: first_of_two(lossless=True),
    "pages.tiff": first_of_two,
    "UPPER.BMP": lambda: (GREY, {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_ramp_in_every_kind_of_file(name, place):
    picture, settings = KINDS[name]()
    picture.save(place / name, **settings)
    for x in both(place / name):
        assert_close(x[0], EXPECTED, atol=0.02, rtol=0)


def test_jpegs_in_grey_colour_and_cmyk(place):
    for mode in ("L", "RGB", "CMYK"):
        GREY.convert("RGB").convert(mode).save(place / "x.jpg", quality=100, subsampling=0)
        for x in both(place / "x.jpg"):
            assert_close(x[0], EXPECTED, atol=0.05, rtol=0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("tag", range(10))
def test_pictures_stand_upright(tag, suffix, place):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8, :8], picture[:8, 8:], picture[8:, :8], picture[8:, 8:] = 0, 80, 160, 240
    # what a camera stores for each tag, by the definition in EXIF 2.3: rows and columns of the stored array
    stored = {
        2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1], 5: picture.transpose(1, 0, 2),
        6: picture.transpose(1, 0, 2)[::-1], 7: picture.transpose(1, 0, 2)[::-1, ::-1], 8: picture.transpose(1, 0, 2)[:, ::-1],
    }.get(tag, picture)  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = tag
    settings = {"quality": 100} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(place / f"x.{suffix}", exif=exif, **settings)
    for x in both(place / f"x.{suffix}", size=2):
        assert_close(x[0], torch.tensor([[0.0, 80], [160, 240]]) / 127.5 - 1, atol=0.03, rtol=0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_transparent_parts_are_white(mode, place):
    settings: dict[str, Any] = {}
    if mode in ("RGBA", "LA"):
        picture = with_alpha(mode[:-1] if mode == "LA" else "RGB", 0)
    elif mode == "I;16":
        picture, settings = Image.fromarray(np.full((16, 16), 700, np.uint16)), {"transparency": 700}
    else:
        picture = Image.new("L", (16, 16), 9).convert(mode)
        settings = {"transparency": bytes([0] * 256) if mode == "P" else (9, 9, 9) if mode == "RGB" else 9}
    picture.save(place / "x.png", **settings)
    for channels in (1, 3):
        for x in both(place / "x.png", channels):
            assert_close(x, torch.ones(channels, 16, 16))


def test_half_transparent_is_half_way_to_white(place):
    Image.new("RGBA", (16, 16), (0, 0, 0, 128)).save(place / "x.png")
    for x in both(place / "x.png", 3):
        assert_close(x, torch.full((3, 16, 16), 127 / 127.5 - 1), atol=0.01, rtol=0)


def test_twelve_bits_and_white_at_zero():
    from rrepa_lab.data.pictures import eight_bits

    for tags, expected in (({258: (12,)}, 16), ({258: (16,)}, 1), ({258: (16,), 262: 0}, 254)):
        picture = Image.fromarray(np.full((4, 4), 257, np.uint16))
        picture.tag_v2 = tags  # type: ignore[attr-defined]
        assert np.asarray(eight_bits(picture)).max() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((8, 8), 2.5, np.float32), "floats from 2.5 to 2.5"),
        (np.full((8, 8), -0.1, np.float32), "floats from -0.1"),
        (np.full((8, 8), np.nan, np.float32), "floats from nan"),
        (np.full((8, 8), 2**20, np.int32), "integers from 1048576"),
        (np.full((8, 8), 100, np.int32), "integers from 100"),
    ],
)
def test_values_of_unknown_range_are_refused(values, message, place):
    Image.fromarray(values).save(place / "x.tif")
    with pytest.raises(LabError, match=f"^x.tif holds {message}"):
        read_picture(place / "x.tif")
    with pytest.raises(LabError, match=f"{place / 'x.tif'}: x.tif holds {message}"):
        in_folder(place / "x.tif")


def png_header(width, height):
    """A PNG that says it has these sizes and holds nothing of it."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("sides", [(20_000, 1001), (1, 20_000_001), (5000, 4001), (9000, 9000), (14_000, 14_000)])
def test_too_many_pixels_are_found_in_the_header(sides, tmp_path):
    (tmp_path / "x.png").write_bytes(png_header(*sides))
    with pytest.raises(LabError, match=r"^x.png is too large: pictures may have up to 20 megapixels"):
        read_picture(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["x.tif", "x.gif", "x.jpg", "x.webp"])
def test_the_limit_holds_for_every_format(name, tmp_path, monkeypatch):
    from rrepa_lab.data import pictures

    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"append_images": [GREY], "save_all": True} if name in ("x.tif", "x.gif") else {"exif": exif}
    Image.new("L", (100, 101)).save(tmp_path / name, **more)
    monkeypatch.setattr(pictures, "MEGAPIXELS", 0.0101)
    assert read_picture(tmp_path / name).width in (100, 101)
    monkeypatch.setattr(pictures, "MEGAPIXELS", 0.01)
    with pytest.raises(LabError, match="is too large"):
        read_picture(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
def test_files_cut_off_anywhere_are_one_line(suffix, place):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(place / f"x.{suffix}")
    content = (place / f"x.{suffix}").read_bytes()
    for part in (0, 0.02, 0.1, 0.5):
        (place / f"x.{suffix}").write_bytes(content[: int(part * len(content))])
        with pytest.raises(LabError, match=f"x.{suffix} is ") as found:
            in_folder(place / f"x.{suffix}")
        assert "\n" not in str(found.value)
        assert str(place / f"x.{suffix}") in str(found.value)


def test_what_is_no_picture_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    for name, message in (
        ("pipe.png", "it is a pipe"),
        ("text.png", "is not a picture"),
        ("gone.png", "no picture at"),
        ("", "no picture at"),
    ):
        with pytest.raises(LabError, match=message):
            read_picture(tmp_path / name)


def test_damaged_exif_leaves_the_picture_readable(place):
    GREY.save(place / "x.jpg", quality=100, exif=b"Exif\0\0" + b"MM\0*" + b"\xff" * 30)
    for x in both(place / "x.jpg"):
        assert_close(x[0], EXPECTED, atol=0.05, rtol=0)


@pytest.mark.parametrize(("edge", "size"), [(80, 8), (83, 8), (101, 16), (16, 16), (33, 32), (1000, 7), (2100, 7)])
def test_areas_are_averaged_exactly(edge, size):
    pixels = np.random.default_rng(edge).integers(0, 256, (edge, edge), dtype=np.uint8)
    got = (from_picture(Image.fromarray(pixels), 1, size)[0, 0] + 1) * 127.5
    # by definition: the integral of the piecewise constant picture over each square
    fine = pixels.astype(np.float64)
    total = np.zeros((edge + 1, edge + 1))
    total[1:, 1:] = fine.cumsum(0).cumsum(1)
    at = np.linspace(0, edge, size + 1)
    knots = np.arange(edge + 1)
    rows = np.stack([np.interp(at, knots, column) for column in total.T], axis=1)
    both_ways = np.stack([np.interp(at, knots, row) for row in rows])
    expected = np.diff(np.diff(both_ways, axis=0), axis=1) / (edge / size) ** 2
    atol = 0.01 if edge < 1024 else 0.5  # larger ones shrink in two steps, the first to whole levels
    assert_close(got, torch.from_numpy(expected).float(), atol=atol, rtol=0)


def test_the_centre_square_is_taken_and_small_pictures_grow():
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255
    assert_close(from_picture(Image.fromarray(wide), 3, 4), torch.ones(1, 3, 4, 4))
    assert_close(from_picture(Image.new("L", (3, 5), 255), 1, 16), torch.ones(1, 1, 16, 16))


def test_a_large_jpeg_is_decoded_small_and_reads_the_same(place):
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)).resize((900, 1200))
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth.save(place / "x.jpg", quality=95, exif=exif)
    assert read_picture(place / "x.jpg", 256).size == (600, 450)  # a half, and turned
    seen, alone = both(place / "x.jpg", 3, 16)
    assert_close(seen, alone, atol=0.03, rtol=0)
    assert_close(load_picture(place / "x.jpg", 3, 16)[0], seen, atol=0.005, rtol=0)
