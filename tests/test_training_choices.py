"""What a training chooses and measures: the prior of a volume-preserving flow, names, precision, device, kept weights."""

import json
import os
from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.data.augment import shifted
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.splits import load_split
from rrepa_lab.data.streams import RowStreams
from rrepa_lab.data.subset import whole
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.correct import correct
from rrepa_lab.evaluation.validation import Validation
from rrepa_lab.flow.finite import NotFiniteError
from rrepa_lab.runs.records import Records
from rrepa_lab.training import precision
from rrepa_lab.training.loop import train_run
from rrepa_lab.training.processes import accelerator_on
from rrepa_lab.training.state import Checkpoint


def train(config, out, **more):
    return list(rl.train(config, out, device="cpu", **more))


# --- volume-preserving flows ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def volume_preserving(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "volume-preserving"
    config = rl.preset("digits-none").override({
        "flow.volume_preserving": True, "flow.width": 32, "flow.head_width": 32, "flow.blocks": 2, "flow.layers": 2,
        "train.steps": 150, "train.batch": 64, "train.ema_decay": 0.9,
    })  # fmt: skip
    reports = train(config, out)
    return out, reports


def test_the_prior_of_a_volume_preserving_flow_is_estimated(volume_preserving):
    """Its likelihood is within 5 % of what the maximum-likelihood variance of the same z gives, and far from variance 1."""
    run = rl.load(volume_preserving[0])
    x, y = run.data("train")
    noised = x + run.flow.config.noise_std * torch.randn(x.shape, generator=generator(0, 7))
    dims = run.flow.config.dims
    with torch.no_grad():
        z, variance = run.flow(noised, y).z, run.flow.prior_var
        assert variance is not None
        kept = -float(run.flow.log_prob(noised, y).mean()) / dims
        variance.copy_(z.square().mean(dim=0))
        best = -float(run.flow.log_prob(noised, y).mean()) / dims
        variance.fill_(1.0)
        fixed = -float(run.flow.log_prob(noised, y).mean()) / dims
    assert kept <= best + 0.05 * abs(best), (kept, best)
    assert fixed > kept + 0.2, "with variance 1 the likelihood is far off"


def test_the_estimated_prior_is_saved_and_used(volume_preserving):
    out, reports = volume_preserving
    run = rl.load(out)
    assert run.flow.prior_var is not None
    assert run.flow.prior_var.max() < 1.0
    state = Checkpoint.load(out / "train_state.pt")
    assert_close(run.flow.prior_var, state.average["module.flow.prior_var"])
    from rrepa_lab.sampling.sample import noise

    spread = noise(run.flow, range(400)).square().mean(dim=0)
    assert_close(spread, run.flow.prior_var, rtol=0.5, atol=0)
    assert reports[-1].held_out_nats_per_dim < reports[0].nats_per_dim


def test_a_scaling_flow_keeps_a_standard_normal_prior(tiny, tmp_path):
    train(tiny.override({"train.steps": 2}), tmp_path / "run")
    assert rl.load(tmp_path / "run").flow.prior_var is None


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["forward", "detach", "reverse"])
def test_similarities_keep_their_names_whatever_the_order_of_blocks_and_layers(tmp_path, strategy):
    config = rl.preset(f"digits-{strategy}").override({
        "flow.width": 16, "flow.head_width": 16, "flow.blocks": 3, "flow.layers": 2, "align.projector_width": 8,
        "train.steps": 3, "train.batch": 16, "train.log_every": 1, "align.blocks": [1, 3], "align.layers": [1, 2],
    })  # fmt: skip
    straight = train(config, tmp_path / "straight")
    turned = train(config.override({"align.blocks": [3, 1], "align.layers": [2, 1]}), tmp_path / "turned")
    # projectors are drawn in the order of the taps, so that only sets of names can be compared between the two
    for report in (*straight, *turned):
        assert set(report.similarity) == {f"block.{t}.layer.{layer}" for t in (1, 3) for layer in (1, 2)}
    run = rl.load(tmp_path / "turned")
    x, y = run.data("train")
    near = rl.alignment(run, x[:256], y[:256]).similarity
    table = Records(tmp_path / "turned").table()
    assert set(table.columns[table.columns.str.startswith("similarity.")]) == {f"similarity.{name}" for name in near}


def test_a_recorded_similarity_is_that_of_its_tap(tmp_path):
    """With a frozen optimizer the recorded values are those of `rl.alignment`, tap by tap."""
    config = rl.preset("digits-reverse").override({
        "flow.width": 16, "flow.head_width": 16, "flow.blocks": 3, "flow.layers": 1, "align.projector_width": 8,
        "align.blocks": [3, 1], "align.layers": [1], "train.steps": 1, "train.batch": 2000, "train.lr": 1e-12,
        "train.weight_decay": 0.0, "train.label_drop": 0.0, "flow.noise_std": 0.0, "data.shift": 0, "data.holdout": 0.0,
    })  # fmt: skip
    (report,) = train(config, tmp_path / "run")
    run = rl.load(tmp_path / "run")
    near = rl.alignment(run, *run.data("train")).similarity
    assert abs(near["block.1.layer.1"] - near["block.3.layer.1"]) > 1e-3, "the taps can be told apart"
    assert report.similarity == pytest.approx(near, abs=1e-4)


# --- precision and device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "chosen"), [(0.04, "float32"), (1.1, "float32"), (2.0, "bfloat16")])
def test_automatic_precision_takes_the_faster_one(monkeypatch, gain, chosen):
    monkeypatch.setattr(precision, "bfloat16_gain", lambda *_: gain)
    assert precision.resolve_precision("auto", torch.device("cpu"), 64, 64) == chosen
    assert precision.resolve_precision("float32", torch.device("cpu"), 64, 64) == "float32"
    assert precision.resolve_precision("bfloat16", torch.device("cpu"), 64, 64) == "bfloat16"


def test_the_precision_is_measured_quickly_and_kept_with_the_run(tiny, tmp_path, monkeypatch):
    assert precision.bfloat16_gain("cpu", 256 * 256, 1024) > 0
    monkeypatch.setattr(precision, "bfloat16_gain", lambda *_: 9.0)
    tiny = tiny.override({"train.precision": "auto"})
    reports = rl.train(tiny, tmp_path / "run", device="cpu")
    next(reports)
    reports.close()
    monkeypatch.setattr(precision, "bfloat16_gain", lambda *_: 0.1)
    assert train(tiny, tmp_path / "run", resume=True)[-1].step == 12
    assert Checkpoint.load(tmp_path / "run" / "train_state.pt").precision == "bfloat16", (
        "a resumed run keeps what it began with"
    )
    assert "bfloat16" in (tmp_path / "run" / "card.md").read_text()


def test_every_preset_measures_its_precision():
    from rrepa_lab.runs.presets import names

    assert {rl.preset(name).train.precision for name in names()} == {"auto"}


def test_the_accelerator_is_on_the_device_that_is_named(monkeypatch):
    for name in ("meta", "cpu", "meta", "cpu"):
        accelerator = accelerator_on(torch.device(name))
        assert accelerator.device == torch.device(name)
        assert "ACCELERATE_TORCH_DEVICE" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LabError, match=r"device cuda:1 with 2 processes"):
        accelerator_on(torch.device("cuda:1"))


@pytest.mark.parametrize(("batch", "processes"), [(1, 2), (3, 4)])
def test_a_batch_smaller_than_the_processes_is_refused_before_the_work(tiny, tmp_path, monkeypatch, batch, processes):
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    with pytest.raises(LabError, match=rf"train.batch {batch} cannot be shared among {processes} processes"):
        train(tiny.override({"train.batch": batch}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- validation, kept weights, early stopping --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"train.eval_every": 6, "train.log_every": 4, "train.save_every": 7}, [7, 12]),
        ({"train.eval_every": 4, "train.log_every": 3, "train.save_every": 5}, [5, 9, 12]),
        ({"train.eval_every": 5, "train.log_every": 1, "train.save_every": 1}, [5, 10, 12]),
        ({"train.eval_every": 3, "train.log_every": 7, "train.save_every": 100}, [7, 12]),
    ],
)
def test_a_validation_happens_once_for_each_multiple(tiny, tmp_path, settings, steps):
    reports = train(tiny.override(settings), tmp_path / "run")
    assert [report.step for report in reports if report.held_out_nats_per_dim is not None] == steps


def test_training_and_validation_images_are_measured_alike(tiny, tmp_path):
    config = tiny.override({"data.holdout": 0.2, "align.strategy": "none"})
    report = train(config, tmp_path / "run")[-1]
    for name in ("held_out", "train"):
        assert getattr(report, f"{name}_nats_per_dim") > 0
        assert 0 <= getattr(report, f"{name}_accuracy") <= 1
    assert report.held_out_nats_per_dim != report.train_nats_per_dim


def random_pictures(folder, counts):
    """Grey pictures of random numbers in two classes: what is learned of some says nothing about the others."""
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


def test_the_best_weights_are_kept_beside_the_last(tiny, tmp_path):
    """Eight pictures learned by heart: the best weights are of an early step, and `load` gives them."""
    pictures = random_pictures(tmp_path / "pictures", {"train": 4, "val": 16, "test": 2})
    config = tiny.override({
        "data.name": "folder", "data.path": str(pictures), "flow.classes": 2, "flow.noise_std": 0.01, "align.strategy": "none",
        "train.keep": "nats_per_dim", "train.eval_every": 10, "train.log_every": 10, "train.steps": 40, "train.lr": 1e-2,
        "train.min_lr_ratio": 1.0, "train.ema_decay": 0.0, "train.batch": 8,
    })  # fmt: skip
    reports = train(config, tmp_path / "run")
    values = {r.step: r.held_out_nats_per_dim for r in reports if r.held_out_nats_per_dim is not None}
    best = min(values, key=values.__getitem__)
    assert best < 40
    assert values[40] > values[best] + 1
    run = rl.load(tmp_path / "run")
    assert run.step == best
    assert rl.load(tmp_path / "run", checkpoint="last").step == 40
    measured = Validation(config, load_split(config.data, "train"), torch.device("cpu"))(run)
    assert measured["held_out_nats_per_dim"] == pytest.approx(values[best], abs=1e-5)
    assert f"step {best}" in (tmp_path / "run" / "card.md").read_text()
    with pytest.raises(LabError, match="unknown checkpoint 'first'"):
        rl.load(tmp_path / "run", checkpoint="first")


def test_weights_that_have_diverged_are_validated(tiny, tmp_path):
    """Scores that overflow count as wrong, of some images or of all; where that is not wanted they are an error."""
    train(tiny, tmp_path / "run")
    run = rl.load(tmp_path / "run")
    x, y = run.data("test", 40)
    assert correct(run, x, y).any()
    bias, bad = run.flow.block(2).proj_out.bias, list[int]()
    for alpha in torch.arange(-40, -46, -0.1):  # of the last block: z^2 overflows for some images, then for all
        bias[: run.flow.config.token_size] = alpha
        try:
            correct(run, x, y)
        except NotFiniteError as error:
            bad = error.rows
            break
    assert 0 < len(bad) < len(x)
    fine = [row for row in range(len(x)) if row not in bad]
    found = correct(run, x, y, overflows=True)
    assert not found[bad].any()
    assert torch.equal(found[fine], correct(run, x[fine], y[fine]))
    measured = Validation(run.config, load_split(run.config.data, "train"), torch.device("cpu"))(run)
    assert 0 <= measured["held_out_accuracy"] <= 1
    bias.fill_(torch.nan)
    measured = Validation(run.config, load_split(run.config.data, "train"), torch.device("cpu"))(run)
    assert measured["held_out_accuracy"] == 0


@pytest.mark.parametrize(("metric", "values"), [("nats_per_dim", [nan, 3.0, nan, 4.0]), ("accuracy", [nan, 0.3, nan, 0.2])])
def test_a_value_that_is_no_number_is_worse_than_any(tiny, tmp_path, metric, values):
    given = iter(values)

    def validator(*_):
        return lambda run: {"held_out_nats_per_dim": 1.0, f"held_out_{metric}": next(given)}

    config = tiny.override({"train.keep": metric, "train.eval_every": 3, "train.log_every": 3, "train.steps": 12})
    list(train_run(config, tmp_path / "run", validator, device="cpu"))
    assert rl.load(tmp_path / "run").step == 6


def test_a_training_ends_when_nothing_gets_better(tiny, tmp_path):
    config = tiny.override({
        "train.keep": "accuracy", "train.patience": 2, "data.holdout": 0.2, "train.eval_every": 2, "train.steps": 400,
        "train.lr": 1e-60, "align.strategy": "none",  # rounds to no change at all
    })  # fmt: skip
    reports = train(config, tmp_path / "run")
    assert reports[-1].step == 6, "the first validation is the best, and two more are no better"
    assert rl.load(tmp_path / "run").step == 2
    assert train(config, tmp_path / "run", resume=True) == [], "an ended training is finished"


def test_random_shifts_move_whole_images_onto_background():
    x, _ = whole(load_split(DataConfig(), "test"))
    moved = shifted(x, 1, 1.0, RowStreams((0, 1), range(len(x))))
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)
    candidates = torch.stack([padded[:, :, r : 8 + r, c : 8 + c] for r in range(3) for c in range(3)])
    same = (candidates == moved).flatten(2).all(dim=2)
    assert same.any(dim=0).all()
    parts = same.double().mean(dim=1)
    assert parts.min() > 0.05, "every direction occurs"
    assert torch.equal(shifted(x, 1, 0.0, RowStreams((0, 1), range(len(x)))), x)
    half = (shifted(x, 2, 0.5, RowStreams((0, 2), range(len(x)))) == x).flatten(1).all(dim=1).double().mean()
    assert 0.4 < half < 0.65


def test_shifted_images_are_what_the_teacher_reads(tiny, tmp_path):
    assert not tiny.data.augments
    config = tiny.override({"data.shift": 1, "train.steps": 4})
    assert config.data.augments
    assert train(config, tmp_path / "run")[-1].step == 4


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["", "null", "[]", "3", '{"step": "one"}', '{"step": -1}', '{"step": 1e400}', '{"loss": 1}', '{"step": 1, "loss": "low"}',
     '{"step": 2, "similarity": [1]}', "\x00\x00", "{" * 5000, '{"step": 3', '{"step": true}'],
)  # fmt: skip
def test_lines_that_are_no_record_are_left_out(tmp_path, line):
    good = {"step": 1, "loss": 0.5, "similarity": {"block.1.layer.1": 0.25}}
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{json.dumps(good)}\n{line}\n")
    table = Records(tmp_path).table()
    assert table.step.tolist() == [1]
    assert table["similarity.block.1.layer.1"].tolist() == [0.25]


def test_records_that_are_no_file_are_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(LabError, match="is not a file"):
        Records(tmp_path).table()
    (tmp_path / "metrics.jsonl").rmdir()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(LabError, match="is not a file"):
        Records(tmp_path).table()
    assert Records(Path(tmp_path / "nowhere")).table().empty
