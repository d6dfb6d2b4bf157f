"""Named data sets, read from files in the published formats that hold synthetic pictures."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.data import splits as data_splits
from rrepa_lab.data.config import DATA_SETS, DataConfig
from rrepa_lab.data.pixels import to_uint8
from rrepa_lab.data.sets.cifar10 import Cifar10
from rrepa_lab.data.sets.cifar100 import Cifar100
from rrepa_lab.data.sets.fashion_mnist import FashionMnist
from rrepa_lab.data.splits import class_names, split_rule, splits

load_split: Any = data_splits.load_split  # with the attributes of each kind of set
DRAW = np.random.default_rng(0)


def cifar10(root: Path, count: int = 40) -> np.ndarray:
    """The python version; returns the training pictures (N, 32, 32, 3)."""
    folder, parts = root / "cifar-10-batches-py", []
    folder.mkdir(parents=True)
    for name in Cifar10.files[:-1]:
        data = DRAW.integers(0, 256, (count, 3072), np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [row % 10 for row in range(count)]}, protocol=2))
        parts.append(data)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(Cifar10.names)}, protocol=2))
    return np.concatenate(parts[:-1]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def cifar100(root: Path) -> np.ndarray:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    data = DRAW.integers(0, 256, (200, 3072), np.uint8)
    for name in ("train", "test"):
        values = {"data": data, "fine_labels": [row % 100 for row in range(200)], "coarse_labels": [0] * 200}
        (folder / name).write_bytes(pickle.dumps(values, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": list(Cifar100.names)}, protocol=2))
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def mnist(root: Path, folder: str = "MNIST") -> np.ndarray:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    data, labels = DRAW.integers(0, 256, (60, 28, 28), np.uint8), np.arange(60, dtype=np.uint8) % 10
    for name in ("train", "t10k"):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(np.array([0x803, 60, 28, 28], ">i4").tobytes() + data.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(np.array([0x801, 60], ">i4").tobytes() + labels.tobytes())
    return data


def fashion_mnist(root: Path) -> np.ndarray:
    return mnist(root, "FashionMNIST")


def stl10(root: Path) -> np.ndarray:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    data, labels = DRAW.integers(0, 256, (30, 96, 96, 3), np.uint8), np.arange(30, dtype=np.uint8) % 10
    for name in ("train", "test"):
        (folder / f"{name}_X.bin").write_bytes(data.transpose(0, 3, 2, 1).tobytes())  # columns first
        (folder / f"{name}_y.bin").write_bytes((labels + 1).tobytes())
    return data


WRITERS: dict[str, tuple[Callable[[Path], np.ndarray], int, int]] = {
    "cifar10": (cifar10, 32, 3), "cifar100": (cifar100, 32, 3), "mnist": (mnist, 28, 1),
    "fashion-mnist": (fashion_mnist, 28, 1), "stl10": (stl10, 96, 3),
}  # fmt: skip


def config(name: str, root: Path, size: int, channels: int = 3, **more: object) -> DataConfig:
    return DataConfig(name=name, path=str(root), image_size=size, channels=channels, **more)


@pytest.mark.parametrize("name", WRITERS)
def test_a_published_set_gives_the_pictures_of_its_files(tmp_path, name):
    write, size, channels = WRITERS[name]
    stored = write(tmp_path)
    data = config(name, tmp_path, size, channels)
    images = load_split(data, "train")
    assert splits(data) == ("train", "test")
    assert len(class_names(data)) == len(images.classes) == (100 if name == "cifar100" else 10)
    x, y = images.__getitems__(range(len(images)))
    np.testing.assert_array_equal(to_uint8(x), stored.reshape(len(stored), size, size, channels))
    assert y.tolist() == (torch.arange(len(stored)) % len(images.classes)).tolist()
    assert (x.shape[1:], images.levels) == ((channels, size, size), 256)
    # other sizes and channels, from the same pictures
    small = load_split(config(name, tmp_path, size // 2, 4 - channels), "train")
    assert small.__getitems__([3]).x.shape == (1, 4 - channels, size // 2, size // 2)
    assert small.fingerprint == images.fingerprint
    assert load_split(config(name, tmp_path, size, channels), "test").fingerprint != images.fingerprint or name != "cifar10"


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_expected_is_said_where_nothing_is(tmp_path, name):
    with pytest.raises(rl.LabError, match=rf"^{name}: there is nothing of it at .*; expected .*data.download=true") as caught:
        load_split(config(name, tmp_path, 32), "train")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        rl.LabError, match=f"^{name}: data.path is not set, and .*RREPA_DATA.*data describe {name} --set"
    ) as caught:
        class_names(DataConfig(name=name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_sets_without_a_path_are_looked_for_in_one_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv("RREPA_DATA", str(tmp_path))
    _, size, channels = WRITERS[name]
    found: Any = DATA_SETS[name]
    data = DataConfig(name=name, image_size=size, channels=channels)
    for split in ("train", "test"):
        for label in found.names:
            pictures(tmp_path / name / split / label.replace("/", "_"), 1)
    assert len(load_split(data, "train")) == len(found.names)  # class folders below a folder with the name of the set
    stored = WRITERS[name][0](tmp_path)
    assert len(load_split(data, "train")) == len(stored)  # torchvision's files come first
    assert load_split(config(name, tmp_path, size, channels), "train").fingerprint == load_split(data, "train").fingerprint


def test_a_dry_run_counts_the_images_where_they_are_found_and_downloads_none(tmp_path, monkeypatch, capsys):
    def fetched(*_: object) -> None:
        raise AssertionError("a dry run has downloaded pictures")

    monkeypatch.setenv("RREPA_DATA", str(tmp_path))
    monkeypatch.setattr(Cifar10, "read", fetched)
    words = ["train", "cifar10-tiny-none", "--dry-run", "--no-time", "--set", "data.download=true"]
    assert main(words) == 0
    assert "images (" not in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setenv("RREPA_DATA", str(tmp_path))
    cifar10(tmp_path)
    assert main(words) == 0
    assert "images (train = the published training pictures but for 10%" in capsys.readouterr().out


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_missing_or_cut_off_is_one_line(tmp_path, name):
    WRITERS[name][0](tmp_path)
    found: Any = DATA_SETS[name]
    file = tmp_path / found.folder / found.files[0]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2 + 3])
    with pytest.raises(rl.LabError, match="download it again") as caught:
        load_split(config(name, tmp_path, 32), "train")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(rl.LabError, match=f"lacks {found.files[0]}: set data.download=true, or copy it there"):
        load_split(config(name, tmp_path, 32), "train")


def test_a_part_of_the_training_pictures_is_set_aside_class_by_class(tmp_path):
    cifar10(tmp_path)
    data = config("cifar10", tmp_path, 32, holdout=0.1)
    train, val = load_split(data, "train"), load_split(data, "val")
    assert (splits(data), val.labels.bincount().tolist()) == (("train", "val", "test"), [2] * 10)
    assert len(train) == 180
    assert not {*train.rows.tolist()} & {*val.rows.tolist()}
    assert split_rule(data, "val") == "val = 10% of the published training pictures, stratified, seed 0"
    with pytest.raises(rl.LabError, match="cifar10 has no `val` split: set data.holdout"):
        load_split(config("cifar10", tmp_path, 32), "val")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    cifar10(tmp_path)

    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(rl.LabError, match="data_batch_2 is damaged, or no file of this set"):
        load_split(config("cifar10", tmp_path, 32), "train")
    assert not (tmp_path / "ran").exists()


def test_classes_go_by_the_names_of_the_run(tmp_path):
    stored = cifar10(tmp_path)
    data = config("cifar10", tmp_path, 32)
    order = [*reversed(class_names(data))]
    images = load_split(data, "train", order)
    assert images.classes == order
    assert images.labels.tolist()[:10] == [*reversed(range(10))]
    np.testing.assert_array_equal(to_uint8(images.__getitems__([0]).x)[0], stored[0])
    with pytest.raises(rl.LabError, match="cifar10 has no class 'unicorn'"):
        load_split(data, "train", ["unicorn"])


def pictures(folder: Path, count: int = 3, size: int = 8) -> None:
    folder.mkdir(parents=True)
    for row in range(count):
        Image.fromarray(DRAW.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{row}.png")


def test_an_image_folder_may_stand_for_a_published_set(tmp_path):
    for name in FashionMnist.names:
        for split in ("train", "test"):
            pictures(tmp_path / split / name.replace("/", "_").lower())
    data = config("fashion-mnist", tmp_path, 8, 1)
    images = load_split(data, "train")
    assert images.classes == list(FashionMnist.names) == class_names(data)
    assert images.labels.tolist() == np.repeat(np.arange(10), 3).tolist()
    assert images.files[0].startswith("t-shirt_top/")
    assert split_rule(data, "test") == "test = test/"
    pictures(tmp_path / "train" / "hat")
    with pytest.raises(rl.LabError, match=r"the class 'hat' in .*train is not one of fashion-mnist: .*data.name=folder"):
        load_split(data, "train")


# --- ImageNet ---------------------------------------------------------------------------------------------------------


def imagenet(root: Path, names: tuple[str, ...] = ("n01", "n02", "n03")) -> DataConfig:
    for split in ("train", "val"):
        for name in names:
            pictures(root / split / name, 20 if split == "train" else 2)
    return config("imagenet", root, 8, holdout=0.1)


def test_imagenet_is_tested_on_val_and_validated_on_a_part_of_train(tmp_path):
    data = imagenet(tmp_path)
    pictures(tmp_path / "test")  # without labels
    assert splits(data) == ("train", "val", "test")
    assert class_names(data) == ["n01", "n02", "n03"]
    counts = {split: load_split(data, split).labels.bincount().tolist() for split in splits(data)}
    assert counts == {"train": [18] * 3, "val": [2] * 3, "test": [2] * 3}
    assert load_split(data, "test").root.name == "val"
    assert "published validation pictures" in split_rule(data, "test")


@pytest.mark.parametrize("kind", ["LOC_synset_mapping.txt", "words.txt", "imagenet_class_index.json"])
def test_imagenet_has_readable_names_where_a_list_is_at_hand(tmp_path, kind):
    data = imagenet(tmp_path / "data")
    text = {
        "LOC_synset_mapping.txt": "n01 tench, Tinca tinca\nn02 crane\nn03 crane, machine\n",
        "words.txt": "n00\tcrane\nn01\ttench, Tinca tinca\nn02\tcrane\nn03\tcrane, machine\n",
        "imagenet_class_index.json": '{"0": ["n01", "tench"], "1": ["n02", "crane"], "2": ["n03", "crane"]}',
    }[kind]
    (tmp_path / kind).write_text(text)
    assert class_names(data) == ["tench", "crane (n02)", "crane (n03)"]
    images = load_split(data, "test", ["crane (n03)", "tench", "crane (n02)"])
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [name.split("/")[0] for name in images.files[::2]] == ["n03", "n01", "n02"]
    (tmp_path / kind).unlink()
    with pytest.raises(rl.LabError, match="'n01' in .*val is not one of tench, .*: lay a list of names"):
        load_split(data, "test", ["tench", "crane (n02)", "crane (n03)"])


def test_imagenet_names_what_it_lacks(tmp_path):
    with pytest.raises(rl.LabError, match="no val/ at .*: imagenet needs train/<synset>"):
        class_names(config("imagenet", tmp_path, 8))
    data = imagenet(tmp_path)
    (tmp_path / "train" / "n04").mkdir()
    with pytest.raises(rl.LabError, match="n04 holds no pictures: fill this class folder"):
        class_names(data)


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    return datasets


def table(datasets, count: int, labels: bool = True):
    stored = DRAW.integers(0, 256, (count, 8, 8, 3), np.uint8)
    values = {"id": list(range(count)), "img": [Image.fromarray(one) for one in stored]}
    kinds = {"id": datasets.Value("int64"), "img": datasets.Image()}
    if labels:
        values["label"], kinds["label"] = [row % 3 for row in range(count)], datasets.ClassLabel(names=["cat", "dog", "emu"])
    return datasets.Dataset.from_dict(values, features=datasets.Features(kinds)), stored


def test_a_set_saved_to_disk_is_read_offline(tmp_path, hub_cache):
    (train, stored), (held, other) = table(hub_cache, 30), table(hub_cache, 9)
    hub_cache.DatasetDict({"train": train, "validation": held}).save_to_disk(tmp_path / "copy")
    data = config("hub:someone/animals", tmp_path / "copy", 8)
    assert (class_names(data), splits(data)) == (["cat", "dog", "emu"], ("train", "test"))
    images = load_split(data, "train", ["emu", "cat", "dog"])
    np.testing.assert_array_equal(to_uint8(images.__getitems__(range(30)).x), stored)
    assert images.labels.tolist() == [1, 2, 0] * 10
    assert split_rule(data, "test") == "test = the split validation"
    held_out = load_split(data, "test")
    np.testing.assert_array_equal(to_uint8(held_out.__getitems__([8, 0]).x), other[[8, 0]])
    # the fingerprint does not depend on where it lies
    hub_cache.DatasetDict({"train": train, "validation": held}).save_to_disk(tmp_path / "elsewhere")
    again = load_split(config("hub:someone/animals", tmp_path / "elsewhere", 4), "train", ["emu", "cat", "dog"])
    assert again.fingerprint == images.fingerprint != held_out.fingerprint
    with pytest.raises(rl.LabError, match="the class 'cat' of hub:someone/animals is not one of the classes dog"):
        load_split(data, "train", ["dog"])


def test_a_set_without_splits_and_labels_is_divided_and_unconditional(tmp_path, hub_cache):
    table(hub_cache, 40, labels=False)[0].save_to_disk(tmp_path)
    data = config("hub:someone/plain", tmp_path, 8)
    counts = {split: len(load_split(data, split)) for split in splits(data)}
    assert (counts, class_names(data)) == ({"train": 32, "val": 4, "test": 4}, [])
    assert load_split(data, "test").labels.tolist() == [-1] * 4


def test_a_local_image_folder_is_read_by_datasets(tmp_path, hub_cache):
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            pictures(tmp_path / "data" / split / name)
    data = config("hub:someone/insects", tmp_path / "data", 8)
    images = load_split(data, "test")
    assert (images.classes, images.labels.tolist()) == (["ant", "bee"], [0, 0, 0, 1, 1, 1])
    with Image.open(tmp_path / "data" / "test" / "ant" / "0.png") as picture:
        np.testing.assert_array_equal(to_uint8(images.__getitems__([0]).x)[0], np.asarray(picture))
    assert len(images.fingerprint) == 16


def test_what_the_hub_gave_once_is_read_from_its_cache(tmp_path, hub_cache):
    train, stored = table(hub_cache, 12)
    (tmp_path / "files").mkdir()
    train.to_parquet(tmp_path / "files" / "train-0.parquet")
    hub_cache.load_dataset(str(tmp_path / "files"), cache_dir=str(tmp_path / "hf"))
    (tmp_path / "hf" / "files").rename(tmp_path / "hf" / "someone___files")  # as it is called when it comes from the Hub
    images = load_split(DataConfig(name="hub:someone/files", image_size=8, channels=3), "train", ["cat", "dog", "emu"])
    assert len(images) == 6  # of four in a class one is val and one is test
    np.testing.assert_array_equal(to_uint8(images.__getitems__([0]).x)[0], stored[images.rows[0]])


def test_errors_of_the_hub_are_one_line(tmp_path, hub_cache):
    with pytest.raises(rl.LabError, match="hub:a/b from the cache of datasets cannot be read .*set data.download=true"):
        class_names(DataConfig(name="hub:a/b"))
    with pytest.raises(rl.LabError, match="hub:a/b at .*: there is no such folder"):
        class_names(config("hub:a/b", tmp_path / "none", 8))
    with pytest.raises(rl.LabError, match="hub:a is no data set of the Hub: give hub:<owner>/<name>"):
        class_names(DataConfig(name="hub:a"))
    with pytest.raises(rl.LabError, match="the data set 'hub' is a family: give hub:<which>"):
        class_names(DataConfig(name="hub"))
    hub_cache.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(rl.LabError, match="hub:a/b has no column of pictures; it has text"):
        class_names(config("hub:a/b", tmp_path / "text", 8))
    for name in ("digits:x", "hubs:a/b", "hub:"):
        with pytest.raises(ValidationError, match="unknown data set"):
            DataConfig(name=name)


def test_a_row_of_the_hub_that_cannot_be_read_is_named(tmp_path, hub_cache):
    values = {"image": [{"bytes": b"no picture", "path": None}] * 2, "label": [0, 1]}
    kinds = hub_cache.Features({"image": hub_cache.Image(), "label": hub_cache.ClassLabel(names=["a", "b"])})
    rows = hub_cache.Dataset.from_dict(values, features=kinds)
    hub_cache.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path)
    with pytest.raises(rl.LabError, match="row 1 of the split test of hub:a/b: the picture is not a picture.*take the row out"):
        load_split(config("hub:a/b", tmp_path, 8), "test").__getitems__([1])
