"""Fingerprints: equal for equal images wherever they lie, and another one for every difference that can be seen."""

import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.images import TensorImages
from rrepa_lab.data.splits import load_split
from rrepa_lab.data.subset import limited


def photos(root: Path, names: tuple[str, ...] = ("ant", "bee"), splits: tuple[str, ...] = ("train", "test")) -> Path:
    """An image folder of uncompressed pictures, four of each class in every split, all of one size in bytes."""
    for number, (part, name) in enumerate((part, name) for part in splits for name in names):
        for row in range(4):
            path = root / part / name / f"{row}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * row, 50 * number, 7)).save(path)
    return root


def split(root: Path, name: str = "train", size: int = 8, classes: list[str] | None = None) -> Any:
    return load_split(DataConfig(name="folder", path=str(root), image_size=size, channels=3), name, classes)


def test_a_folder_may_be_copied_and_read_at_any_size(tmp_path):
    root = photos(tmp_path / "one")
    shutil.copytree(root, tmp_path / "two")
    first = split(root)
    assert len(first.fingerprint) == 16
    assert int(first.fingerprint, 16) >= 0
    assert split(tmp_path / "two").fingerprint == first.fingerprint == split(root, size=4).fingerprint
    assert split(tmp_path / "two").stamp != first.stamp
    assert split(root).stamp == first.stamp


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "replaced", "other class", "other order", "other pixels"])
def test_a_change_of_a_folder_is_another_fingerprint(tmp_path, change):
    root = photos(tmp_path)
    before, file = split(root).fingerprint, root / "train" / "ant" / "1.bmp"
    if change == "added":
        shutil.copy(file, file.with_name("9.bmp"))
    elif change == "removed":
        file.unlink()
    elif change == "renamed":
        file.rename(file.with_name("one.bmp"))
    elif change == "replaced":
        Image.new("RGB", (9, 9)).save(file)
    elif change == "other class":
        file.rename(root / "train" / "bee" / "9.bmp")
    elif change == "other pixels":  # of the same size
        Image.new("RGB", (8, 8), "white").save(file)
    classes = ["bee", "ant"] if change == "other order" else None
    assert split(root, classes=classes).fingerprint != before


def test_a_file_replaced_in_its_place_changes_the_stamp(tmp_path):
    root = photos(tmp_path)
    before, file = split(root).stamp, root / "train" / "ant" / "1.bmp"
    found = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert split(root).stamp != before


def test_umlauts_of_either_form_are_the_same_names(tmp_path):
    for form in ("NFC", "NFD"):
        names = [unicodedata.normalize(form, name) for name in ("Ölkäfer", "Ähre ohne", "zebra")]
        photos(tmp_path / form, tuple(names), ("train",))
        for row in range(4):
            file = tmp_path / form / "train" / "zebra" / f"{row}.bmp"
            file.rename(file.with_name(unicodedata.normalize(form, f"ä{row}.bmp")))
    assert split(tmp_path / "NFC").fingerprint == split(tmp_path / "NFD").fingerprint
    # the share of a folder that is divided does not depend on the form either
    (a, b), (c, d) = ([split(tmp_path / form, name) for name in ("train", "test")] for form in ("NFC", "NFD"))
    assert (a.fingerprint, b.fingerprint) == (c.fingerprint, d.fingerprint)
    assert a.fingerprint != b.fingerprint


def test_numbers_in_memory():
    x, y = torch.arange(24.0).view(3, 1, 2, 4), torch.tensor([0, 1, 1])
    first = TensorImages(x, y, ["a", "b"], 256).fingerprint
    assert TensorImages(x.clone(), y.clone(), ["a", "b"], 256).fingerprint == first
    others = [(x + 1, y, ["a", "b"]), (x, 1 - y, ["a", "b"]), (x, y, ["a", "c"]), (x.view(3, 1, 4, 2), y, ["a", "b"])]
    assert len({TensorImages(*other, 256).fingerprint for other in others} | {first}) == 5


def test_a_subset_depends_on_its_rows():
    digits = load_split(DataConfig(), "test")
    parts = [limited(digits, 40, seed) for seed in (0, 0, 1)] + [limited(digits, 41)]
    assert parts[0].fingerprint == parts[1].fingerprint
    assert len({part.fingerprint for part in parts} | {digits.fingerprint}) == 4
    assert limited(digits, 10_000).fingerprint == digits.fingerprint


def test_another_process_finds_the_same(tmp_path):
    root = photos(tmp_path)
    command = (
        "from rrepa_lab.data.config import DataConfig; from rrepa_lab.data.splits import load_split;"
        f"print(load_split(DataConfig(name='folder', path={str(root)!r}, channels=3), 'train').fingerprint,"
        "load_split(DataConfig(), 'test').fingerprint)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    printed = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True, env=env).stdout
    assert printed.split() == [split(root).fingerprint, load_split(DataConfig(), "test").fingerprint]


def test_a_file_that_is_gone_is_no_error_before_it_is_read(tmp_path):
    root = photos(tmp_path)
    images = split(root)
    (root / "train" / "ant" / "1.bmp").unlink()
    assert images.fingerprint != split(root).fingerprint
