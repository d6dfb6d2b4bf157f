"""`rrepa-lab data`: what a set holds, and what the cache holds of it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rrepa_lab.cli import main
from rrepa_lab.data.cache import entries
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.decoded import prepare
from rrepa_lab.data.splits import read_split


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RREPA_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for split, names in {"train": ("ant", "bee"), "test": ("ant",)}.items():
        for name in names:
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for row in range(4):
                Image.fromarray(draw.integers(0, 256, (9, 12 - row, 3), np.uint8)).save(folder / f"{row}.png")
    (tmp_path / "photos" / "train" / ".DS_Store").touch()
    frames = [Image.new("L", (8, 8), grey) for grey in (0, 255)]
    frames[0].save(tmp_path / "photos" / "train" / "ant" / "moves.gif", save_all=True, append_images=frames[1:])
    return tmp_path / "photos"


def test_describe_says_what_there_is(photos, capsys):
    assert main(["data", "describe", str(photos), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["classes"], found["name"], found["ignored"]) == (
        ["ant", "bee"],
        "folder",
        {"hidden or system entries in train/": 1},
    )
    train, test = found["splits"]["train"], found["splits"]["test"]
    assert (train["images"], train["per_class"], train["animated"]) == (9, {"ant": 5, "bee": 4}, 1)
    assert train["sizes"]["12x9"] == 2
    assert train["modes"]["RGB"] == 8
    assert (test["rule"], test["missing"], test["unreadable"]) == ("test = test/", ["bee"], [])
    images = read_split(DataConfig(name="folder", path=str(photos), image_size=32, channels=3), "train")
    assert train["fingerprint"] == images.fingerprint
    assert train["cache"] == {"bytes": 9 * 32 * 32 * 3, "folder": str(images.spec.folder), "complete": False, "kept": True}
    assert main(["data", "describe", str(photos)]) == 0
    shown = capsys.readouterr().out
    for words in ("2: ant, bee", "4 to 5 in a class", "none of bee", train["fingerprint"], "not made yet", "first frame"):
        assert words in shown


def test_a_file_that_is_cut_off_is_found_by_decoding(photos, capsys):
    file = photos / "train" / "bee" / "2.png"
    file.write_bytes(file.read_bytes()[:120])
    (photos / "train" / "bee" / "text.jpg").write_text("no picture")
    assert main(["data", "describe", str(photos)]) == 1
    assert "1: " in capsys.readouterr().out
    assert main(["data", "describe", str(photos), "--decode", "--json"]) == 1
    bad = json.loads(capsys.readouterr().out)["splits"]["train"]["unreadable"]
    assert len(bad) == 2
    assert str(file) in bad[0]


def test_a_named_set_and_one_that_is_not_there(tmp_path, capsys):
    assert main(["data", "describe", "digits"]) == 0
    assert "360 images" in capsys.readouterr().out
    assert main(["data", "describe", str(tmp_path / "none")]) == 2
    assert "no image folder at" in capsys.readouterr().err


def test_the_cache_is_listed_and_cleared(photos, capsys):
    for size in (8, 16):
        prepare(read_split(DataConfig(name="folder", path=str(photos), image_size=size, channels=3), "train"))
    assert main(["data", "cache", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["kind"], row["rows"], row["complete"]) for row in rows] == [("pictures", 9, True)] * 2
    assert main(["data", "clear"]) == 2
    assert main(["data", "clear", "pictures-0"]) == 2
    assert main(["data", "clear", rows[0]["entry"]]) == 0
    assert [one.folder.name for one in entries()] == [rows[1]["entry"]]
    assert main(["data", "clear", "--all"]) == 0
    assert entries() == []


def test_another_folder_for_the_cache(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "RREPA_CACHE", os.environ["RREPA_CACHE"])  # restored afterwards
    assert main(["data", "describe", str(photos), "--cache", str(tmp_path / "other"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["train"]["cache"]["folder"].startswith(str(tmp_path / "other"))
