"""Odd files in an image folder, read from the files and from the cache of decoded pictures."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.data.cache import entries
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.decoded import CachedImages, prepare
from rrepa_lab.data.splits import load_split, read_split
from rrepa_lab.data.subset import whole

TINY = {
    "data.image_size": 8, "flow.image_size": 8, "flow.patch_size": 4, "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2,
    "flow.layers": 1, "train.steps": 2, "train.batch": 4, "train.num_workers": 0, "train.precision": "float32",
    "train.log_every": 2, "train.eval_every": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RREPA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six noisy pictures of each of two classes for training, two for testing."""
    draw = np.random.default_rng(0)
    for split, count in {"train": 6, "test": 2}.items():
        for name in ("ant", "bee"):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw.integers(0, 256, (24, 24, 3), np.uint8)).save(place / f"{number}.png")
    return tmp_path / "photos"


def read_twice(folder: Path, count: int) -> torch.Tensor:
    """All training pictures, which are the same from the files and from the cache."""
    data = DataConfig(name="folder", path=str(folder), image_size=8, channels=3)
    images = prepare(read_split(data, "train"))
    assert isinstance(images, CachedImages)
    assert images.decoded
    assert len(images) == count
    x = whole(images).x
    torch.testing.assert_close(x, whole(load_split(data, "train")).x, atol=0, rtol=0)
    return x


def train(folder: Path, out: Path, **settings: object) -> None:
    list(rl.train("imagefolder-none", out, settings=TINY | {"data.path": str(folder)} | settings, device="cpu"))


def test_links_are_followed_where_they_lead_to_a_picture(photos, tmp_path):
    ant = photos / "train" / "ant"
    Image.new("RGB", (9, 9), (255, 0, 0)).save(tmp_path / "outside.png")
    (ant / "9-outside.png").symlink_to(tmp_path / "outside.png")
    (ant / "dangling.png").symlink_to(tmp_path / "gone.png")
    (ant / "circle.png").symlink_to(ant / "circle.png")
    (ant / "up").symlink_to(photos / "train")
    x = read_twice(photos, 13)
    assert x[6].mean(dim=(1, 2)).tolist() == [1, -1, -1]
    train(photos, tmp_path / "run")


def test_a_link_that_breaks_after_the_listing_is_named(photos, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    (photos / "train" / "bee" / "x.png").symlink_to(tmp_path / "outside.png")
    images = read_split(DataConfig(name="folder", path=str(photos), image_size=8, channels=3), "train")
    (tmp_path / "outside.png").unlink()
    with pytest.raises(rl.LabError, match=r"train/bee/x.png") as found:
        prepare(images)
    assert "\n" not in str(found.value)


def test_leftovers_of_systems_are_no_pictures_of_the_cache(photos):
    before = read_twice(photos, 12)
    for place in (photos / "train", photos / "train" / "ant"):
        (place / "__MACOSX").mkdir()
        Image.new("RGB", (8, 8)).save(place / "__MACOSX" / "0.png")
        for name in ("Thumbs.db", ".DS_Store", "._0.png"):
            (place / name).write_bytes(b"\0\5\26\7")
    torch.testing.assert_close(read_twice(photos, 12), before)
    assert len(entries()) == 1, "the same pictures"


@pytest.mark.skipif(sys.platform != "linux", reason="names there are any bytes")
def test_names_that_are_not_utf8(photos, tmp_path):
    place = os.fsencode(photos / "train" / "ant")
    os.rename(place + b"/5.png", place + b"/\xff\xe4.png")
    os.rename(os.fsencode(photos / "train" / "bee"), os.fsencode(photos / "train") + b"/b\xe9e")
    os.rename(os.fsencode(photos / "test" / "bee"), os.fsencode(photos / "test") + b"/b\xe9e")
    read_twice(photos, 12)
    train(photos, tmp_path / "run")
    run = rl.load(tmp_path / "run")
    assert run.data("test").y.tolist() == [0, 0, 1, 1]
    broken = place + b"/\xff\xe4.png"
    with open(broken, "wb") as file:
        file.write(b"cut off")
    with pytest.raises(rl.LabError, match="is not a picture") as found:
        train(photos, tmp_path / "other")
    str(found.value).encode("utf-8")  # can be printed


def test_one_class_trains_samples_and_is_classified(photos, tmp_path, capsys):
    from rrepa_lab.cli import main

    for split in ("train", "test"):
        for file in (photos / split / "bee").iterdir():
            file.unlink()
        (photos / split / "bee").rmdir()
    train(photos, tmp_path / "run")
    run = rl.load(tmp_path / "run")
    assert run.classes == ["ant"]
    assert rl.sample(run, [0, 1], [0, 0]).images.shape == (2, 3, 8, 8)
    found = rl.classify(run, run.data("test").x)
    assert found.label.tolist() == [0, 0]
    assert main(["classify", str(tmp_path / "run"), "--split", "test", "--limit", "2"]) == 0
    assert "ant" in capsys.readouterr().out


def test_the_first_frame_of_an_animation_is_cached(photos):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 255, 255), (0, 0, 0), (0, 0, 0))]
    frames[0].save(photos / "train" / "ant" / "0.gif", save_all=True, append_images=frames[1:])
    assert read_twice(photos, 13)[0].min() == 1


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_picture_that_is_cut_off_ends_a_training_in_one_line(photos, tmp_path, kind, cache):
    file = photos / "train" / "bee" / f"9.{kind}"
    Image.open(photos / "train" / "bee" / "0.png").save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(rl.LabError, match="mend the file, or take it out") as found:
        train(photos, tmp_path / "run", **{"data.cache": cache})
    assert "\n" not in str(found.value)
    assert str(file) in str(found.value)
    assert f"rrepa-lab data describe {photos} --decode" in str(found.value)
    if cache == "on":
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir()), "nothing is begun"
