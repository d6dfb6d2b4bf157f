"""Training: reports, run directories, resuming, and what happens when it goes wrong."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.align.encoder import Encoder
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.images import Batch, TensorImages
from rrepa_lab.data.loaders import SeededBatches, generator
from rrepa_lab.data.pictures import from_picture
from rrepa_lab.data.pixels import dequantize, from_drawing, to_integers
from rrepa_lab.data.splits import load_split
from rrepa_lab.data.subset import whole
from rrepa_lab.errors import LabError
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.describe import describe_config
from rrepa_lab.runs.presets import read_config
from rrepa_lab.runs.records import Records
from rrepa_lab.runs.run import build
from rrepa_lab.training.objective import Objective
from rrepa_lab.training.schedule import ema_decay, learning_rate


def train(config, out, **settings):
    return list(rl.train(config, out, device="cpu", **settings))


def test_reports_records_and_run_directory(tiny, tmp_path):
    reports = train(tiny, tmp_path / "run")
    assert [report.step for report in reports] == [2, 4, 6, 8, 10, 12]
    assert reports[-1].loss < reports[0].loss
    assert all(set(report.similarity) == {"block.1.layer.2", "block.2.layer.2"} for report in reports)
    looked = [report.step for report in reports if report.held_out_nats_per_dim is not None]
    assert looked == [report.step for report in reports if report.held_out_accuracy is not None]
    assert looked == [6, 12]
    table = Records(tmp_path / "run").table()
    assert table.step.tolist() == [2, 4, 6, 8, 10, 12]
    assert_close(table["nats_per_dim"].tolist(), [report.nats_per_dim for report in reports])
    assert {path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock"} == {
        "config.json",
        "model.safetensors",
        "metrics.jsonl",
        "card.md",
        "train_state.pt",
    }
    run = rl.load(tmp_path / "run")
    assert (run.step, run.config, run.classes) == (12, tiny, [str(k) for k in range(10)])
    card = (tmp_path / "run" / "card.md").read_text()
    assert "blocks.1.transformer.layers.1" in card
    assert "step 12 of 12" in card


def test_every_checkpoint_is_reported(tiny, tmp_path):
    odd = tiny.override({"train.save_every": 5, "train.log_every": 4})
    seen = {report.step: rl.load(tmp_path / "run").step for report in rl.train(odd, tmp_path / "run", device="cpu")}
    assert list(seen) == [4, 5, 8, 10, 12]
    assert {step: seen[step] for step in (5, 10)} == {5: 5, 10: 10}, "what is reported can be loaded"


def test_total_is_the_sum_paper_writes(tiny):
    run = build(tiny, [str(k) for k in range(10)])
    perturb(run.flow, 0)
    objective = Objective(run.flow, run.projectors, tiny.align)
    x, y = whole(load_split(DataConfig(), "test"), 8)
    encoder = run.encoder()
    losses = objective(x, y, encoder(x))
    near = rl.alignment(run, x, y)
    assert_close({tap: value.item() for tap, value in losses.similarity.items()}, near.similarity)
    assert_close(losses.total, losses.flow + tiny.align.weight * near.loss)


@pytest.mark.parametrize("strategy", ["none", "forward", "detach", "reverse", "reverse-exact"])
def test_every_strategy_trains(tiny, tmp_path, strategy):
    config = tiny.override({"align.strategy": strategy, "train.steps": 4})
    reports = train(config, tmp_path / "run")
    assert math.isfinite(reports[-1].loss)
    assert bool(reports[-1].similarity) == (strategy != "none")


def test_same_seed_same_numbers_and_another_seed_others(tiny, tmp_path):
    first, second = (train(tiny, tmp_path / name) for name in ("a", "b"))
    assert [r.loss for r in first] == [r.loss for r in second]
    other = train(tiny.override({"train.seed": 1}), tmp_path / "c")
    assert [r.loss for r in first] != [r.loss for r in other]


def test_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path):
    whole_run = train(tiny, tmp_path / "whole")
    reports = rl.train(tiny, tmp_path / "cut", device="cpu")
    for report in reports:
        if report.step == 6:
            reports.close()  # what Ctrl-C on the command line does: saved at step 6, between two checkpoints
    assert rl.load(tmp_path / "cut").step == 6
    rest = train(tiny, tmp_path / "cut", resume=True)
    assert [r.loss for r in rest] == [r.loss for r in whole_run[3:]]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert Records(tmp_path / "cut").table().step.tolist() == [2, 4, 6, 8, 10, 12]


def test_resume_auto_begins_goes_on_and_leaves_what_is_finished(tiny, tmp_path):
    out = tmp_path / tiny.fingerprint
    reports = rl.train(tiny, out, resume="auto", device="cpu")
    for report in reports:
        if report.step == 6:
            break
    reports.close()
    assert [report.step for report in train(tiny, out, resume="auto")] == [8, 10, 12]
    assert train(tiny, out, resume="auto") == []
    (out / "train_state.pt").unlink()
    with pytest.raises(LabError, match="train_state.pt is missing"):
        train(tiny, out, resume="auto")
    assert tiny.fingerprint == tiny.override({}).fingerprint != tiny.override({"train.seed": 1}).fingerprint


def test_a_run_cut_off_in_its_first_checkpoint_begins_again(tiny, tmp_path):
    out = tmp_path / "run"
    build(tiny, [str(k) for k in range(10)]).save(out)  # weights of step 0, and no state to resume
    assert train(tiny, out, resume="auto")[-1].step == 12
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".config.json.1.tmp").touch()
    assert train(tiny, tmp_path / "other", resume="auto")[-1].step == 12


def test_keyboard_interrupt_saves(tiny, tmp_path):
    reports = rl.train(tiny, tmp_path / "run", device="cpu")
    next(reports)
    with pytest.raises(KeyboardInterrupt):
        reports.throw(KeyboardInterrupt)
    assert rl.load(tmp_path / "run").step == 2


def test_run_is_loadable_before_the_first_step(tiny, tmp_path):
    stream = rl.train(tiny.override({"train.log_every": 1}), tmp_path / "run", device="cpu")
    next(stream)
    assert rl.load(tmp_path / "run").step == 0
    stream.close()


def test_nan_loss_stops_with_one_line_and_keeps_the_last_checkpoint(tiny, tmp_path):
    config = tiny.override(
        {"train.lr": 1e6, "train.steps": 40, "train.warmup": 0, "train.save_every": 1, "train.grad_clip_norm": 1e9}
    )
    with pytest.raises(LabError, match=r"the loss is (nan|inf|-inf) at step \d+ .*: lower train.lr"):
        train(config, tmp_path / "run")
    assert list((tmp_path / "run").glob(".*tmp")) == []
    rl.load(tmp_path / "run")


def test_nothing_is_written_when_a_run_cannot_begin(tiny, tmp_path):
    out = tmp_path / "run"
    for settings, message in (
        ({"encoder.weights": "nowhere.safetensors"}, "no encoder weights at nowhere.safetensors"),
        ({"flow.classes": 7}, "flow.classes is 7, but digits has 10 classes"),
        ({"data.name": "folder"}, "data.path is not set"),
        ({"data.name": "folder", "data.path": "nowhere"}, f"no image folder at {Path('nowhere').absolute()}"),
    ):
        with pytest.raises(LabError, match=message):
            train(tiny, out, settings=settings)
        assert not out.exists()


def test_out_directory_is_guarded(tiny, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(LabError, match="nothing to resume"):
        train(tiny, out, resume=True)
    train(tiny, out)
    with pytest.raises(LabError, match="already holds a run: --resume"):
        train(tiny, out)
    with pytest.raises(LabError, match=r"train.lr was 0.\d+, now 0.5"):
        train(tiny, out, settings={"train.lr": 0.5}, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(LabError, match="is not empty and holds no run"):
        train(tiny, tmp_path / "other")
    (out / "train_state.pt").write_bytes(b"PK broken")
    with pytest.raises(LabError, match=r"train_state.pt is damaged"):
        train(tiny, out, resume=True)


def test_holdout_is_not_trained_on():
    data = DataConfig(holdout=0.2)
    splits = {name: {tuple(x.flatten().tolist()) for x in whole(load_split(data, name)).x} for name in ("train", "val", "test")}
    assert not splits["train"] & splits["val"]
    assert not splits["train"] & splits["test"]
    assert len(whole(load_split(data, "val")).y) == 288


def test_digits_are_scaled_and_split_as_documented(digits):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    everything = load_digits()
    _, x, _, y = train_test_split(
        everything.images, everything.target, test_size=0.2, stratify=everything.target, random_state=0
    )
    assert_close(digits[0][:, 0], torch.tensor(x).float() / 8 - 1)
    assert digits[1].tolist() == y.tolist()
    assert len(y) == 360


def test_batches_can_be_entered_at_any_step_and_shared():
    everything = list(SeededBatches(100, 16, seed=3, start=0, stop=20))
    assert list(SeededBatches(100, 16, seed=3, start=9, stop=20)) == everything[9:]
    assert len({row for rows in everything[:6] for row in rows}) == 96, "an epoch repeats no image"
    parts = [list(SeededBatches(100, 16, 3, 0, 20, rank, 2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(rows) for rows in everything]
    assert generator(1, 2).initial_seed() != generator(2, 1).initial_seed()


def test_dequantization_stays_in_its_bin():
    x = torch.tensor([-1.0, 0.0, 1.0]).repeat(1000, 1)
    noised = dequantize(x, 17, generator(0))
    assert ((noised >= -1) & (noised < 1)).all()
    assert_close(torch.floor((noised + 1) * 8.5), to_integers(x, 17))
    assert noised.std(dim=0).min() > 0.02


@contextlib.contextmanager
def encoder_reads():
    """Sizes of the batches that encoders are given."""
    sizes = []

    def note(module, given, _):
        if isinstance(module, Encoder):
            sizes.append(len(given[0]))

    hook = register_module_forward_hook(note)
    try:
        yield sizes
    finally:
        hook.remove()


def test_features_of_a_frozen_encoder_can_be_kept_by_a_graph(tiny, digits):
    encoder = Encoder(tiny.encoder)
    modes = []
    next(encoder.model.children()).register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    seen = encoder(digits[0][:4])
    assert modes == [True]
    assert not seen.is_inference()
    weight = torch.ones((), requires_grad=True)
    (seen * weight).sum().backward()
    assert_close(weight.grad, seen.sum())
    with torch.no_grad():
        assert torch.equal(seen, encoder.map(digits[0][:4]).flatten(2).transpose(1, 2))


def test_the_encoder_reads_each_image_once(tiny, tmp_path):
    config = tiny.override({"train.batch": 400})  # 12 steps are four epochs of 3
    with encoder_reads() as fewer:
        kept = train(config, tmp_path / "kept")
    with encoder_reads() as all_reads:
        anew = train(config.override({"train.feature_cache": "off"}), tmp_path / "anew")
    # without a table the floors of the similarity are taken from 512 images, read once more
    assert (sum(fewer), sum(all_reads)) == (1437, 512 + 12 * 400)
    for a, b in zip(kept, anew, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-5)
        assert a.similarity == pytest.approx(b.similarity, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"data.shift": 1}, 4),  # an image does not look the same twice
        ({"data.flip": True}, 4),  # no view of an image comes twice
        ({"train.steps": 3}, 3),  # no image comes twice
        ({"train.feature_cache": "off"}, 4),
    ],
)
def test_the_encoder_reads_each_batch_where_nothing_is_gained_or_it_does_not_fit(tiny, tmp_path, settings, steps):
    with encoder_reads() as sizes:
        train(tiny.override({"train.batch": 400, "train.steps": 4, **settings}), tmp_path / "run")
    assert sizes == [256, 256] + [400] * steps, "512 images for the floors of the similarity, then every batch"


def test_resumed_with_kept_features_it_gives_the_same_numbers(tiny, tmp_path):
    config = tiny.override({"train.batch": 400})
    whole_run = train(config, tmp_path / "whole")
    reports = rl.train(config, tmp_path / "cut", device="cpu")
    for report in reports:
        if report.step == 8:
            reports.close()
    with encoder_reads() as sizes:
        assert [r.loss for r in train(config, tmp_path / "cut", resume=True)] == [r.loss for r in whole_run[4:]]
        assert sum(sizes) == 1437
        sizes.clear()
        assert train(config, tmp_path / "cut", resume="auto") == []
        assert sizes == [], "a finished run needs no features"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_kept_features_of_image_files_read_by_workers(tiny, tmp_path):
    settings = {"data.name": "folder", "data.path": str(photos(tmp_path)), "flow.classes": 2}
    config = tiny.override({**settings, "train.batch": 4, "train.steps": 8, "train.num_workers": 2})
    with encoder_reads() as sizes:
        kept = train(config, tmp_path / "kept")
    assert sizes == [12]
    anew = train(config.override({"train.feature_cache": "off", "train.num_workers": 0}), tmp_path / "anew")
    assert [r.loss for r in kept] == pytest.approx([r.loss for r in anew], abs=1e-5)


def test_recomputed_layers_train_the_same(tiny, tmp_path, monkeypatch):
    from torch.utils.checkpoint import checkpoint

    from rrepa_lab.flow.tarflow import transformer

    calls = []

    def counted(*args, **settings):
        calls.append(1)
        return checkpoint(*args, **settings)

    monkeypatch.setattr(transformer, "checkpoint", counted)
    usual = train(tiny, tmp_path / "usual")
    assert calls == []
    again = train(tiny.override({"train.checkpointing": True}), tmp_path / "again")
    assert len(calls) == 12 * 2 * 2, "once for each step and layer, and not where the average is looked at"
    assert [r.loss for r in again] == pytest.approx([r.loss for r in usual], abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the compiler itself
def test_compiled_layers_train_the_same(tiny, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    config = tiny.override({"train.steps": 2, "train.log_every": 1})
    usual = train(config, tmp_path / "usual")
    torch._dynamo.reset()
    counters.clear()
    compiled = train(config.override({"train.compile": True}), tmp_path / "run")
    assert counters["stats"]["unique_graphs"] == 1, "all layers share their code"
    assert [r.loss for r in compiled] == pytest.approx([r.loss for r in usual], abs=1e-5)
    names = [set(torch.load(tmp_path / name / "train_state.pt", weights_only=True)["objective"]) for name in ("run", "usual")]
    assert names[0] == names[1]
    assert rl.load(tmp_path / "run").step == 2
    assert train(config.override({"train.compile": True}), tmp_path / "run", resume=True) == []


def test_a_missing_compiler_is_told_before_anything_is_written(tiny, tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(LabError, match=r"train.compile needs a C\+\+ compiler"):
        train(tiny.override({"train.compile": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_flip_and_uniform_noise_train(tiny, tmp_path):
    config = tiny.override({"data.flip": True, "flow.noise": "uniform", "train.steps": 4, "align.strategy": "none"})
    train(config, tmp_path / "run")
    scores = rl.evaluate(rl.load(tmp_path / "run"), samples=0).set_index("metric").loc["bits_per_dim"].to_dict()
    assert scores["unit"] == "bits/dim"
    assert scores["value"] > 0


def photos(folder):
    """Six noise pictures of each of two classes in each of two splits."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            (folder / "photos" / split / kind).mkdir(parents=True)
            for n in range(6):
                pixels = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8, generator=draw).numpy()
                Image.fromarray(pixels).save(folder / "photos" / split / kind / f"{n}.png")
    return folder / "photos"


def test_image_folders_go_through_the_same_loop(tmp_path):
    config = rl.preset("imagefolder-reverse").override(
        {
            "data.path": str(photos(tmp_path)),
            "data.image_size": 16,
            "flow.image_size": 16,
            "flow.patch_size": 4,
            "flow.width": 64,
            "flow.blocks": 2,
            "flow.layers": 1,
            "flow.classes": 2,
            "align.blocks": [2],
            "align.layers": [1],
            "align.projector_width": 16,
            "encoder.model": "vit_tiny_patch16_224",
            "encoder.weights": "random",
            "encoder.image_size": 64,
            "encoder.args": {"depth": 1},
            "train.steps": 2,
            "train.batch": 4,
            "train.num_workers": 0,
            "train.log_every": 1,
            "train.precision": "bfloat16",
        }
    )
    reports = train(config, tmp_path / "run")
    assert math.isfinite(reports[-1].loss)
    run = rl.load(tmp_path / "run")
    assert run.classes == ["cat", "dog"]
    assert rl.sample(run, [1, 2], labels=[0, 1]).images.shape == (2, 3, 16, 16)


def test_paper_preset_is_the_papers_size():
    config = rl.preset("imagenet64-reverse")
    facts = describe_config(config)
    assert facts["aligned"] == [
        "block.7.layer.6 (blocks.6.transformer.layers.5)",
        "block.8.layer.6 (blocks.7.transformer.layers.5)",
    ]
    assert (facts["tokens"], facts["token_size"], config.align.weight) == (256, 48, 0.1)
    assert 7.5e8 < facts["parameters"] < 9e8


def test_schedules():
    assert learning_rate(0, 100, 1.0, warmup=10) == pytest.approx(0.1)
    assert learning_rate(9, 100, 1.0, warmup=10) == 1.0
    assert learning_rate(55, 100, 1.0, warmup=10) == pytest.approx(0.5)
    assert learning_rate(99, 100, 1.0, floor=0.01) == pytest.approx(0.01, abs=1e-3)
    assert ema_decay(0, 0.99) == 0.1
    assert ema_decay(10**6, 0.99) == 0.99


def test_average_follows_the_stated_decay(tiny, tmp_path):
    # with decay 0 the stored average is the weights themselves
    train(tiny.override({"train.ema_decay": 0.0}), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "train_state.pt", weights_only=True)
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(stored[key], state["objective"][key]) for key in stored)
    train(tiny, tmp_path / "averaged")
    state = torch.load(tmp_path / "averaged" / "train_state.pt", weights_only=True)
    stored = load_file(tmp_path / "averaged" / "model.safetensors")
    assert not all(torch.equal(stored[key], state["objective"][key]) for key in stored)


# --- configurations ---------------------------------------------------------------------------------------------------


def test_config_survives_json():
    for name in ("digits-reverse", "imagenet64-none"):
        config = rl.preset(name)
        assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.stepps": 3}, "unknown setting 'train.stepps'; did you mean 'train.steps'"),
        ({"trian.steps": 3}, "unknown setting 'trian.steps'; did you mean 'train.steps'"),
        ({"train.steps": "many"}, "train.steps: .*got 'many'"),
        ({"train.steps": 0}, "train.steps: .*greater than or equal to 1"),
        ({"train.lr": float("nan")}, "train.lr: .*finite"),
        ({"align.blocks": [5]}, r"align.blocks \[5\] must lie in 1..4"),
        ({"align.blocks": []}, "align.blocks is empty"),
        ({"align.strategy": "backward"}, "align.strategy: unknown strategy 'backward'; known: .*reverse, reverse-exact"),
        ({"flow.image_size": 16}, "flow.image_size is 16 but data.image_size is 8"),
        ({"encoder": None}, "there is no encoder"),
    ],
)
def test_wrong_settings_are_told_in_one_line(settings, message):
    with pytest.raises(LabError, match=message) as caught:
        rl.preset("digits-reverse").override(settings)
    assert "\n" not in str(caught.value)


def test_unknown_keys_in_a_file_are_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"flow": {"wdith": 32}}))
    with pytest.raises(LabError, match="unknown setting 'flow.wdith'; did you mean 'flow.width'"):
        read_config(path)
    path.write_text("{")
    with pytest.raises(LabError, match="is not JSON"):
        read_config(path)
    with pytest.raises(LabError, match="no configuration at nowhere.json"):
        read_config("nowhere.json")
    with pytest.raises(LabError, match="unknown preset 'digits-backward'"):
        rl.preset("digits-backward")


# --- pictures from outside --------------------------------------------------------------------------------------------


def test_pictures_are_cropped_averaged_and_scaled():
    from PIL import Image

    picture = Image.new("L", (48, 32), 0)
    picture.paste(255, (8, 0, 24, 32))  # left half of the centre square
    x = from_picture(picture, channels=1, size=8)
    assert x.shape == (1, 1, 8, 8)
    assert torch.equal(x[0, 0, 0], torch.tensor([1.0] * 4 + [-1.0] * 4))


def test_a_drawing_fills_the_field():
    import numpy as np

    ink = np.zeros((280, 280), np.float32)
    ink[100:180, 130:150] = 1  # a small stroke, off centre
    x = from_drawing(ink)
    assert x.shape == (1, 1, 8, 8)
    assert (x[0, 0].amax(dim=1) > 0.9).all(), "every row has ink"
    assert x[0, 0, :, 0].max() == -1
    with pytest.raises(LabError, match="the drawing is empty"):
        from_drawing(np.zeros((280, 280), np.float32))


def test_tensor_images_give_batches():
    images = TensorImages(torch.arange(5.0).view(5, 1, 1, 1), torch.arange(5), ["a"] * 5, 256)
    assert isinstance(images.__getitems__([4, 0]), Batch)
    assert images.__getitems__([4, 0]).y.tolist() == [4, 0]
