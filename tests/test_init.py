"""A training that begins with the weights of another run."""

import json

import pytest
import torch
from test_labels import SMALL, photos
from test_published import STEM, make_state
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.runs.init import class_rows, imagenet_classes, start_from, weights_fingerprint
from rrepa_lab.runs.run import build

STILL = {"train.steps": 1, "train.lr": 1e-12, "train.weight_decay": 0.0}  # a step that moves nothing


def run_of(classes, settings=None):
    """An unaligned run of these classes away from its zero start."""
    config = rl.preset("imagefolder-none").override(SMALL | {"flow.classes": -1} | (settings or {}))
    run = build(config, list(classes))
    perturb(run.flow, 0, std=0.1)
    run.flow.requires_grad_(False)
    return run


def _name(run):
    """Of the run that it began with."""
    return run.config.init.name


@pytest.fixture
def x():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_run_begins_where_the_other_ended(trained, tiny, tmp_path, capsys):
    before = (trained / "model.safetensors").read_bytes()
    source = rl.load(trained)
    config = source.config.override(STILL | {"name": "next"})
    reports = list(rl.train(config, tmp_path / "next", init=trained, device="cpu"))
    run = rl.load(tmp_path / "next")
    x, y = run.data("test", 20)
    assert_close(run.flow.log_prob(x, y), source.flow.log_prob(x, y), atol=1e-3, rtol=1e-5)
    fresh = build(config, source.classes)
    assert not torch.allclose(fresh.flow.log_prob(x, y), source.flow.log_prob(x, y), atol=1e-1)
    init = run.config.init
    assert init is not None
    assert run.directory is not None
    assert (init.name, init.step, init.weights) == ("trained", 4, weights_fingerprint(source))
    assert (init.classes, init.projectors) == ("10 by name", ["block.2.layer.2"])
    assert_close(dict(run.weights()), dict(source.weights()), atol=1e-6, rtol=0)
    card = (run.directory / "card.md").read_text()
    assert f"Began with the weights of trained at step 4 (fingerprint {init.weights}) and a fresh optimizer." in card
    assert reports[-1].step == 1
    assert (trained / "model.safetensors").read_bytes() == before
    assert main(["describe", str(run.directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["began with"].startswith("trained at step 4")


def test_what_it_began_with_is_kept_by_a_resume_and_not_by_another_run(trained, tmp_path):
    config = rl.load(trained).config.override({"train.steps": 4, "train.save_every": 1})
    out = tmp_path / "run"
    list(rl.train(config, out, init=trained, resume="auto", device="cpu", stop=lambda: True))
    assert _name(rl.load(out)) == "trained"
    # the same call again, as a scheduler starts it, and then a plain resume
    list(rl.train(config, out, init=trained, resume="auto", device="cpu", stop=lambda: True))
    assert list(rl.train(config, out, resume=True, device="cpu"))
    run = rl.load(out)
    assert (run.step, _name(run)) == (4, "trained")
    list(rl.train(out / "config.json", tmp_path / "fresh", settings={"train.steps": 1}, device="cpu"))
    assert rl.load(tmp_path / "fresh").config.init is None
    with pytest.raises(LabError, match="init begins a new run and resume goes on with one"):
        list(rl.train(config, out, init=trained, resume=True, device="cpu"))
    # at once and after a resume the same numbers
    list(rl.train(config, tmp_path / "whole", init=trained, device="cpu"))
    assert_close(dict(rl.load(tmp_path / "whole").weights()), dict(run.weights()), atol=0, rtol=0)


def test_an_imported_checkpoint_is_aligned(tmp_path, capsys):
    names = ("ant", "bee", "cat", "dog")
    photos(tmp_path / "photos", train=names, test=names)
    torch.save(make_state(classes=4), tmp_path / f"{STEM}.pth")
    assert main(["import-tarflow", str(tmp_path / f"{STEM}.pth"), str(tmp_path / "flowers")]) == 0
    sizes = ["width=128", "blocks=3", "layers=2", "patch_size=4", "image_size=16", "noise_std=0.05"]
    settings = [f"flow.{size}" for size in sizes] + [
        "data.image_size=16", f"data.path={tmp_path / 'photos'}", "train.steps=2", "train.batch=4", "train.num_workers=0",
        "align.projector_width=8", "train.precision=float32", "encoder.image_size=32", "encoder.weights=random",
        "encoder.model=test_vit.r160_in1k",
    ]  # fmt: skip
    words = ["train", "imagefolder-reverse", "--init", str(tmp_path / "flowers"), "--out", str(tmp_path / "aligned")]
    status = main([*words, "--device", "cpu", *(part for value in settings for part in ("--set", value))])
    error = capsys.readouterr().err
    assert status == 0, error
    assert "the classes of flowers are numbers: they are taken as ant, bee, cat, dog, in this order" in error
    run, source = rl.load(tmp_path / "aligned"), rl.load(tmp_path / "flowers")
    assert run.config.align.strategy == "reverse"
    assert run.config.origin == ""
    assert run.config.init is not None
    assert run.config.init.origin == source.config.origin != ""
    assert "Those were imported: " in (tmp_path / "aligned" / "card.md").read_text()
    wrong = [*words[:-1], str(tmp_path / "wrong"), *(part for value in settings for part in ("--set", value))]
    assert main([*wrong, "--set", "flow.width=64"]) == 2
    error = capsys.readouterr().err
    assert "cannot begin with the weights of flowers: flow.width is 128 there and 64 here; add --set flow.width=128" in error
    assert not (tmp_path / "wrong").exists()


def test_classes_go_by_name(x):
    source = run_of(["ant", "bee", "cat"])
    run = run_of(["cat", "dog", "ant"])
    start_from(run, source)
    assert run.config.init.classes == "2 by name, 1 new, 1 left out"
    for name in ("cat", "ant"):
        here, there = (torch.full((4,), one.classes.index(name)) for one in (run, source))
        assert_close(run.flow.log_prob(x, here), source.flow.log_prob(x, there))
    # a class that is new begins as no label
    assert_close(run.flow.log_prob(x, torch.full((4,), 1)), source.flow.log_prob(x))
    with pytest.raises(
        LabError, match=r"no class of imagefolder-none is a class of the data \(ant, bee.* there, cow, dog here\)"
    ) as caught:
        start_from(run_of(["cow", "dog"]), source)
    assert "\n" not in str(caught.value)


def test_with_and_without_classes(x):
    labelled, plain = run_of(["ant", "bee"]), run_of([], {"flow.classes": 0})
    start_from(plain, labelled)
    assert_close(plain.flow.log_prob(x), labelled.flow.log_prob(x))
    other = run_of([], {"flow.classes": 0})
    perturb(other.flow, 5, std=0.1)
    start_from(labelled, other)
    for label in (0, 1):
        assert_close(labelled.flow.log_prob(x, torch.full((4,), label)), other.flow.log_prob(x))


def test_names_of_imagenet_and_its_ids_are_the_same_classes():
    by_id = imagenet_classes()
    ids, names = list(by_id), list(by_id.values())
    assert len(set(names)) == len(ids) == 1000
    assert class_rows(names, ids) == class_rows(ids, names) == list(range(1000))
    assert class_rows(names, ["n02123045", "n01443537", "zebrafish"]) == [281, 1, None]
    # as data/sets/imagenet.py names them
    assert class_rows(names, ["tench", "crane (n02012849)", "n01443537"]) == [0, 134, 1]
    assert class_rows(["tench", "zebra"], ids)[:2] == [0, None]
    assert class_rows(["tench", "zebra"], names)[340] == 1
    with pytest.raises(LabError, match="3 numbered classes, and the data have 2"):
        class_rows(["0", "1", "2"], ["ant", "bee"], numbered=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("flow.patch_size", 2), ("flow.width", 32), ("flow.blocks", 3), ("flow.layers", 2), ("flow.layers", [1, 2]),
        ("flow.head_width", 8), ("flow.mlp", "swiglu"), ("flow.mlp_ratio", 2.0), ("flow.positions", "rotary"),
        ("flow.volume_preserving", True), ("flow.image_size", 16), ("flow.channels", 1),
    ],
)  # fmt: skip
def test_another_geometry_is_one_line(key, value, tmp_path):
    source = run_of(["ant", "bee"])
    both = {key: value} | ({f"data.{key.split('.')[1]}": value} if key in ("flow.image_size", "flow.channels") else {})
    config = source.config.override(both | {"data.path": str(tmp_path)})
    with pytest.raises(LabError) as caught:
        start_from(build(config, ["ant", "bee"]), source)
    old = source.config.flat()[key]
    assert str(caught.value).endswith(f"{key} is {old} there and {value} here; add --set {key}={old}")


def test_an_equal_list_of_depths_is_that_number():
    source = run_of(["ant", "bee"])
    run = run_of(["ant", "bee"], {"flow.layers": [1, 1]})
    start_from(run, source)
    assert run.config.init.classes == "2 by name"


def test_projectors_of_another_teacher_are_not_taken(trained):
    source = rl.load(trained)
    config = source.config.override({"encoder.weights": "random:3"})
    run = build(config, source.classes)
    start_from(run, source)
    assert run.config.init is not None
    assert run.config.init.projectors == []
