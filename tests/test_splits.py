"""Which pictures are train, val and test in folders of every layout, what is left out, and what is found before a training."""

import multiprocessing
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.facts import check_data
from rrepa_lab.data.loaders import stream
from rrepa_lab.data.sets.folder import FolderImages
from rrepa_lab.data.splits import class_names, load_split, split_rule, splits, validation_split
from rrepa_lab.data.subset import whole
from rrepa_lab.errors import LabError

ALL = ("train", "val", "test")
TINY = {
    "data.image_size": 8, "flow.image_size": 8, "flow.patch_size": 4, "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2,
    "flow.layers": 1, "train.steps": 4, "train.batch": 4, "train.num_workers": 0, "train.precision": "float32",
    "train.eval_every": 2,
}  # fmt: skip


def fill(folder, count, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:03}.png")


def made(root, layout):
    """Pictures from a dict of folders and counts."""
    for name, count in layout.items():
        fill(root / name, count)
    return root


def config(root, **more):
    return DataConfig(name="folder", path=str(root), image_size=8, channels=3, **more)


def folder_images(data, split):
    """A split of pictures below a folder, with their names."""
    images = load_split(data, split)
    assert isinstance(images, FolderImages)
    return images


def files(data):
    """split -> the set of absolute files."""
    found = {}
    for split in splits(data):
        images = folder_images(data, split)
        found[split] = {str(images.root / name) for name in images.files}
        assert len(found[split]) == len(images)
    return found


def disjoint(found):
    assert sum(map(len, found.values())) == len(set().union(*found.values()))


# --- where splits come from -------------------------------------------------------------------------------------------

CLASSES = {"ant": 20, "bee": 10, "cat": 40}


def below(folder, counts=CLASSES):
    return {f"{folder}/{name}": count for name, count in counts.items()}


@pytest.mark.parametrize(
    ("layout", "holdout", "counts", "rules"),
    [
        (below("train") | below("val") | below("test"), 0.0, (70, 70, 70), ("train/", "val/", "test/")),
        (
            below("train") | below("val") | below("test"),
            0.2,
            (70, 70, 70),
            ("train/", "val/ (data.holdout is not used)", "test/"),
        ),
        (below("train") | below("test"), 0.0, (70, None, 70), ("train/", None, "test/")),
        (below("train") | below("val"), 0.0, (70, None, 70), ("train/", None, "val/ (no test folder)")),
        (below("train") | below("validation"), 0.0, (70, None, 70), ("train/", None, "validation/ (no test folder)")),
        (below("train") | below("test"), 0.2, (56, 14, 70), ("80% of train/", "20% of train/", "test/")),
        (below("train") | below("valid"), 0.1, (63, 7, 70), ("90% of train/", "10% of train/", "valid/ (no test folder)")),
        (below("train"), 0.0, (56, 7, 7), ("80% of train/", "10% of train/", "10% of train/")),
        (below("train"), 0.2, (49, 14, 7), ("70% of train/", "20% of train/", "10% of train/")),
        (below("."), 0.0, (56, 7, 7), ("80% of photos/", "10% of photos/", "10% of photos/")),
        (below("Train") | below("TEST"), 0.0, (70, None, 70), ("Train/", None, "test/")),
    ],
)
def test_splits_of_every_layout(layout, holdout, counts, rules, tmp_path):
    data = config(made(tmp_path / "photos", layout), holdout=holdout)
    found = files(data)
    assert {split: len(names) for split, names in found.items()} == {
        s: n for s, n in zip(ALL, counts, strict=True) if n is not None
    }
    disjoint(found)
    facts = check_data(data)
    for split, rule in zip(ALL, rules, strict=True):
        words = split_rule(data, split)
        if rule is None:
            assert words == f"no {split}"
            with pytest.raises(LabError, match="has no `val` split: set data.holdout"):
                load_split(data, split)
        else:
            assert words == f"{split} = {rule}" + (", stratified, seed 0" if "%" in rule else "")
            assert facts.rules[split] == words
            assert sum(facts.counts[split].values()) == len(found[split])
    assert validation_split(data) == ("val" if counts[1] else "test")


def test_parts_are_stratified_and_depend_on_the_names_alone(tmp_path):
    data = config(made(tmp_path / "one", below(".")))
    facts = check_data(data)
    assert facts.counts == {
        "train": {"ant": 16, "bee": 8, "cat": 32},
        "val": {"ant": 2, "bee": 1, "cat": 4},
        "test": {"ant": 2, "bee": 1, "cat": 4},
    }  # fmt: skip
    before = {split: folder_images(data, split).files for split in ALL}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "one").rename(tmp_path / "elsewhere" / "two")
    moved = config(tmp_path / "elsewhere" / "two")
    for split in ALL:
        assert folder_images(moved, split).files == before[split]
    # not the first or last ones, and another holdout leaves the test pictures as they are
    test = folder_images(moved, "test").files
    assert test != [f"{name}/{n:03}.png" for name, count in CLASSES.items() for n in range(count // 10)]
    assert folder_images(config(tmp_path / "elsewhere" / "two", holdout=0.3), "test").files == test


@pytest.mark.parametrize("counts", [{"a": 3, "b": 3}, {"a": 1, "b": 1, "c": 1, "d": 1}, {"a": 30, "b": 1}, {"a": 2, "b": 2}])
def test_small_classes_are_divided_too(counts, tmp_path):
    data = config(made(tmp_path, counts))
    found = files(data)
    disjoint(found)
    assert set(found) == set(ALL)
    assert all(found.values())
    assert sum(map(len, found.values())) == sum(counts.values())


def test_too_few_pictures_and_too_large_a_part(tmp_path):
    with pytest.raises(LabError, match=r"has 2 pictures, too few to divide \("):
        check_data(config(made(tmp_path / "few", {"a": 1, "b": 1})))
    assert len(load_split(config(tmp_path / "few"), "train")) == 2  # they can be read all the same
    with pytest.raises(LabError, match=r"data.holdout is 0.95: with 10% for test nothing is left"):
        check_data(config(made(tmp_path / "all", {"a": 10}), holdout=0.95))


def test_digits_say_their_rules():
    data = DataConfig(holdout=0.2)
    assert split_rule(data, "test") == "test = 20% of the digits, stratified, seed 0"
    assert split_rule(data, "val") == "val = 20% of those outside test, stratified, seed 0"
    assert splits(DataConfig()) == ("train", "test")
    assert split_rule(DataConfig(), "val").startswith("no val")
    facts = check_data(data)
    assert {split: sum(counts.values()) for split, counts in facts.counts.items()} == {"train": 1149, "val": 288, "test": 360}
    assert (facts.levels, facts.classes) == (17, [str(k) for k in range(10)])


# --- odd folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints", "__MACOSX", ".git", ".DS_Store.d", "@eaDir", ".Trash-0", "$RECYCLE.BIN"]
)
@pytest.mark.parametrize("where", ["train", "test", "."])
def test_folders_of_systems_and_editors_are_no_classes(name, where, tmp_path):
    made(tmp_path, {"train/ant": 4, "train/bee": 4, "test/ant": 4, "test/bee": 4, f"{where}/{name}": 2})
    data = config(tmp_path)
    assert class_names(data) == ["ant", "bee"]
    assert {split: len(names) for split, names in files(data).items()} == {"train": 8, "test": 8}
    if where != ".":
        assert check_data(data).ignored == {f"hidden or system entries in {where}/": 1}


def test_files_that_are_no_pictures_are_ignored_and_counted(tmp_path):
    made(tmp_path, {"train/ant": 3, "train/bee": 3, "test/ant": 3, "test/bee": 3})
    for name in ("._000.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", "annotation.xml"):
        (tmp_path / "train" / "ant" / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "train" / "readme.md").write_text("mine")
    fill(tmp_path / "train", 2)
    facts = check_data(config(tmp_path))
    assert facts.counts["train"] == {"ant": 3, "bee": 3}
    assert facts.ignored == {
        "hidden or system entries in train/": 4, "files that are no pictures in train/": 3,
        "pictures outside class folders in train/": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        ({"train": 6, "test": 4}, {"train": 6, "test": 4}),
        ({"train": 10}, {"train": 8, "val": 1, "test": 1}),
        ({".": 20}, {"train": 16, "val": 2, "test": 2}),
    ],
)
def test_pictures_without_class_folders_have_no_labels(layout, counts, tmp_path):
    data = config(made(tmp_path, layout))
    facts = check_data(data)
    assert (facts.classes, facts.missing["train"]) == ([], [])
    assert facts.counts == {split: {"": count} for split, count in counts.items()}
    assert whole(load_split(data, "train")).y.tolist() == [-1] * counts["train"]
    assert whole(load_split(data, "train"), 3).y.tolist() == [-1] * 3


def test_an_unlabelled_folder_trains_an_unconditional_flow(tmp_path):
    made(tmp_path / "photos", {"train": 8, "test": 4})
    list(rl.train("imagefolder-none", tmp_path / "run", settings=TINY | {"data.path": str(tmp_path / "photos")}, device="cpu"))
    run = rl.load(tmp_path / "run")
    assert (run.step, run.classes, run.config.flow.classes) == (4, [], 0)
    assert rl.evaluate(run, samples=0).metric.tolist() == ["nats_per_dim"]
    more = TINY | {"data.path": str(tmp_path / "photos"), "flow.classes": 3}
    with pytest.raises(LabError, match="flow.classes is 3, but folder has 0 classes"):
        list(rl.train("imagefolder-none", tmp_path / "other", settings=more, device="cpu"))


def test_one_class_is_a_class(tmp_path):
    for layout in ({"only": 10}, {"train/only": 8, "test/only": 2}):
        data = config(made(tmp_path / str(len(layout)), layout))
        facts = check_data(data)
        assert facts.classes == ["only"]
        assert facts.counts["test"] == {"only": {1: 1, 2: 2}[len(layout)]}


def test_classes_may_be_called_like_splits(tmp_path):
    data = config(made(tmp_path, {"train": 10, "bus": 10, "test": 10}))
    assert check_data(data).counts["train"] == {"bus": 8, "test": 8, "train": 8}
    other = config(made(tmp_path / "photos", {"train/a": 4, "train/test": 4, "test/a": 2, "test/test": 2}))
    assert check_data(other).classes == ["a", "test"]


def test_a_path_that_names_a_split_is_divided(tmp_path):
    made(tmp_path, {"train/ant": 10, "train/bee": 10, "test/ant": 5, "test/bee": 5})
    facts = check_data(config(tmp_path / "train"))
    assert {split: sum(counts.values()) for split, counts in facts.counts.items()} == {"train": 16, "val": 2, "test": 2}
    assert facts.rules["test"] == "test = 10% of train/, stratified, seed 0"


def test_nested_and_linked_folders(tmp_path):
    made(tmp_path / "photos", {"ant/2020/june": 10, "ant/2021": 10, "bee": 10})
    (tmp_path / "photos" / "bee" / "loop").symlink_to(tmp_path / "photos" / "bee")
    made(tmp_path, {"far": 10})
    (tmp_path / "photos" / "cat").symlink_to(tmp_path / "far")
    facts = check_data(config(tmp_path / "photos"))
    assert {name: sum(facts.counts[split][name] for split in ALL) for name in facts.classes} == {
        "ant": 20,
        "bee": 10,
        "cat": 10,
    }


@pytest.mark.parametrize(
    ("layout", "empty", "message"),
    [
        ({"train/ant": 2, "test/ant": 2}, "train/bee", r"train/bee holds no pictures: fill this class folder"),
        ({"ant": 9}, "bee", r"photos/bee holds no pictures"),
        ({"train/ant": 2}, "test", r"photos/test holds no pictures"),
        ({}, "train", r"photos/train holds no pictures"),
        ({}, ".", r"photos holds no pictures"),
        ({"photos/train/a": 3}, ".", r"holds one folder, photos, with the image folder in it: set data.path="),
        ({"photos/a": 3, "photos/b": 3}, ".", r"holds one folder, photos, with the image folder in it"),
        ({"train/a": 4, "test": 4}, ".", r"photos/test holds pictures without class folders, but the classes are a"),
        ({"test/a": 4}, ".", r"has no train/: there is nothing to train on"),
        ({"train/a": 4, "test/b": 4}, ".", r"the class 'b' in .*photos/test is not one of the classes a"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line_before_the_first_step(layout, empty, message, tmp_path):
    root = made(tmp_path / "photos", layout)
    (root / empty).mkdir(parents=True, exist_ok=True)
    with pytest.raises(LabError, match=message) as found:
        check_data(config(root))
    assert "\n" not in str(found.value)
    assert str(root) in str(found.value)
    with pytest.raises(LabError):
        next(rl.train("imagefolder-none", tmp_path / "run", settings=TINY | {"data.path": str(root)}, device="cpu"))
    assert not (tmp_path / "run").exists()


def test_paths_that_are_no_folder_are_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file.png").write_bytes(b"x")
    for path, what in (("nowhere", "there is nothing"), ("file.png", "it is a file")):
        with pytest.raises(LabError, match=re.escape(f"no image folder at {tmp_path / path} ({what})")):
            load_split(config(path), "train")
    with pytest.raises(LabError, match="data.path is not set"):
        load_split(DataConfig(name="folder"), "train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    made(tmp_path, {"train/a": 3})
    (tmp_path / "train" / "a").chmod(0)
    with pytest.raises(LabError, match="cannot be read: Permission denied"):
        load_split(config(tmp_path), "train")


# --- runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_finds_its_pictures_from_any_folder(tmp_path, monkeypatch):
    made(tmp_path / "photos", {"train/a": 6, "train/b": 6, "test/a": 2, "test/b": 2})
    monkeypatch.chdir(tmp_path)
    list(rl.train("imagefolder-none", "runs/mine", settings=TINY | {"data.path": "photos"}, device="cpu"))
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    run = rl.load("../runs/mine")
    assert len(run.data("test").y) == 4
    # and the same configuration, with the path as it was given, goes on with it
    monkeypatch.chdir(tmp_path)
    again = rl.train("imagefolder-none", "runs/mine", settings=TINY | {"data.path": "photos"}, device="cpu", resume=True)
    assert list(again) == []


def test_a_held_out_folder_of_another_name_is_said_in_the_protocol(tmp_path):
    made(tmp_path / "photos", {"train/a": 6, "train/b": 6, "val/a": 2, "val/b": 2})
    list(rl.train("imagefolder-none", tmp_path / "run", settings=TINY | {"data.path": str(tmp_path / "photos")}, device="cpu"))
    run = rl.load(tmp_path / "run")
    for split, n, words in (("test", 4, "test = val/ (no test folder)"), ("val", 2, "val = 10% of train/, stratified, seed 0")):
        table = rl.evaluate(run, split, samples=0)
        assert set(table.n) == {n}
        assert all(protocol.endswith(f", {words}") for protocol in table.protocol)


def test_a_dry_run_tells_the_data(tmp_path, capsys):
    from rrepa_lab.cli import main

    made(tmp_path, {"train/ant": 8, "train/bee": 8, "train/__MACOSX": 1, "test/bee": 3})
    assert main(["train", "imagefolder-reverse", "--dry-run", "--set", f"data.path={tmp_path}", "--set", "flow.blocks=4"]) == 0
    told = capsys.readouterr().out
    for words in (
        "2: ant, bee", "14 images (train = 90% of train/", "3 images (test = test/); none of ant",
        "1 hidden or system entries in train/",
        "block.3.layer.3",
    ):  # fmt: skip
        assert words in told


def test_validation_never_reads_training_or_test_pictures(tmp_path):
    from rrepa_lab.evaluation.validation import Validation
    from rrepa_lab.runs.config import complete

    made(tmp_path, {"a": 20})
    fill(tmp_path / "b", 20, first=100)  # the red channel is a number of its own for each picture
    settings = complete(rl.preset("imagefolder-none").override(TINY | {"data.path": str(tmp_path)}))
    watched = Validation(settings, load_split(settings.data, "train"), torch.device("cpu")).batches
    shades = {name: set(batch.x[:, 0, 0, 0].tolist()) for name, batch in watched.items()}
    assert not shades["held_out"] & shades["train"]
    test = set(whole(load_split(settings.data, "test")).x[:, 0, 0, 0].tolist())
    assert not test & (shades["held_out"] | shades["train"])


# --- worker processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{"train/a": 5, "test/a": 3}, {"a": 10}, {".": 10}])
def test_every_split_pickles(layout, tmp_path):
    data = config(made(tmp_path, layout))
    for split in splits(data):
        images = load_split(data, split)
        again = pickle.loads(pickle.dumps(images))
        for mine, other in zip(whole(again), whole(images), strict=True):
            assert torch.equal(mine, other)


def read_in(images, rows, answers):
    answers.put(images.__getitems__(rows).x.mean(dim=(1, 2, 3)).tolist())


def test_a_spawned_process_reads_the_same(tmp_path, monkeypatch):
    made(tmp_path / "photos", {"train/a": 3, "test/a": 1})
    monkeypatch.chdir(tmp_path)
    images = load_split(config("photos"), "train")
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    monkeypatch.chdir("/")
    process = context.Process(target=read_in, args=(images, [1, 0], answers))
    process.start()
    assert answers.get(timeout=60) == images.__getitems__([1, 0]).x.mean(dim=(1, 2, 3)).tolist()
    process.join()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_is_one_line_with_and_without_workers(workers, tmp_path):
    made(tmp_path, {"train/a": 4, "test/a": 1})
    (tmp_path / "train" / "a" / "002.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    images = load_split(config(tmp_path), "train")
    with pytest.raises(LabError, match=r"train/a/002.png: 002.png is .*; mend .*data describe .* --decode") as found:
        list(stream(images, [[0, 1], [2, 3]], workers))
    assert "\n" not in str(found.value)
