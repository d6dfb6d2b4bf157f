"""Labels stand for class names: in every split, after a change of the folder, in subsets, and for a run read later."""

import pickle
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.analysis.features import image_set
from rrepa_lab.analysis.report import classification_report
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.facts import check_data
from rrepa_lab.data.images import Batch, TensorImages
from rrepa_lab.data.sets.folder import FolderImages
from rrepa_lab.data.splits import class_names, load_split
from rrepa_lab.data.subset import Subset, balanced_rows, limited, subset_words, whole
from rrepa_lab.errors import LabError
from rrepa_lab.runs.config import complete
from rrepa_lab.runs.run import build

SMALL = {
    "data.image_size": 8, "flow.image_size": 8, "flow.patch_size": 4, "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2,
    "flow.layers": 1, "train.steps": 2, "train.batch": 4, "train.num_workers": 0, "train.precision": "float32",
}  # fmt: skip
SHADES = {"ant": 10, "bee": 90, "cat": 170, "dog": 250}


def fill(folder, count=4, shade=None):
    """Pictures of the one shade that belongs to the class, so that the pixels tell what the label must be."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (9, 8), (SHADES[folder.name] if shade is None else shade,) * 3).save(folder / f"{number:02}.png")


def photos(root, train=("ant", "bee", "cat"), test=("ant", "bee", "cat"), count=4):
    for split, names in (("train", train), ("test", test)):
        for name in names:
            fill(root / split / name, count)
    return DataConfig(name="folder", path=str(root), image_size=8, channels=3)


def folder_split(data, split, classes=None) -> FolderImages:
    images = load_split(data, split, classes)
    assert isinstance(images, FolderImages)
    return images


def names_by_shade(x):
    shades = ((x.flatten(1).mean(1) + 1) * 127.5).round()
    return [min(SHADES, key=lambda name: abs(SHADES[name] - float(shade))) for shade in shades]


def agree(images):
    x, y = whole(images)
    assert torch.equal(y, images.labels)
    assert names_by_shade(x) == [images.classes[int(k)] for k in y]


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", [("bee", "cat"), ("cat",), ("ant", "cat"), ("ant", "bee")])
def test_a_split_without_some_classes_keeps_their_numbers(test, tmp_path):
    data = photos(tmp_path, test=test)
    for classes in (None, ["ant", "bee", "cat"]):
        images = folder_split(data, "test", classes)
        assert images.classes == ["ant", "bee", "cat"]
        assert images.missing == [name for name in images.classes if name not in test]
        agree(images)
    assert check_data(data).missing["test"] == images.missing


def test_labels_follow_the_list_of_the_run_in_its_order(tmp_path):
    data = photos(tmp_path)
    images = folder_split(data, "train", ["cat", "dog", "ant", "bee"])
    agree(images)
    assert sorted(images.labels.unique().tolist()) == [0, 2, 3]
    assert images.missing == ["dog"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_that_the_run_does_not_know_is_an_error(split, tmp_path):
    data = photos(tmp_path)
    (tmp_path / split / "bee").rename(tmp_path / split / "wasp")
    with pytest.raises(LabError, match=r"^the class 'wasp' in .* ant, bee, cat; the folder has ant, cat, wasp") as found:
        load_split(data, split, ["ant", "bee", "cat"])
    assert "\n" not in str(found.value)
    with pytest.raises(LabError, match="the class '(wasp|bee)' in"):
        check_data(data)  # the two splits do not have the same classes


def test_names_are_compared_as_text_and_not_as_bytes(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    fill(tmp_path / "train" / composed, shade=10)
    fill(tmp_path / "train" / "bar", shade=200)
    fill(tmp_path / "test" / apart, shade=10)
    images = folder_split(DataConfig(name="folder", path=str(tmp_path), channels=3), "test")
    assert (images.classes, images.missing) == (["bar", composed], ["bar"])
    assert images.labels.tolist() == [1] * 4


def test_class_names_that_are_numbers_are_names(tmp_path):
    for number in range(12):
        for split in ("train", "test"):
            fill(tmp_path / split / str(number), 1, shade=20 * number)
    shutil.rmtree(tmp_path / "test" / "10")
    images = load_split(DataConfig(name="folder", path=str(tmp_path), channels=3), "test")
    x, y = whole(images)
    assert [round(float(shade)) // 20 for shade in (x.flatten(1).mean(1) + 1) * 127.5] == [int(images.classes[k]) for k in y]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("labels")
    photos(root / "photos", count=5)
    settings = SMALL | {"data.path": str(root / "photos")}
    list(rl.train("imagefolder-none", root / "run", settings=settings, device="cpu"))
    return root


@pytest.mark.filterwarnings("ignore:the .* images at hand:rrepa_lab.errors.LabWarning")  # they are changed on purpose
def test_a_run_reads_its_splits_by_its_own_classes(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    run = rl.load(tmp_path / "copy" / "run")
    assert (run.classes, run.config.flow.classes) == (["ant", "bee", "cat"], 3)
    run.config = run.config.override({"data.path": str(tmp_path / "copy" / "photos")})
    shutil.rmtree(tmp_path / "copy" / "photos" / "test" / "ant")
    agree(run.images("test"))
    x, y = run.data("test", 4)
    assert names_by_shade(x) == [run.classes[int(k)] for k in y]
    shutil.rmtree(tmp_path / "copy" / "photos" / "train" / "ant")  # now the folder's own numbers would be others
    for split in ("train", "val", "test"):
        agree(run.images(split))
    table = rl.evaluate(run, samples=0)
    assert set(table.n) == {10}


def test_a_renamed_class_is_refused_at_resume(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    config = rl.load(trained / "run").config
    for split in ("train", "test"):
        (trained / "photos" / split / "ant").rename(trained / "photos" / split / "zebra")
    try:
        with pytest.raises(LabError, match=r"ant, bee, cat.*bee, cat, zebra"):
            list(rl.train(config, tmp_path / "copy" / "run", resume=True, device="cpu"))
    finally:
        for split in ("train", "test"):
            (trained / "photos" / split / "zebra").rename(trained / "photos" / split / "ant")


# --- numbers of classes and blocks that follow from the data ------------------------------------------------------------


def test_a_configuration_is_completed_from_its_folder(tmp_path, monkeypatch):
    photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    config = rl.preset("imagefolder-reverse").override({"data.path": "photos", "flow.blocks": 4, "flow.layers": 8})
    found = complete(config)
    assert (found.flow.classes, found.align.blocks, found.align.layers) == (3, [3, 4], [7])
    assert found.data.path == str(tmp_path / "photos")
    assert complete(found) == found
    assert complete(config.override({"flow.classes": 0})).flow.classes == 0  # unconditional on purpose
    assert complete(config.override({"align.blocks": [1], "align.layers": [2, -1]})).align.taps == [
        "block.1.layer.2",
        "block.1.layer.8",
    ]
    with pytest.raises(LabError, match="flow.classes is 5, but folder has 3 classes"):
        complete(config.override({"flow.classes": 5}))


@pytest.mark.parametrize(
    ("blocks", "layers", "taps"), [(8, 4, (7, 8, 3)), (4, 4, (3, 4, 3)), (2, 2, (1, 2, 1)), (1, 1, (1, 1))]
)
def test_the_last_two_blocks_are_aligned_whatever_the_size(blocks, layers, taps, tmp_path):
    config = rl.preset("imagefolder-forward").override({"flow.blocks": blocks, "flow.layers": layers})
    *places, layer = taps
    found = complete(config, ["a", "b"])
    assert found.align.taps == [f"block.{number}.layer.{layer}" for number in places]
    assert rl.preset("imagenet64-reverse").align.counted(8, 8).taps == ["block.7.layer.6", "block.8.layer.6"]


def test_a_run_is_built_with_the_classes_it_is_given():
    config = rl.preset("imagefolder-none").override(SMALL)
    assert build(config, ["a", "b", "c", "d"]).flow.config.classes == 4
    assert build(config, []).flow.config.classes == 0


# --- subsets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(50, 50, 50), (100, 1, 7), (3, 0, 40, 40), (1,), (5, 5)])
def test_every_prefix_of_a_subset_is_balanced(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    total = len(labels)
    rows = balanced_rows(labels, max(1, total - 1))
    assert len(set(rows.tolist())) == len(rows) == max(1, total - 1)
    for limit in range(1, total):
        found = balanced_rows(labels, limit)
        assert torch.equal(found, rows[:limit])
        taken = torch.bincount(labels[found], minlength=len(counts)).tolist()
        # a class is behind another only where it has no more images
        for mine, have in zip(taken, counts, strict=True):
            assert mine == have or mine >= max(taken) - 1


def test_a_subset_is_drawn_by_its_seed_alone():
    labels = torch.arange(10).repeat_interleave(30)
    assert torch.equal(balanced_rows(labels, 100), balanced_rows(labels, 100, seed=0))
    assert not torch.equal(balanced_rows(labels, 100), balanced_rows(labels, 100, seed=1))
    assert torch.equal(balanced_rows(labels, 300), torch.arange(300))
    assert torch.equal(balanced_rows(labels, 999), torch.arange(300))
    draws = [int(balanced_rows(labels, 10, seed)[labels[balanced_rows(labels, 10, seed)] == 4]) for seed in range(200)]
    assert len(set(draws)) > 25  # any of the 30 images of a class may come
    for limit in (0, -3):
        with pytest.raises(LabError, match=f"limit is {limit}"):
            balanced_rows(labels, limit)


def test_a_subset_is_a_set():
    x = torch.arange(6.0).view(6, 1, 1, 1)
    images = TensorImages(x, torch.tensor([0, 0, 0, 0, 1, 1]), ["a", "b"], 17)
    part = limited(images, 4)
    assert isinstance(part, Subset)
    assert part.labels.bincount().tolist() == [2, 2]
    batch = part.__getitems__([3, 0])
    assert torch.equal(batch.x.flatten(), part.rows[[3, 0]].float())
    assert torch.equal(batch.y, part.labels[[3, 0]])
    assert limited(images, 6) is limited(images, None) is images
    assert limited(part, 2).labels.tolist() in ([0, 1], [1, 0])
    assert len(pickle.loads(pickle.dumps(part))) == 4
    assert subset_words(4, 6) == "4 of 6, class-balanced, seed 0"
    assert subset_words(6, 6) == "all 6"


def test_every_limit_takes_all_classes(trained):
    run = rl.load(trained / "run")
    for limit in (3, 6, 9):
        share = [limit // 3] * 3
        assert run.data("test", limit).y.bincount().tolist() == share
        assert image_set(run, rl.Images(limit=limit)).labels.bincount().tolist() == share
        assert whole(load_split(run.config.data, "test"), limit).y.bincount().tolist() == share
        report = classification_report(run, images=rl.Images(limit=limit))
        assert report.per_class.n.tolist() == share
        assert set(report.summary.split) == {f"test, {limit} of 15, class-balanced, seed 0"}
        table = rl.evaluate(run, samples=0, limit=limit)
        assert set(table.n) == {limit}
        assert all(f"{limit} of 15, class-balanced, seed 0" in words for words in table.protocol)
    given = Batch(torch.zeros(40, 3, 8, 8), torch.tensor([0] * 30 + [1] * 10))
    assert image_set(run, rl.Images(data=given, limit=10)).labels.bincount().tolist() == [5, 5]


def test_the_training_watches_balanced_images(trained, monkeypatch):
    from rrepa_lab.evaluation import validation

    monkeypatch.setattr(validation, "IMAGES", 3)
    config = complete(rl.preset("imagefolder-none").override(SMALL | {"data.path": str(trained / "photos")}))
    watched = validation.Validation(config, load_split(config.data, "train"), torch.device("cpu")).batches
    assert {name: sorted(batch.y.tolist()) for name, batch in watched.items()} == {"held_out": [0, 1, 2], "train": [0, 1, 2]}


def test_labels_are_known_without_decoding(tmp_path):
    data = photos(tmp_path)
    for path in Path(tmp_path).rglob("*.png"):
        path.write_bytes(b"no picture")
    assert load_split(data, "train").labels.tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert class_names(data) == ["ant", "bee", "cat"]
    with pytest.raises(LabError, match=r"train/ant/00.png.* is not a picture"):
        load_split(data, "train").__getitems__([0])


def test_a_split_above_the_budget_of_memory_is_refused(monkeypatch):
    monkeypatch.setenv("RREPA_MEMORY_MIB", "0.2")
    train = load_split(DataConfig(), "train")  # 1,437 images of 64 float32 numbers
    with pytest.raises(LabError, match=r"1437 images take 0 MiB in memory, over the budget.*limit.*RREPA_MEMORY_MIB"):
        whole(train)
    assert len(whole(train, 100).x) == 100
