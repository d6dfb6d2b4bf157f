"""A stranger's test: a data set, a teacher and a strategy of one's own, each in one short file, and no other is touched."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from conftest import PLAIN

import rrepa_lab as rl
from rrepa_lab.align.strategy import STRATEGIES
from rrepa_lab.align.teacher import TEACHERS, EncoderConfig
from rrepa_lab.data.config import DATA_SETS
from rrepa_lab.data.facts import describe_data

FILES = ("rings", "edges", "last_block")


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The three files are imported for these tests only: other tests list what is registered."""
    for name in FILES:
        import_module(f"extend.{name}")
    yield
    del DATA_SETS._values["rings"], TEACHERS._values["edges"], STRATEGIES._values["last-block"]
    for name in FILES:
        del sys.modules[f"extend.{name}"]


@pytest.fixture(scope="module")
def run(registered: None, tmp_path_factory: pytest.TempPathFactory) -> rl.Run:
    config = rl.preset("digits-reverse").override(
        PLAIN
        | {
            "name": "own", "data.name": "rings", "data.holdout": 0, "data.shift": 0, "flow.classes": -1, "flow.width": 32,
            "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 2, "encoder": EncoderConfig(model="edges").to_dict(),
            "align.strategy": "last-block", "align.blocks": [2], "align.layers": [1], "align.projector_width": 16,
            "train.steps": 60, "train.batch": 32, "train.warmup": 5, "train.log_every": 20, "train.eval_every": 60,
            "train.keep": "last",
        }
    )  # fmt: skip
    out = tmp_path_factory.mktemp("own") / "run"
    reports = list(rl.train(config, out, device="cpu"))
    assert reports[-1].loss < reports[0].loss
    assert reports[-1].similarity["block.2.layer.1"] > reports[0].similarity["block.2.layer.1"]
    assert reports[-1].held_out_accuracy is not None
    return rl.load(out)


@pytest.mark.parametrize("name", FILES)
def test_each_is_one_short_file(name):
    lines = (Path(__file__).parent / "extend" / f"{name}.py").read_text("utf-8").splitlines()
    assert len(lines) < 40


def test_the_data_set_is_described_and_read(run):
    facts = describe_data(run.config.data)
    assert facts["classes"] == "2: small, large"
    assert facts["test"] == "48 images (test = 48 rings, seed 4)"
    assert run.classes == ["small", "large"]
    assert run.data("test", 10).y.tolist().count(0) == 5, "a limit is class-balanced here too"


def test_the_instruments_take_the_run(run):
    assert rl.classify(run, run.data("test").x).label.shape == (48,)
    assert rl.sample(run, [1, 2], ["small", "large"]).images.shape == (2, 1, 8, 8)
    table = rl.probe(run, "block.2.layer.1", limit=40)
    assert {"pixels", "encoder", "block.2.layer.1"} == set(table["tap"])
    assert rl.similarity(run, taps="block.2.layer.1")["metric"].tolist()[-1] == "teacher_cosine"
    assert rl.evaluate(run, samples=0, limit=20)["metric"].tolist() == ["nats_per_dim", "gradient_accuracy", "bayes_accuracy"]


def test_the_strategy_reaches_what_it_says(run):
    table = rl.routing(run, ["last-block", "forward"], "block.2.layer.1", images=4)
    blocks = {name: set(rows.loc[rows["gradient_norm"] > 0, "block"]) for name, rows in table.groupby("strategy")}
    assert blocks == {"last-block": {0, 2}, "forward": {0, 1, 2}}


def test_names_that_nobody_registered_are_refused_with_the_nearest(run):
    with pytest.raises(rl.LabError, match=r"data\.name: unknown data set 'ring'; did you mean 'rings'"):
        run.config.override({"data.name": "ring"})
    with pytest.raises(rl.LabError, match=r"unknown strategy 'last_block'; did you mean 'last-block'"):
        run.config.override({"align.strategy": "last_block"})
    with pytest.raises(rl.LabError, match="unknown timm model 'edge'"):
        rl.Run(run.flow, run.config.override({"encoder.model": "edge"}), run.classes, run.projectors).encoder()


def test_a_name_is_registered_once():
    with pytest.raises(rl.LabError, match="there is a data set 'rings' already"):
        DATA_SETS.register("rings")(type(DATA_SETS["rings"])())
