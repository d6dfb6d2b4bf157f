"""A run knows the images it was trained with, and says when others are at hand."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.errors import LabError, LabWarning


def test_other_images_than_those_of_the_training_are_a_warning(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for row in range(6):
                Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{row}.png")
    config = rl.preset("imagefolder-tiny-none").override({
        "data.path": str(tmp_path / "photos"), "data.image_size": 8, "flow.image_size": 8, "flow.patch_size": 4,
        "flow.width": 16, "flow.head_width": 16, "flow.blocks": 1, "flow.layers": 1, "train.steps": 1, "train.batch": 4,
        "train.precision": "float32", "train.num_workers": 0,
    })  # fmt: skip
    assert list(rl.train(config, tmp_path / "run", device="cpu"))
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    run = rl.load(tmp_path / "run")
    assert {"train", "test"} <= stored.keys()
    assert stored["test"] == run.images("test").fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.data("test")
    shutil.copy(tmp_path / "photos" / "test" / "ant" / "0.png", tmp_path / "photos" / "test" / "bee" / "9.png")
    with pytest.warns(LabWarning, match=rf"the test images at hand \(13, fingerprint .*trained with \({stored['test']}\)"):
        run.data("test", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.data("test", 4)
    run.save(tmp_path / "copy")


def copies(folder: Path, label: str, names: range) -> None:
    (folder / label).mkdir(parents=True, exist_ok=True)
    for number in names:
        Image.new("RGB", (16, 16), (number % 256, 100, len(label) * 40)).save(folder / label / f"{number}.png")


@pytest.mark.parametrize("count", [40, 2], ids=["by class", "all classes together"])
def test_pictures_that_are_added_move_none_to_another_split(tmp_path, count):
    photos = tmp_path / "photos"
    for label in ("cat", "dog", "owl"):
        copies(photos, label, range(count))
    small = {
        "data.path": str(photos), "data.image_size": 16, "flow.image_size": 16, "flow.width": 64, "flow.blocks": 2,
        "flow.layers": 1, "train.steps": 2, "train.batch": 4, "train.num_workers": 0, "train.warmup": 0,
    }  # fmt: skip
    config = rl.preset("imagefolder-tiny-none").override(small)
    out = tmp_path / "run"
    list(rl.train(config, out, device="cpu"))
    before = {split: set(rl.load(out).images(split).files) for split in ("train", "val", "test")}
    assert all(before.values())
    for label in ("cat", "dog", "owl"):
        copies(photos, label, range(1000, 1000 + 10 * count))
    with pytest.warns(LabWarning, match="not those that run was trained with"):
        after = {split: set(rl.load(out).images(split).files) for split in ("train", "val", "test")}
    for split, files in before.items():
        assert files <= after[split], split
    assert set.union(*after.values()) == {f"{label}/{n}.png" for label in ("cat", "dog", "owl") for n in
                                          [*range(count), *range(1000, 1000 + 10 * count)]}  # fmt: skip
    with pytest.warns(LabWarning, match="not those that .*run began with"), pytest.raises(LabError, match="train.steps was 2"):
        list(rl.train(config.override({"train.steps": 3}), out, resume=True, device="cpu"))
