"""A run knows the images it was trained with, and says when others are at hand."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.errors import LabWarning


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
