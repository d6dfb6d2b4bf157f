"""Pictures that are decoded once and read from the cache: the same numbers, other files, interruptions, full disks."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.data import cache, decoded
from rrepa_lab.data.cache import entries
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.decoded import CachedImages, prepare, with_cache
from rrepa_lab.data.loaders import SeededBatches, stream
from rrepa_lab.data.splits import load_split, read_split
from rrepa_lab.data.subset import limited, whole

DRAW = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RREPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of two classes, of different sizes and kinds, some of them turned by their EXIF tag."""
    folder = tmp_path / "photos"
    for split, count in {"train": 12, "test": 6}.items():
        for row in range(count):
            place = folder / split / ("cat" if row % 2 else "dög house")
            place.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(DRAW.integers(0, 256, (20 + row, 31, 3), np.uint8))
            exif = Image.Exif()
            exif[0x0112] = 1 + row % 8
            if row % 3 == 0:
                picture.convert("CMYK").save(place / f"{row}.jpg", exif=exif)
            elif row % 3 == 1:
                picture.save(place / f"{row}.png", exif=exif)
            else:
                Image.fromarray(DRAW.integers(0, 65536, (20, 24), np.uint16)).save(place / f"{row}.png")
    return folder


def config(folder: Path, **more: Any) -> DataConfig:
    return DataConfig(**{"name": "folder", "path": str(folder), "image_size": 16, "channels": 3} | more)


def test_the_numbers_are_those_of_the_files(photos):
    for channels in (1, 3):
        data = config(photos, channels=channels)
        files, images = load_split(data, "train"), read_split(data, "train")
        assert isinstance(images, CachedImages)
        assert not images.decoded
        before = images.__getitems__([3, 0])  # from the files
        prepare(images)
        assert images.decoded
        for mine, theirs in zip(images.__getitems__(range(12)), files.__getitems__(range(12)), strict=True):
            torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
        torch.testing.assert_close(images.__getitems__([3, 0]).x, before.x, atol=0, rtol=0)
        assert (images.fingerprint, images.classes) == (files.fingerprint, files.classes)
        assert images.labels.tolist() == files.labels.tolist()
    assert [entry.rows for entry in entries()] == [12, 12]


def test_a_file_is_decoded_once(photos, monkeypatch):
    prepare(read_split(config(photos), "train"))
    monkeypatch.setattr(decoded, "stream", lambda *_: pytest.fail("decoded again"))
    again = read_split(config(photos), "train")
    assert again.decoded
    shutil.rmtree(photos / "train" / "cat")  # other images: another array
    assert not read_split(config(photos, holdout=0), "train").decoded


@pytest.mark.parametrize("change", ["replaced", "size", "channels", "decoder"])
def test_what_the_pictures_depend_on_is_another_array(photos, change, monkeypatch):
    prepare(read_split(config(photos), "test"))
    more = {"size": {"image_size": 8}, "channels": {"channels": 1}}.get(change, {})
    if change == "replaced":  # by one of the same size in bytes
        file = next((photos / "test" / "cat").glob("*.png"))
        found = file.stat()
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 10))
    if change == "decoder":
        monkeypatch.setattr(decoded, "DECODER", -1)
    assert not read_split(config(photos, **more), "test").decoded


def test_settings_say_what_is_kept(photos):
    assert not isinstance(read_split(config(photos, cache="off"), "train"), CachedImages)
    assert not isinstance(read_split(DataConfig(), "test"), CachedImages)
    large = prepare(read_split(config(photos, cache_limit=0), "train"))
    assert entries() == []
    assert large.__getitems__([0]).x.shape == (1, 3, 16, 16)
    prepare(read_split(config(photos, cache_limit=0, cache="on"), "train"))
    assert len(entries()) == 1
    with pytest.raises(rl.LabError, match="data.cache"):
        rl.preset("imagefolder-tiny-none").override({"data.cache": "sometimes"})


def test_a_subset_reads_files_until_all_are_decoded(photos):
    images = read_split(config(photos), "train")
    part = limited(images, 4)
    assert whole(part).x.shape == (4, 3, 16, 16)
    assert entries() == []
    first = whole(part).x
    prepare(images)
    torch.testing.assert_close(whole(part).x, first, atol=0, rtol=0)


def test_other_processes_open_the_map_themselves(photos):
    images = prepare(read_split(config(photos), "train"))
    copy = pickle.loads(pickle.dumps(images))
    assert len(pickle.dumps(images)) < 5000
    torch.testing.assert_close(copy.__getitems__([5]).x, images.__getitems__([5]).x, atol=0, rtol=0)
    order = SeededBatches(12, 4, 0, 0, 6)
    streams = [list(stream(one, order, 2)) for one in (images, load_split(config(photos), "train"))]
    for mine, theirs in zip(*streams, strict=True):
        torch.testing.assert_close(mine.x, theirs.x, atol=0, rtol=0)


def test_workers_decode_as_one_process_does(photos, monkeypatch):
    monkeypatch.setattr(decoded, "FEW", 0)
    monkeypatch.setattr(decoded, "BAR", 0)
    monkeypatch.setattr(cache, "CHUNK", 5)
    images = prepare(read_split(config(photos), "train"))
    torch.testing.assert_close(images.__getitems__(range(12)).x, load_split(config(photos), "train").__getitems__(range(12)).x)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_cannot_be_read_is_named_and_the_rows_before_it_are_kept(photos, monkeypatch, workers):
    monkeypatch.setattr(cache, "CHUNK", 2)
    monkeypatch.setattr(decoded, "FEW", 0 if workers else 10**6)
    images = read_split(config(photos), "train")
    broken = photos / "train" / images.files[7]
    assert images.fingerprint  # was taken while the file was there, as on a disk that comes and goes
    aside = broken.rename(photos / "aside")
    with pytest.raises(rl.LabError, match=f"{broken.name}.*mend the file, or take it out") as caught:
        prepare(images)
    assert "\n" not in str(caught.value)
    (entry,) = entries()
    assert not entry.complete
    assert json.loads((entry.folder / "progress.json").read_text())["rows"] == 6
    aside.rename(broken)
    seen: list[int] = []
    real = decoded.stream
    monkeypatch.setattr(decoded, "stream", lambda s, batches, w: real(s, [seen.extend(b) or b for b in batches], w))
    prepare(read_split(config(photos), "train"))
    assert seen == [*range(6, 12)], "goes on where it had stopped"


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_one_line(photos, root, monkeypatch):
    images = read_split(config(photos), "train")
    monkeypatch.setattr(cache, "SPARE", 2**60)
    with pytest.raises(rl.LabError, match=r"the cache .* of 12 pictures needs .* are free; free some space there.*--cache DIR"):
        prepare(images)
    assert not root.exists() or list(root.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("RREPA_CACHE", str(photos / "test" / "cat" / "1.png"))
    with pytest.raises(rl.LabError, match="cannot be written.*data.cache=off"):
        prepare(read_split(config(photos), "train"))


def test_a_cache_of_another_version_or_cut_off_is_made_again(photos, root):
    images = prepare(read_split(config(photos), "train"))
    (entry,) = entries()
    about = entry.folder / "about.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 99'))
    again = read_split(config(photos), "train")
    assert not again.decoded
    prepare(again)
    assert json.loads(about.read_text())["format"] == 1
    with (entry.folder / "array.npy").open("r+b") as file:
        file.truncate(200)
    final = prepare(read_split(config(photos), "train"))
    torch.testing.assert_close(final.__getitems__(range(12)).x, images.source.__getitems__(range(12)).x)


def test_a_set_of_a_users_own_is_kept_where_that_is_asked_for():
    class Slow:
        classes, levels, fingerprint = ["a"], 256, "0" * 16
        labels = torch.zeros(5, dtype=torch.long)

        def __len__(self) -> int:
            return 5

        def __getitems__(self, indices: Any) -> Any:
            x = torch.tensor(indices).float()[:, None, None, None].expand(-1, 1, 8, 8) / 127.5 - 1
            return rl.Batch(x, self.labels[indices])

    assert not isinstance(with_cache(Slow(), DataConfig()), CachedImages)
    images = prepare(with_cache(Slow(), DataConfig(cache="on")))
    assert images.decoded
    torch.testing.assert_close(images.__getitems__([4, 1]).x, Slow().__getitems__([4, 1]).x)


def test_a_training_decodes_once_and_says_how_long_it_waits(photos, tmp_path):
    base = rl.preset("imagefolder-tiny-none").override({
        "data.path": str(photos), "data.image_size": 16, "flow.image_size": 16, "flow.patch_size": 4, "flow.width": 16,
        "flow.head_width": 16, "flow.blocks": 1, "flow.layers": 1, "train.steps": 4, "train.batch": 4, "train.log_every": 2,
        "train.precision": "float32", "train.num_workers": 0,
    })  # fmt: skip
    found = {}
    for kept in ("on", "off"):
        out = tmp_path / kept
        reports = list(rl.train(base, out, settings={"data.cache": kept}, device="cpu"))
        assert all(0 <= report.data_wait <= 1 for report in reports)
        assert "waited for images" in (out / "card.md").read_text("utf-8")
        assert "data_wait" in (out / "metrics.jsonl").read_text("utf-8")
        found[kept] = [report.loss for report in reports]
        assert len([entry for entry in entries() if entry.rows == 10]) == 1
    assert found["on"] == found["off"]
    # how pictures are kept may differ where a training goes on
    more = list(rl.train(base, tmp_path / "on", settings={"data.cache": "off"}, resume=True, device="cpu"))
    assert more == []


def test_an_instrument_that_reads_a_split_decodes_it(photos, tmp_path):
    base = rl.preset("imagefolder-tiny-none").override({
        "data.path": str(photos), "data.image_size": 16, "flow.image_size": 16, "flow.patch_size": 4, "flow.width": 16,
        "flow.head_width": 16, "flow.blocks": 1, "flow.layers": 1, "train.steps": 1, "train.batch": 4,
        "train.precision": "float32", "train.num_workers": 0,
    })  # fmt: skip
    assert list(rl.train(base, tmp_path / "run", device="cpu"))
    run = rl.load(tmp_path / "run")
    rl.probe(run, "block.1.layer.1", probes=["knn"], baselines=False, fit=rl.ProbeFit(neighbours=1))
    assert sorted(entry.rows for entry in entries()) == [6, 10]
