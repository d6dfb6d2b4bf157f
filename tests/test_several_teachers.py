"""Several teachers at once: their features side by side, a projector for each, and a similarity that is the mean over them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_cli import run as command
from test_training import encoder_reads, train
from torch.nn import functional as F
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.align.aligner import Aligner
from rrepa_lab.align.projector import Projectors, stored_dims
from rrepa_lab.align.projectors.mlp import Mlp
from rrepa_lab.align.similarity import patch_cosine
from rrepa_lab.align.target import match_grid
from rrepa_lab.bench.estimate import cache_bytes, estimate
from rrepa_lab.errors import LabError
from rrepa_lab.runs.config import RunConfig, complete
from rrepa_lab.runs.describe import describe_config
from rrepa_lab.runs.run import build
from rrepa_lab.viz.layers import layer_curves, layer_map

TAP = "block.2.layer.2"
# its grid of 8x8 patches is finer than the flow's 4x4
OTHER = {"model": "vit_tiny_patch16_224", "weights": "random:3", "image_size": 8, "channels": 1}
OTHER |= {"args": {"patch_size": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}}


@pytest.fixture
def two(tiny) -> RunConfig:
    return tiny.override({"encoder": [tiny.encoder.to_dict(), OTHER], "align.blocks": [2], "train.steps": 4})


def built(config: RunConfig) -> rl.Run:
    return build(config, [str(k) for k in range(10)])


def test_the_similarity_is_the_mean_over_the_teachers(two, digits):
    run, (x, y) = built(two), digits
    x = x.float()
    found = rl.alignment(run, x, y)
    states = run.flow(x, y, taps=TAP).states[TAP]
    each = []
    for number, encoder in enumerate(run.encoders()):
        target = match_grid(encoder(x), encoder.grid, 4)
        each.append(F.cosine_similarity(run.projectors.of_teacher(number).project(TAP, states), target, dim=-1).mean().item())
    assert abs(each[0] - each[1]) > 1e-3, "a mean of two equal numbers would show nothing"
    assert found.similarity[TAP] == pytest.approx(sum(each) / 2, abs=1e-6)


def test_features_of_any_length_count_alike():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 12, generator=draw) for _ in range(2))
    found = patch_cosine(a, b, (8, 4))
    assert_close(patch_cosine(a, torch.cat([100 * b[..., :8], b[..., 8:]], dim=-1), (8, 4)), found)
    assert not torch.allclose(found, patch_cosine(a, b))


def test_one_teacher_in_a_list_is_the_teacher(tiny, tmp_path):
    plain = tiny.override({"train.steps": 4})
    listed = plain.override({"encoder": [tiny.encoder.to_dict()]})
    losses = [[report.loss for report in train(config, tmp_path / str(n))] for n, config in enumerate((plain, listed))]
    assert losses[0] == losses[1]
    tensors = [load_file(tmp_path / str(n) / "model.safetensors") for n in range(2)]
    assert tensors[0].keys() == tensors[1].keys()


def test_a_run_is_trained_resumed_and_loaded(two, tmp_path):
    reports = train(two, tmp_path / "whole")
    cut = rl.train(two, tmp_path / "cut", device="cpu")
    for report in cut:
        if report.step == 2:
            cut.close()
    rest = train(two, tmp_path / "cut", resume=True)
    assert [report.loss for report in rest] == [report.loss for report in reports[1:]]
    run = rl.load(tmp_path / "cut")
    assert run.projectors.dims == (64, 16)
    assert [teacher.weights for teacher in run.config.teachers] == ["bundled:digits", "random:3"]
    assert describe_config(run.config)["encoder"] == "vit_tiny_patch16_224, bundled:digits + vit_tiny_patch16_224, random:3"
    assert run.encoder(number=1).dim == 16
    with pytest.raises(LabError, match=r"has encoders 0\.\.1, not 2"):
        run.encoder(number=2)


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_each_teacher_keeps_a_table(two, tmp_path, monkeypatch, mode):
    monkeypatch.setenv("RREPA_CACHE", str(tmp_path / "cache"))
    config = two.override({"data.flip": True, "train.batch": 400, "train.steps": 8, "train.feature_cache": mode})
    with encoder_reads() as sizes:
        kept = train(config, tmp_path / "kept")
    assert sum(sizes) == 2 * 2 * 1437, "each view once, by each teacher"
    anew = train(config.override({"train.feature_cache": "off"}), tmp_path / "anew")
    assert_close([report.loss for report in kept], [report.loss for report in anew], atol=2e-4, rtol=0)
    if mode == "disk":  # the tables are those of a training with one of the teachers
        with encoder_reads() as sizes:
            train(config.override({"encoder": [OTHER]}), tmp_path / "one")
        assert sizes == []


def test_a_projector_is_reached_by_its_own_teacher(two, digits):
    run, x = built(two), digits[0].float()
    aligner = run.aligner()
    states = run.flow(x, None, taps=TAP).states[TAP]
    projectors = run.projectors.of_teacher(1)
    assert (projectors.dims, projectors.taps) == ((16,), [TAP])
    loss = Aligner(run.config.align, projectors).similarity(TAP, states, aligner.target(x)[..., 64:]).sum()
    grads = torch.autograd.grad(loss, list(run.projectors.parameters()), allow_unused=True)
    assert [grad is not None for grad in grads] == [False] * 6 + [True] * 6


def test_every_instrument_reads_each_teacher(two, tmp_path):
    train(two, tmp_path / "run")
    run, images = rl.load(tmp_path / "run"), rl.Images(limit=60)
    words = [f"vit_tiny_patch16_224, {weights}" for weights in ("bundled:digits", "random:3")]
    table = rl.similarity(run, taps=TAP, images=images, metrics=["cka", "teacher_cosine"])
    assert table["other"].tolist() == [words[0]] * 2 + [words[1]] * 2
    assert set(table["encoder"]) == {" + ".join(words)}
    cosines = table[table["metric"] == "teacher_cosine"].set_index("other")
    floors = rl.teacher_floors(run, images, noise_std=0.0, train=run.data("train", 60)).set_index("metric")["value"]
    assert floors["cosine_without_label"] == pytest.approx(cosines["value"].mean(), abs=1e-5)
    assert floors["floor_position"] == pytest.approx(cosines["floor"].mean(), abs=1e-5)
    alone = rl.similarity(run, run.encoder(number=1), TAP, images=images, metrics=["cka"])
    assert alone["value"].item() == pytest.approx(table[table["metric"] == "cka"]["value"].iloc[1])
    probes = rl.probe(run, TAP, probes=["knn"], limit=60).set_index("tap")["encoder"]
    assert probes.to_dict() == {
        TAP: " + ".join(words), "pixels": " + ".join(words), "encoder": words[0], "encoder.1": words[1],
    }  # fmt: skip
    assert set(rl.routing(run)["strategy"]) >= {"forward", "reverse"}
    assert rl.gradient_ratio(run, batches=1, batch=4)["value"].notna().any()


def test_charts_name_the_teachers(two, tmp_path):
    train(two, tmp_path / "run")
    run = rl.load(tmp_path / "run")
    table = rl.similarity(run, metrics=["cka"], images=rl.Images(limit=60))
    names = [f"run, vit_tiny_patch16_224, {weights}" for weights in ("bundled:digits", "random:3")]
    assert [trace.name for trace in layer_curves(table, "cka").data] == names
    figure = layer_map(table, "cka", outlined={"run": [(2, 2)]})
    assert [trace.name for trace in figure.data] == names
    assert len(figure.layout.shapes) == 2, "the aligned layer is outlined in both"
    probes = rl.probe(run, probes=["knn"], limit=60)
    levels = [trace.name for trace in layer_curves(probes, "knn_accuracy").data[1:]]
    assert levels == ["pixels", "encoder vit_tiny_patch16_224, bundled:digits", "encoder vit_tiny_patch16_224, random:3"]


def test_what_several_teachers_cost(two):
    config = complete(two.override({"train.steps": 100}))
    one, both = (estimate(config.override({"encoder": encoders}), images=1437) for encoders in ([OTHER], [*two.teachers]))
    assert one.teacher is not None
    assert both.teacher is not None
    assert both.teacher.dims == (64, 16)
    run = built(config)
    assert both.parameters == (
        sum(p.numel() for p in run.flow.parameters()), sum(p.numel() for p in run.projectors.parameters()),
    )  # fmt: skip
    assert (both.teacher.operations or 0) > (one.teacher.operations or 0) > 0
    assert cache_bytes(both)["features"] == 5 * cache_bytes(one)["features"], "64 + 16 numbers of a patch for 16"


def test_dims_are_read_from_the_tensors():
    for dims in ((7,), (7, 5, 3)):
        projectors = Projectors(["block.1.layer.1", "block.12.layer.3"], 8, 16, dims)
        shapes = {f"projectors.{name}": tuple(value.shape) for name, value in projectors.state_dict().items()}
        assert stored_dims(shapes) == dims
        assert projectors.project("block.12.layer.3", torch.zeros(2, 4, 8)).shape == (2, 4, sum(dims))
        assert isinstance(projectors.of_teacher(len(dims) - 1)["block_1_layer_1"], Mlp)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "encoder: List should have at least 1 item"),
        ([{"modl": "x"}], r"unknown setting 'encoder\.0\.modl'"),
        ([OTHER, {"image_size": 0}], r"encoder\.1\.image_size: Input should be greater"),
        (3, "encoder: Input should be a valid dictionary"),
    ],
)
def test_wrong_lists_are_named(tiny, value, message):
    with pytest.raises(LabError, match=message):
        tiny.override({"encoder": value})


def test_one_of_several_is_set_by_its_number(two):
    changed = two.override({"encoder.1.weights": "random:4"})
    assert [teacher.weights for teacher in changed.teachers] == ["bundled:digits", "random:4"]
    with pytest.raises(LabError, match=r"encoder is a list of 2: say which, encoder\.0\.weights"):
        two.override({"encoder.weights": "random:4"})
    assert RunConfig.from_dict(changed.to_dict()) == changed


def test_the_command_line_takes_several(tiny, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.to_dict()))
    words = ["train", tmp_path / "config.json", "--out", tmp_path / "run", "--device", "cpu", "--set", "train.steps=2"]
    words += ["--encoder", "bundled:digits", "--encoder", "efficientnet-lite0"]
    status, _, err = command(capsys, *words, "--set", "encoder.1.image_size=64", "--set", "encoder.1.layer=3")
    assert status == 0, err
    run = rl.load(tmp_path / "run")
    assert [teacher.model for teacher in run.config.teachers] == ["vit_tiny_patch16_224", "efficientnet-lite0"]
    assert run.projectors.dims == (64, 40), "the third stage of the CNN has 40 channels"
    status, text, _ = command(capsys, "describe", tmp_path / "run")
    assert status == 0
    assert "trained on ImageNet with its labels" in text
