"""Numbers that are not: refused where they come in, and named where they arise."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.data.images import Batch
from rrepa_lab.errors import LabWarning
from rrepa_lab.flow.finite import NotFiniteError
from rrepa_lab.sampling.denoise import denoise_step, finish
from rrepa_lab.sampling.sample import SamplesNotFiniteError

NAN, INF = math.nan, math.inf


def one_line(error: pytest.ExceptionInfo[rl.LabError]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def run() -> rl.Run:
    return rl.load("digits-none")


@pytest.fixture(scope="module")
def x(run: rl.Run) -> torch.Tensor:
    return run.data("test", 6).x


# arguments of rl.sample that hold the value; some are classes that refuse it themselves, so they are made within the tests
SAMPLE_ARGUMENTS: dict[str, tuple[Callable[[Any], dict[str, Any]], tuple[Any, ...]]] = {
    "guidance": (lambda value: {"guidance": value}, (NAN, INF, -INF, -1.0, "3", True, None)),
    "guidance ": (lambda value: {"guidance": rl.Guidance(value)}, (NAN, INF, -INF, -1.0, "3", True, None)),
    "temperature": (lambda value: {"guidance": rl.Guidance(1.0, temperature=value)}, (NAN, INF, 0.0, -1.0, "1")),
    "strength": (lambda value: {"strength": value}, (NAN, INF, -1.0, "x")),
    "batch": (lambda value: {"method": rl.Decoding(batch=value)}, (0, -1, 2.5, NAN, "4")),
    "tolerance": (lambda value: {"method": rl.Decoding(tolerance=value)}, (0.0, -1.0, NAN, "4")),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, values) in SAMPLE_ARGUMENTS.items() for value in values]
)
def test_sample_refuses_numbers_out_of_range_by_name(run, name, value):
    with pytest.raises(rl.LabError) as error:
        rl.sample(run, [0], 3, **SAMPLE_ARGUMENTS[name][0](value))
    assert name.strip() in one_line(error)


@pytest.mark.parametrize("seeds", [[], -1, [1, -2], 2**63, [2**64], 1.5, "7", [True], [NAN], np.array([0.5])])
def test_seeds_are_whole_numbers_that_torch_can_hold(run, seeds):
    with pytest.raises(rl.LabError) as error:
        rl.sample(run, seeds, 3)
    assert "seeds" in one_line(error)


@pytest.mark.parametrize("seeds", [5, [5], (5,), np.int64(5), np.array([5]), torch.tensor([5]), torch.tensor(5), range(5, 6)])
def test_seeds_of_any_integer_type_give_the_same_image(run, seeds):
    assert torch.equal(rl.sample(run, seeds, 3).images, rl.sample(run, [5], [3]).images)


CLASSIFY_ARGUMENTS: dict[str, tuple[Callable[[Any], dict[str, Any]], tuple[Any, ...]]] = {
    "step_size": (lambda value: {"ascent": rl.Ascent(2, step_size=value)}, (NAN, INF, -1.0, 0.0)),
    "steps": (lambda value: {"ascent": rl.Ascent(value)}, (0, 1.5)),
    "tolerance": (lambda value: {"ascent": rl.Ascent(2, tolerance=value)}, (NAN,)),
    "noise samples": (lambda value: {"noise": value}, (-1, NAN)),
    "noise_std": (lambda value: {"noise": rl.NoiseSamples(std=value)}, (NAN, -0.1)),
    "seed": (lambda value: {"noise": rl.NoiseSamples(seed=value)}, (-1,)),
    "batch": (lambda value: {"batch": value}, (0,)),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, values) in CLASSIFY_ARGUMENTS.items() for value in values]
)
def test_classify_refuses_numbers_out_of_range_by_name(run, x, name, value):
    with pytest.raises(rl.LabError) as error:
        rl.classify(run, x, "iterated", **{"ascent": rl.Ascent(2)} | CLASSIFY_ARGUMENTS[name][0](value))
    assert name in one_line(error)


INSTRUMENTS = {
    "classify": rl.classify,
    "bayes": lambda run, x: rl.classify(run, x, "bayes"),
    "iterated": lambda run, x: rl.classify(run, x, "iterated", ascent=rl.Ascent(2)),
    "evidence": rl.evidence,
    "trace": rl.trace,
    "denoise": lambda run, x: denoise_step(run.flow, x),
    "probe": lambda run, x: rl.probe(
        run, "block.4.in", data={"test": Batch(x, torch.arange(len(x)))}, limit=50, baselines=False
    ),
}


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_pixels_that_are_not_finite_are_named_by_row(run, x, instrument, value):
    bad = x.clone()
    bad[2, 0, 3, 3] = value
    with pytest.raises(rl.LabError) as error:
        INSTRUMENTS[instrument](run, bad)
    assert "row 2" in one_line(error) or "image 2" in one_line(error)


@pytest.fixture(params=["flow._blocks.2", "embedding"])
def broken(request) -> rl.Run:
    """A run with a NaN in one of its weights."""
    run = rl.load("digits-none")
    with torch.no_grad():
        weight = run.flow.block(2).transformer.layers[1]
        parameter = next(weight.parameters()) if request.param != "embedding" else next(run.flow.block(3).parameters())
        parameter.view(-1)[0] = NAN
    return run


@pytest.mark.parametrize("instrument", ["classify", "bayes", "iterated", "trace"])
def test_weights_that_are_not_finite_are_an_error_and_named(broken, x, instrument):
    with pytest.raises(NotFiniteError) as error:
        INSTRUMENTS[instrument](broken, x)
    assert "weights are not finite" in one_line(error)


def test_samples_of_weights_that_are_not_finite_are_an_error_and_named(broken):
    with pytest.raises(SamplesNotFiniteError, match="2 of 2 samples are not finite.*weights are not finite") as error:
        rl.sample(broken, [0, 1], 3)
    one_line(error)
    with pytest.raises(rl.LabError, match="not finite"):
        rl.evaluate(broken, samples=0, limit=4)


def test_overflow_while_generating_names_seeds_labels_and_block(run):
    labels = list(range(10)) * 3
    with pytest.raises(SamplesNotFiniteError, match=r"of 30 samples are not finite, first in block \d.*guidance 20") as error:
        rl.sample(run, range(30), labels, 20.0)
    one_line(error)
    rows = error.value.rows
    assert 0 < len(rows) < 30
    # exactly the rows that are named fail, and each of the others can be drawn alone
    left = [row for row in range(30) if row not in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabWarning)
        made = rl.sample(run, left, [labels[row] for row in left], 20.0)
    assert bool(made.images.isfinite().all())
    with pytest.raises(rl.LabError, match="no score: .* of 30 samples are not finite"):
        rl.evaluate_samples(run, 30, guidance=20.0)


def test_samples_far_outside_the_range_are_a_warning(run):
    with pytest.warns(LabWarning, match=r"left \[-1, 1\] by far.*guidance 10"):
        rl.sample(run, range(10), range(10), 10.0)


def test_pixels_that_leave_the_range_in_the_last_step_alone_are_a_warning(run, monkeypatch):
    monkeypatch.setattr("rrepa_lab.sampling.sample.FAR", 3.0)
    generated = rl.sample(run, range(4), range(4)).path[run.flow.config.blocks]
    assert generated.abs().max() < 3
    with pytest.warns(LabWarning, match=r"left \[-1, 1\] by far"):
        rl.sample(run, range(4), range(4), strength=20.0)


@pytest.mark.parametrize("words", ["--guidance nan", "--guidance inf", "--temperature nan", "--strength nan", "--guidance 30"])
def test_the_command_line_writes_no_picture_of_what_is_not_finite(tmp_path, capsys, words):
    out = tmp_path / "grid.png"
    assert main(["sample", "digits-none", "--labels", "0..9", "--seeds", "0..3", "--out", str(out), *words.split()]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("rrepa-lab: ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "noted"),
    [
        (["--guidance", "3"], "no effect without a label"),
        (["--labels", "3", "--temperature", "2"], "no effect without guidance"),
    ],
)
def test_settings_without_effect_are_noted(tmp_path, capsys, words, noted):
    assert main(["sample", "digits-none", "--seeds", "0", "--out", str(tmp_path / "a.png"), *words]) == 0
    assert f"rrepa-lab: note: {words[-2].removeprefix('--')} {words[-1]} has {noted}" in capsys.readouterr().err


@pytest.mark.parametrize("held", [0.001, 0.0062, 0.999])
def test_a_held_out_part_without_an_image_of_each_class_is_refused(tmp_path, held):
    config = rl.preset("digits-none").override({"data.holdout": held})
    with pytest.raises(rl.LabError, match=r"data\.holdout=0\.\d+ divides 1437 training images into \d+ and \d+") as error:
        list(rl.train(config, tmp_path / "run"))
    one_line(error)


# --- types ----------------------------------------------------------------------------------------------------------


def test_images_of_every_float_type_and_of_bytes_are_read_alike(run):
    levels = torch.arange(6 * 64, dtype=torch.int64).remainder(256).to(torch.uint8).view(6, 1, 8, 8)
    x = levels.float() / 127.5 - 1
    expected = rl.classify(run, x).scores
    close = {torch.float64: 1e-5, torch.float32: 0.0, torch.float16: 0.05, torch.bfloat16: 0.5}
    for dtype, most in close.items():
        error = (rl.classify(run, x.to(dtype)).scores - expected).abs().max()
        assert float(error) <= most, dtype
    for given in (levels, levels.numpy(), x.numpy(), x.numpy().astype(">f4"), x.numpy().astype("float64")):
        assert torch.allclose(rl.classify(run, given).scores, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int16, torch.complex64])
def test_images_without_a_stated_scale_are_refused(run, dtype):
    with pytest.raises(rl.LabError, match="images") as error:
        rl.classify(run, torch.zeros(2, 1, 8, 8).to(dtype))
    one_line(error)
    with pytest.raises(rl.LabError, match="tensor or a numpy array"):
        rl.classify(run, [[0.0]])


def test_pixels_far_outside_the_range_are_a_warning(run, x):
    with pytest.warns(LabWarning, match=r"far outside \[-1, 1\]"):
        rl.classify(run, x.clone().index_fill_(3, torch.tensor([0]), -5.5))


@pytest.mark.parametrize("labels", [True, 3.0, "three", [3, 4], np.array([0.5]), torch.tensor([True]), 10, -2, [[3]], object()])
def test_labels_that_are_none_are_refused(run, labels):
    with pytest.raises(rl.LabError) as error:
        rl.sample(run, [0], labels)
    one_line(error)


@pytest.mark.parametrize("labels", [3, "3", np.int64(3), torch.tensor(3), torch.tensor([3]), [3], np.array([3]), ["3"]])
def test_labels_of_any_integer_type_or_name_give_the_same_image(run, labels):
    assert torch.equal(rl.sample(run, [5], labels).images, rl.sample(run, [5], [3]).images)


@pytest.mark.parametrize("instrument", ["classify", "bayes", "iterated", "evidence", "trace", "denoise"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_instruments_work_without_gradients_around_them(run, x, instrument, mode):
    expected = INSTRUMENTS[instrument](run, x)
    with mode():
        inside = INSTRUMENTS[instrument](run, x.clone())  # the clone is an inference tensor there

    def numbers(result):
        return next(
            part for part in ([result] if isinstance(result, torch.Tensor) else result) if isinstance(part, torch.Tensor)
        )

    if instrument != "trace":
        assert torch.equal(numbers(expected), numbers(inside))
    else:
        assert torch.equal(expected.images["block.1.in"], inside.images["block.1.in"])


# --- uniform noise ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uniform(tmp_path_factory) -> rl.Run:
    out = tmp_path_factory.mktemp("uniform") / "run"
    config = rl.preset("digits-none").override({
        "flow.noise": "uniform", "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 1, "train.steps": 20,
        "train.warmup": 2, "train.batch": 32, "data.shift": 0,
    })  # fmt: skip
    assert list(rl.train(config, out, device="cpu"))
    return rl.load(out)


def test_samples_of_uniform_noise_are_pixel_values_and_not_called_denoised(uniform):
    made = rl.sample(uniform, range(4), 3)
    assert made.finish == "rounded down to 17 levels"
    steps = (made.images + 1) * 8
    assert float((steps - steps.round()).abs().max()) < 1e-5
    assert torch.equal(rl.sample(uniform, range(4), 3, denoise=False).images, made.images)
    scores = rl.evaluate_samples(uniform, 100)
    assert set(scores["finish"]) == {"rounded down to 17 levels"}


def test_readings_of_uniform_noise_take_the_centres_of_the_bins(uniform):
    x = uniform.data("test", 8).x
    integers = ((x + 1) * 8).round()
    centres = (integers + 0.5) / 17 * 2 - 1
    expected = rl.classify(uniform.flow, centres).scores
    assert torch.allclose(rl.classify(uniform, x).scores, expected, atol=1e-5)
    assert rl.classify(uniform, x, noise=2).n_noise_samples == 2


def test_strength_scales_the_last_step(run):
    plain, half, full = (rl.sample(run, [0, 1], 3, strength=strength) for strength in (0.0, 0.5, 1.0))
    raw = rl.sample(run, [0, 1], 3, denoise=False)
    assert torch.equal(plain.images, raw.images)
    assert torch.allclose(half.path[-1] * 2 - plain.path[-1], full.path[-1], atol=1e-5)
    assert (plain.finish, half.finish, full.finish) == ("denoised, strength 0", "denoised, strength 0.5", "denoised")
    assert finish(run, raw.path[-1], torch.tensor([3, 3]), strength=0.5).how == half.finish
