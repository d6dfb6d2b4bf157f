"""Presets: each is a whole configuration, and those of the paper have the paper's values."""

import json

import pytest
import torch

import rrepa_lab as rl
from rrepa_lab.bench.estimate import QUICK
from rrepa_lab.bench.flops import step_work
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.presets import ALIGNED, FAMILIES, names, reported_and_measured
from rrepa_lab.space.config import SPACES

# of the paper, arXiv 2511.22345 (imagenet128: TARFlow, arXiv 2412.06329): setting -> value
COMMON: dict[str, object] = {
    "data.teacher_size": 256,
    "data.flip": True, "flow.width": 1024, "flow.blocks": 8, "flow.layers": 8, "flow.head_width": 64, "flow.mlp_ratio": 4.0,
    "flow.classes": 1000, "align.weight": 0.1, "align.refinements": 0, "align.projector_width": 1024, "train.batch": 256,
    "train.lr": 1e-4, "train.betas": [0.9, 0.95], "train.weight_decay": 1e-4, "train.ema_decay": 0.9999,
    "train.label_drop": 0.1, "train.steps": 400_000,
}  # fmt: skip
PAPER: dict[str, dict[str, object]] = {
    "imagenet64": {"data.image_size": 64, "flow.patch_size": 4, "flow.noise_std": 0.05, "flow.positions": "learned",
                   "flow.mlp": "gelu", "space.kind": "pixels"},
    "imagenet128": {"data.image_size": 128, "flow.patch_size": 4, "flow.noise_std": 0.15, "space.kind": "pixels"},
    "imagenet256-latent": {"data.image_size": 256, "flow.image_size": 32, "flow.channels": 4, "flow.patch_size": 2},
    "imagenet256-latent-p1": {"data.image_size": 256, "flow.image_size": 32, "flow.channels": 4, "flow.patch_size": 1},
}  # fmt: skip
LATENT: dict[str, object] = {
    "flow.noise_std": 0.2, "flow.positions": "rotary", "flow.mlp": "swiglu", "space.kind": "vae",
    "space.weights": "stabilityai/sd-vae-ft-ema",
}  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_a_preset_is_a_whole_configuration(name):
    config = rl.preset(name)
    family, _, strategy = name.rpartition("-")
    assert (config.name, config.align.strategy) == (name, strategy)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    counted = config.align.counted(config.flow.blocks, config.flow.layers)
    taps = counted.taps
    assert bool(taps) == (strategy != "none")
    with torch.device("meta"):
        flow = rl.TarFlow(config.flow.model_copy(update={"classes": max(0, config.flow.classes)}))
    assert [tap.name for tap in flow.resolve(taps)] == taps
    shape = SPACES[config.space.kind].shape(config.space, config.frame.picture)
    assert shape in (None, config.flow.image_shape)
    assert FAMILIES[family].about


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in PAPER])
def test_the_paper_s_settings(family):
    for strategy in ALIGNED:
        config = rl.preset(f"{family}-{strategy}")
        expected = COMMON | PAPER[family] | (LATENT if "latent" in family else {})
        found = config.flat()
        assert {key: found[key] for key in expected} == expected
        assert config.data.name == "imagenet"
        assert [teacher.model for teacher in config.teachers] == ["dinov2-b"]
    aligned = rl.preset(f"{family}-reverse")
    assert aligned.align.counted(8, 8).taps == ["block.7.layer.6", "block.8.layer.6"]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.endswith("-tiny")])
def test_a_tiny_preset_takes_minutes_on_two_cores(family):
    config = rl.preset(f"{family}-reverse")
    work = step_work(config.flow, config.align.counted(config.flow.blocks, config.flow.layers), (112,))
    step = work.total * config.train.batch
    assert step < QUICK
    assert step * config.train.steps / 2e10 < 10 * 60, "at 20 GFLOP/s"


def test_results_are_structured():
    paper = reported_and_measured("imagenet64-reverse")
    assert paper["measured"] is None
    assert {row["metric"]: row["value"] for row in paper["reported"]} == {
        "fid": 11.71, "sfid": 33.68, "inception_score": 44.31, "accuracy": 0.5735,
    }  # fmt: skip
    assert {row["source"] for row in paper["reported"]} == {"arXiv 2511.22345"}
    bundled = reported_and_measured("digits-reverse")
    scores = {row["metric"]: row for row in bundled["measured"]}
    assert scores["gradient_accuracy"]["value"] == pytest.approx(0.9306, abs=1e-4)
    assert scores["gradient_accuracy"]["seed"] == 0
    for name in names():
        for row in reported_and_measured(name)["measured"] or []:
            assert row["source"].startswith("rrepa-lab ")
            assert row["seed"] is not None
    with pytest.raises(LabError, match="unknown preset"):
        reported_and_measured("imagenet64-backwards")


def test_describe_shows_them(capsys):
    assert main(["describe", "imagenet64-reverse", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["measured"] is None
    assert facts["reported"][0]["value"] == 11.71
    assert main(["describe", "imagenet64-reverse"]) == 0
    text = capsys.readouterr().out
    assert "fid 11.71 (as here; FID on 4,096 samples, 400K iterations; arXiv 2511.22345)" in text
    assert "measured   " in text
    assert "not measured yet" in text
