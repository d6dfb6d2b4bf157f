"""Folders are listed class by class: every limit takes all classes, where the first images would give other numbers.

Each class has one colour, so that two images of every class stand for all of them. In the held-out splits the pictures of the
last class have the colour of the first: a flow that has learnt the colours has an accuracy of 2/3 there, and of 1 on the first
images of a split.
"""

import json

import pytest
import torch
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.runs.presets import DIGITS_VIT

COLOURS = {"ant": (230, 30, 30), "bee": (30, 230, 30), "cat": (30, 30, 230)}
EACH, LIMIT = 8, 6  # images of a class, and a limit that the first class alone would fill


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> rl.Run:
    root = tmp_path_factory.mktemp("sorted")
    for split in ("train", "val", "test"):
        for name, colour in COLOURS.items():
            place = root / "photos" / split / name
            place.mkdir(parents=True)
            for number in range(EACH):
                wrong = split != "train" and name == "cat"
                Image.new("RGB", (8, 8), COLOURS["ant"] if wrong else colour).save(place / f"{number}.png")
    encoder = DIGITS_VIT.override({"weights": "random:0", "channels": 3}).to_dict()
    config = rl.preset("imagefolder-tiny-reverse").override({
        "data.path": str(root / "photos"), "data.image_size": 8, "data.flip": False, "data.cache": "off", "encoder": encoder,
        "flow.image_size": 8, "flow.patch_size": 4, "flow.width": 32, "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 1,
        "flow.noise_std": 0.3, "align.blocks": [2], "align.layers": [1], "align.projector_width": 16, "train.steps": 60,
        "train.batch": 12, "train.lr": 1e-2, "train.warmup": 5, "train.log_every": 60, "train.eval_every": 60,
        "train.save_every": 60, "train.num_workers": 0, "train.precision": "float32", "train.ema_decay": 0.9,
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rrepa_lab.evaluation.validation.IMAGES", LIMIT)
        (report,) = rl.train(config, root / "run", device="cpu")
    assert report.train_accuracy == 1
    assert report.held_out_accuracy == pytest.approx(2 / 3), "six images of the first class would say 1"
    return rl.load(root / "run")


def test_the_first_images_would_give_another_accuracy(run):
    x, y = run.data("test")
    right = (rl.classify(run, x).label == y).float()
    assert right[:LIMIT].mean() == 1
    assert right.mean() == pytest.approx(2 / 3)
    assert set(y[:LIMIT].tolist()) == {0}


def test_accuracies_with_a_limit_are_those_of_all(run, capsys):
    table = rl.evaluate(run, samples=0, limit=LIMIT).set_index("metric")["value"]
    assert table["gradient_accuracy"] == pytest.approx(2 / 3)
    assert table["bayes_accuracy"] == pytest.approx(2 / 3)
    words = ["evaluate", str(run.directory), "--limit", str(LIMIT), "--samples", "0", "--noise-samples", "1", "--json"]
    assert main(words) == 0
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["gradient_accuracy"]["value"] == pytest.approx(2 / 3)
    assert f"{LIMIT} of {3 * EACH}, class-balanced, seed 0" in rows["gradient_accuracy"]["protocol"]
    report = rl.classification_report(run, images=rl.Images(limit=LIMIT))
    assert report.per_class.set_index("class")["n"].to_dict() == dict.fromkeys(COLOURS, LIMIT // 3)
    assert report.per_class.set_index("class")["accuracy"].to_dict() == {"ant": 1, "bee": 1, "cat": 0}


def test_a_probe_with_a_limit_learns_all_classes(run):
    fit = rl.ProbeFit(neighbours=1)
    table = rl.probe(run, "block.2.layer.1", probes=["knn"], baselines=False, fit=fit, limit=LIMIT)
    assert table["value"].tolist() == pytest.approx([2 / 3])


def test_similarity_with_a_limit_is_that_of_all(run):
    def near(images: rl.Images) -> float:
        return float(rl.similarity(run, metrics=["teacher_cosine"], images=images)["value"].iloc[0])

    x, y = run.data("test")
    every, part = near(rl.Images()), near(rl.Images(limit=LIMIT))
    assert part == pytest.approx(every, abs=1e-5)
    with pytest.raises(rl.LabError, match="over 6 images are constant"):  # they are of one colour
        near(rl.Images(data=rl.Batch(x[:LIMIT], y[:LIMIT])))


def test_the_page_offers_images_of_all_classes(run, monkeypatch):
    pytest.importorskip("gradio")
    from server import runs

    monkeypatch.setattr(runs, "N_TEST_IMAGES", LIMIT)
    assert torch.bincount(runs.test_images(run).y).tolist() == [LIMIT // 3] * 3
