"""Sampling, classification, evaluation, and runs on disk."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_flow
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.analysis.label_gain import label_gain
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.images import Batch
from rrepa_lab.data.splits import load_split
from rrepa_lab.data.subset import whole
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.evaluation.distances import frechet_distance
from rrepa_lab.evaluation.evaluator import accuracy, load_evaluator
from rrepa_lab.flow.decode.plan import METHODS
from rrepa_lab.measurements.schema import check
from rrepa_lab.sampling.denoise import denoise_step
from rrepa_lab.sampling.sample import noise
from rrepa_lab.viz.images import grid

QUICKLY = ("digits-none", "digits-reverse")  # whose scores the default suite computes anew; `slow` all of them
BUNDLED = ["digits-none", "digits-forward", "digits-detach", "digits-reverse"]


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_image_alone_and_in_company():
    flow = make_flow(CONFIGS["plain"])
    assert torch.equal(noise(flow, [17])[0], noise(flow, [3, 17, 5])[1])
    alone = rl.sample(flow, [17], labels=3, guidance=1.0)
    company = rl.sample(flow, [3, 17, 5], labels=[1, 3, 2], guidance=1.0)
    assert_close(company.images[1], alone.images[0], atol=1e-10, rtol=0)
    split = rl.sample(flow, [3, 17, 5], labels=[1, 3, 2], guidance=1.0, method=rl.Decoding(batch=2))
    assert_close(split.images, company.images, atol=1e-10, rtol=0)


def test_path_goes_from_the_noise_to_the_image():
    flow = make_flow(CONFIGS["plain"])
    made = rl.sample(flow, [0, 1], labels=3)
    assert len(made.path) == 1 + flow.config.blocks + 1
    assert torch.equal(made.path[0], flow.untokenize(noise(flow, [0, 1]).double()))
    assert torch.equal(made.images, made.path[-1].clamp(-1, 1))
    plain = rl.sample(flow, [0, 1], labels=3, denoise=False)
    assert torch.equal(plain.path[-1], made.path[-2])
    # each stage is the encoding of the next: walking there gives the path backwards
    encoded = flow(plain.path[-1], torch.tensor([3, 3]), "block.*.out").states
    for t in (1, 2, 3):
        assert_close(flow.untokenize(encoded[f"block.{t}.out"]), plain.path[3 - t], atol=1e-8, rtol=0)


def test_denoising_is_the_posterior_mean_of_a_gaussian():
    # a flow that is still the identity has density N(0, 1): the posterior mean under noise sigma is x (1 - sigma^2)
    flow = rl.TarFlow(rl.FlowConfig(classes=10, noise_std=0.3)).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert_close(denoise_step(flow, x, torch.tensor([1, 2])), x * (1 - 0.3**2))
    uniform = rl.TarFlow(rl.FlowConfig(noise="uniform"))
    assert denoise_step(uniform, x.float()) is not None
    assert torch.equal(denoise_step(uniform, x.float()), x.float())


def test_bundled_samples_look_like_the_class_asked_for():
    evaluator = load_evaluator(DataConfig())
    made = rl.sample(rl.load("digits-reverse"), range(100), labels=[k % 10 for k in range(100)], guidance=2.0)
    assert float((evaluator(made.images).argmax(dim=1) == made.labels).float().mean()) > 0.8


@pytest.mark.parametrize(
    ("seeds", "labels", "message"),
    [
        ([], None, "seeds must be a list of integers >= 0"),
        ([-1], None, "seeds must be a list of integers >= 0"),
        ([1, 2], [3], "1 labels for 2 seeds"),
        ([1], 10, r"label 10 is out of range: 0\.\.9"),
    ],
)
def test_sample_errors(seeds, labels, message):
    with pytest.raises(LabError, match=message):
        rl.sample(make_flow(CONFIGS["plain"]), seeds, labels)


def test_grid_puts_images_where_they_belong():
    images = torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 1.0, -1.0)])
    sheet = np.asarray(grid(images, columns=2, scale=1, gap=1))
    assert sheet.shape == (7, 7)
    assert (sheet[1:3, 1:3] == 0).all()
    assert (sheet[1:3, 4:6] == 255).all()
    assert (sheet[4:6, 4:6] == 127).all(), "the place left over is empty"


# --- classification ---------------------------------------------------------------------------------------------------


def test_gradient_scores_are_the_derivative_of_the_likelihood():
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    scores = rl.classify(flow, x).scores
    step = 1e-5
    for k in range(10):
        logits = torch.zeros(2, 10, dtype=torch.float64)
        logits[:, k] = step
        difference = (flow.log_prob(x, logits.softmax(1)) - flow.log_prob(x, (-logits).softmax(1))) / (2 * step)
        assert_close(scores[:, k], difference.detach(), atol=1e-4, rtol=1e-4)
    # softmax does not see a constant: the scores of an image sum to zero
    assert_close(scores.sum(dim=1), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_bayes_scores_are_the_posterior():
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    result = rl.classify(flow, x, method="bayes")
    joint = torch.stack([flow.log_prob(x, torch.full((3,), k)) for k in range(10)], dim=1).detach()
    assert_close(result.scores.exp(), joint.softmax(dim=1))
    assert torch.equal(result.label, joint.argmax(dim=1))


@pytest.mark.parametrize("method", ["gradient", "bayes", "iterated"])
def test_batch_size_changes_nothing(method):
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    assert_close(
        rl.classify(flow, x, method, batch=3, noise=2).scores, rl.classify(flow, x, method, noise=2).scores, atol=1e-9, rtol=0
    )


def test_classify_leaves_no_gradient_behind():
    flow = make_flow(CONFIGS["plain"])
    rl.classify(flow, torch.randn(2, 1, 8, 8, dtype=torch.float64))
    assert all(p.grad is None for p in flow.parameters())


def log_likelihoods(flow, x):
    """log p(x | k) by a plain loop over classes."""
    return torch.stack([flow.log_prob(x, torch.full((len(x),), k)) for k in range(flow.config.classes)], dim=1).detach()


@pytest.mark.parametrize("batch", [1, 7, 256])
def test_bayes_in_chunks_equals_a_plain_loop(batch):
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    expected = log_likelihoods(flow, x).log_softmax(dim=1)
    assert_close(rl.classify(flow, x, "bayes", batch=batch).scores, expected, atol=1e-10, rtol=0)


def test_evidence_of_the_blocks_sums_to_the_scores():
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    parts = rl.evidence(flow, x)
    assert parts.shape == (4, 3, 10)
    # the paper's definition, one soft label shared by all blocks, by autograd
    logits = torch.zeros(4, 10, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(flow.log_prob(x, logits.softmax(1)).sum(), logits)
    assert_close(parts.sum(dim=1), whole, atol=1e-10, rtol=0)
    assert_close(rl.classify(flow, x).scores, whole, atol=1e-10, rtol=0)
    assert_close(rl.classify(flow, x, blocks=[1, 3]).scores, parts[:, [0, 2]].sum(dim=1), atol=1e-10, rtol=0)
    # block 2 alone, by finite differences of a likelihood in which the other blocks see no label
    step = 1e-5
    for k in (0, 7):
        value = []
        for sign in (1, -1):
            weights = torch.full((4, 3, 10), 0.1, dtype=torch.float64)
            moved = torch.zeros(10, dtype=torch.float64)
            moved[k] = sign * step
            weights[:, 1] = moved.softmax(0)
            value.append(flow.log_prob(x, weights).detach())
        assert_close(parts[:, 1, k], (value[0] - value[1]) / (2 * step), atol=1e-4, rtol=1e-4)


def test_bayes_with_some_blocks_labelled():
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    weights = torch.full((2, 3, 10), 0.1, dtype=torch.float64)
    joint = []
    for k in range(10):
        weights[:, 1] = torch.eye(10, dtype=torch.float64)[k]
        joint.append(flow.log_prob(x, weights).detach())
    expected = torch.stack(joint, dim=1).log_softmax(dim=1)
    assert_close(rl.classify(flow, x, "bayes", blocks=[2]).scores, expected, atol=1e-10, rtol=0)
    assert (rl.classify(flow, x, "bayes").scores - expected).abs().max() > 1e-3


def test_noise_samples_average_the_likelihood():
    from rrepa_lab.data.loaders import generator

    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    views = [x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=generator(4, draw)) for draw in range(3)]
    joint = torch.stack([log_likelihoods(flow, view) for view in views])
    result = rl.classify(flow, x, "bayes", noise=rl.NoiseSamples(3, seed=4))
    assert_close(result.scores, joint.mean(dim=0).log_softmax(dim=1), atol=1e-9, rtol=0)
    assert_close(result.path[1], joint[:2].mean(dim=0).log_softmax(dim=1), atol=1e-9, rtol=0)
    steep = torch.stack([rl.classify(flow, view).scores for view in views]).mean(dim=0)
    assert_close(rl.classify(flow, x, noise=rl.NoiseSamples(3, seed=4)).scores, steep, atol=1e-10, rtol=0)
    without = rl.classify(flow, x, noise=rl.NoiseSamples(3, 0.0, seed=4)).scores
    assert_close(without, rl.classify(flow, x).scores, atol=1e-10, rtol=0)


def test_iterated_is_gradient_ascent_and_can_be_watched():
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    ascent = rl.Ascent(steps=4, step_size=0.05, tolerance=0)
    watched = list(rl.classify_steps(flow, x, ascent=ascent))
    assert len(watched) == 5
    logits, values = torch.zeros(3, 10, dtype=torch.float64), list[torch.Tensor]()
    for number, taken in enumerate(watched):
        assert_close(taken.scores, logits, atol=1e-10, rtol=0)
        leaf = logits.clone().requires_grad_()
        value = flow.log_prob(x, leaf.softmax(1))
        if number:
            assert (value > values[-1]).all(), "each small step climbs"
        values.append(value.detach())
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        logits = logits + 0.05 * slope
    assert_close(watched[1].scores, 0.05 * rl.classify(flow, x).scores, atol=1e-10, rtol=0)
    result = rl.classify(flow, x, "iterated", ascent=ascent)
    assert_close(result.path, torch.stack([taken.scores for taken in watched]), atol=0, rtol=0)
    assert torch.equal(result.label, result.scores.argmax(1))


def test_iterated_stops_early_and_alone():
    run = rl.load("digits-reverse")
    x = run.data("test").x[:12]
    ascent = rl.Ascent(steps=60, tolerance=0.01)
    result = rl.classify(run, x, "iterated", ascent=ascent)
    assert 2 < len(result.path) < 61
    moved = (result.path[1:] != result.path[:-1]).any(dim=2)
    last = [int(moved[:, row].nonzero().max()) for row in range(12)]
    assert len(set(last)) > 1, "images stop at different steps"
    for row in range(12):
        assert moved[: last[row] + 1, row].all(), "and do not move again"
        step = result.path[last[row] : last[row] + 2, row].softmax(dim=1)
        assert (step[1] - step[0]).abs().max() <= 0.01 or len(result.path) == 61
    alone = rl.classify(run, x[3:4], "iterated", ascent=ascent)
    assert_close(alone.scores[0], result.scores[3], atol=1e-3, rtol=1e-3)


def test_iterating_closes_the_gap_to_bayes(digits):
    """On the bundled runs, one step is the weakest reading and twenty are near the exact posterior."""
    run, x, y = rl.load("digits-none"), digits[0][:180], digits[1][:180]
    one, many, exact = (float((rl.classify(run, x, m).label == y).float().mean()) for m in ("gradient", "iterated", "bayes"))
    assert one + 0.03 < many < exact + 0.005
    assert many > 0.95


def test_margin_top_and_probability():
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    for method in ("gradient", "bayes", "iterated"):
        result = rl.classify(flow, x, method)
        ordered = result.scores.sort(dim=1, descending=True)
        assert_close(result.margin, ordered.values[:, 0] - ordered.values[:, 1])
        top = result.top(3)
        assert torch.equal(top.labels, ordered.indices[:, :3])
        assert torch.equal(top.labels[:, 0], result.label)
        assert result.top(99).labels.shape == (3, 10)
        assert_close(result.probability.sum(dim=1), torch.ones(3, dtype=torch.float64))
        assert torch.equal(result.probability.argmax(dim=1), result.label)
    assert_close(rl.classify(flow, x, "bayes").probability, log_likelihoods(flow, x).softmax(dim=1), atol=1e-9, rtol=0)


def test_k_times_the_gradient_is_the_gain_in_likelihood_to_first_order():
    flow = make_flow(CONFIGS["plain"])
    x, small = torch.randn(2, 1, 8, 8, dtype=torch.float64), 1e-6
    gains = 10 * rl.classify(flow, x).scores
    base = flow.log_prob(x).detach()
    for k in (2, 9):
        weights = torch.full((2, 10), (1 - small) / 10, dtype=torch.float64)
        weights[:, k] += small
        assert_close((flow.log_prob(x, weights).detach() - base) / small, gains[:, k], atol=1e-3, rtol=1e-3)


def test_report_counts_what_happened(digits):
    from sklearn.metrics import confusion_matrix

    run, x, y = rl.load("digits-reverse"), digits[0][:150], digits[1][:150]
    report = rl.classification_report(run, "gradient", images=rl.Images(data=Batch(x, y)), bins=5)
    answer = rl.classify(run, x).label
    summary = report.summary.set_index("metric")["value"]
    assert summary["gradient_accuracy"] == pytest.approx(float((answer == y).double().mean()))
    wide = report.confusion.pivot(index="class", columns="predicted", values="count").loc[run.classes, run.classes]
    assert (wide.to_numpy() == confusion_matrix(y, answer, labels=range(10))).all()
    per_class = report.per_class.set_index("class")
    assert per_class.loc["7", "accuracy"] == pytest.approx(float((answer[y == 7] == 7).double().mean()))
    assert per_class["n"].sum() == 150
    images = report.images
    assert list(images["right"]) == (answer == y).tolist()
    assert images.loc[~images.right, "predicted"].ne(images.loc[~images.right, "class"]).all()
    assert images["runner_up"].ne(images["predicted"]).all()
    # calibration by hand
    confidence, gap = images["confidence"], 0.0
    for low in (0, 0.2, 0.4, 0.6, 0.8):
        inside = images[(confidence >= low) & (confidence < low + 0.2) | (low == 0.8) & (confidence == 1)]
        if len(inside):
            gap += len(inside) / 150 * abs(inside["confidence"].mean() - inside["right"].mean())
    assert summary["expected_calibration_error"] == pytest.approx(gap, abs=1e-6)
    assert report.calibration["n"].sum() == 150
    for table in report:
        assert set(table["method"]) == {"gradient"}
        assert set(table["run"]) == {"digits-reverse"}


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_passes_over_the_flow_by_method(classes):
    """One step costs one pass whatever K is; Bayes' rule one row for each pair of an image and a class."""
    flow = make_flow(rl.FlowConfig(classes=classes, width=16, head_width=16, blocks=1, layers=1))
    rows = []
    flow.block(1).transformer.register_forward_hook(lambda _module, given, _out: rows.append(len(given[0])))
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    rl.classify(flow, x)
    assert rows == [4]
    rows.clear()
    rl.classify(flow, x, "bayes", batch=400)
    assert rows == [min(400, 4 * classes)] * (4 * classes // min(400, 4 * classes))


def test_label_gain_is_the_likelihood_and_its_tangent():
    flow = make_flow(CONFIGS["plain"])
    x, classes = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([[3, 7, 0], [9, 3, 1]])
    table = label_gain(flow, x, classes, points=5, batch=7)
    assert len(table) == 2 * 3 * 5 * 2
    gain = table.set_index(["image", "kind", "class", "weight"])["value"]
    scores, joint, base = rl.classify(flow, x).scores, log_likelihoods(flow, x), flow.log_prob(x).detach()
    for row in (0, 1):
        for k in classes[row].tolist():
            assert gain[row, "exact", k, 1.0] == pytest.approx(float(joint[row, k] - base[row]), abs=1e-9)
            assert gain[row, "first order", k, 0.5] == pytest.approx(5 * float(scores[row, k]), abs=1e-9)
    weights = torch.full((1, 10), 0.075, dtype=torch.float64)
    weights[0, 1] = 0.325
    expected = float(flow.log_prob(x[1:], weights).detach() - base[1])
    assert gain[1, "exact", 1, 0.25] == pytest.approx(expected, abs=1e-9)
    assert (gain.xs(0.0, level="weight") == 0).all()
    with pytest.raises(LabError, match=r"classes \(B, M\) in 0\.\.9 for 2 images"):
        label_gain(flow, x, torch.tensor([[10], [0]]))


def test_decoding_is_held_against_the_plain_reference(trained, monkeypatch):
    from rrepa_lab import bench

    run = rl.load(trained)
    table = bench.decoding(run, 4, 2, guidance=1.0, seed=5).set_index("method")
    assert list(table.index) == [method for method in METHODS if method != "auto"]
    assert table.loc["sequential", "error"] == 0
    assert table.loc["sequential", "ratio"] == 1
    z, y = noise(run.flow, range(5, 9)), torch.arange(4)
    exact = run.flow.inverse(z, y, 1.0, method="sequential").x
    expected = float((run.flow.inverse(z, y, 1.0, method="cached").x - exact).abs().max().detach())
    assert table.loc["cached", "error"] == pytest.approx(expected)
    assert table.loc["cached", "error"] < 1e-4
    assert (table["seconds_per_image"] * 4).tolist() == pytest.approx(table["seconds"].tolist())
    with pytest.raises(LabError, match="images must be at least 1"):
        bench.decoding(run, 0)
    with pytest.raises(LabError, match="unknown decoding method 'guess'"):
        bench.decoding(run, 1, 1, methods=["guess"])
    # in what other methods draw, an error shows
    inverse = rl.TarFlow.inverse

    def wrong(self, z, y, guidance, *, method="auto"):
        out = inverse(self, z, y, guidance, method=method)
        return out._replace(x=out.x + 0.5) if method == "cached" else out

    monkeypatch.setattr(rl.TarFlow, "inverse", wrong)
    assert bench.decoding(run, 2, 1).set_index("method").loc["cached", "error"] == pytest.approx(0.5, abs=1e-4)
    monkeypatch.setattr(bench, "load", lambda *_: run)
    shared = bench.bench("decode", repeats=1, threads=1)
    assert list(shared["case"]) == list(table.index)
    assert {"bench", "case", "classes", "seconds", "fastest", "slowest", "ratio", "reference", "images"} <= {*shared.columns}


def test_benchmark_table(monkeypatch):
    from rrepa_lab import bench

    monkeypatch.setattr(bench, "CLASSES", (10, 20))
    table = bench.bench("classify", repeats=2, threads=1).set_index(["case", "classes"])
    assert list(table.index) == [("gradient", 10), ("gradient", 20), ("bayes", 10), ("bayes", 20)]
    assert (table.xs(10, level="classes")["ratio"] == 1).all()
    assert (table["fastest"] <= table["seconds"]).all()
    assert (table["seconds"] <= table["slowest"]).all()
    assert (table["seconds"] > 0).all()
    with pytest.raises(LabError, match="unknown benchmark 'training'"):
        bench.bench("training")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "guess"}, "unknown classification method 'guess'"),
        ({"x": torch.zeros(0, 1, 8, 8)}, "no images to classify"),
        ({"x": torch.zeros(1, 3, 8, 8)}, "images must be"),
        ({"blocks": [4]}, r"blocks \[4\] must be some of 1\.\.3"),
        ({"blocks": []}, r"blocks \[\] must be some of 1\.\.3"),
        ({"noise": -1}, "noise samples must be >= 0, not -1"),
    ],
)
def test_classify_errors(settings, message):
    with pytest.raises(LabError, match=message):
        rl.classify(rl.TarFlow(CONFIGS["plain"]), **{"x": torch.zeros(1, 1, 8, 8), **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be >= 1 and step_size > 0, not 0"),
        ({"step_size": 0.0}, "steps must be >= 1 and step_size > 0, not 20 and 0.0"),
    ],
)
def test_an_ascent_takes_steps(settings, message):
    with pytest.raises(LabError, match=message):
        rl.classify(rl.TarFlow(CONFIGS["plain"]), torch.zeros(1, 1, 8, 8), "iterated", ascent=rl.Ascent(**settings))


def test_flows_that_cannot_classify():
    with pytest.raises(LabError, match="trained without classes"):
        rl.classify(make_flow(CONFIGS["unconditional"]), torch.zeros(1, 1, 8, 8))
    uniform = rl.TarFlow(rl.FlowConfig(classes=3, noise="uniform"))
    with pytest.raises(LabError, match="trained with uniform noise: say noise_std"):
        rl.classify(uniform, torch.zeros(1, 1, 8, 8), noise=2)


# --- bundled runs and scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICKLY else pytest.mark.slow) for name in BUNDLED])
def test_stored_scores_are_what_the_bundled_weights_give(name):
    """The figures of cards, page and reports come from scores.csv: they must follow from the files that are shipped."""
    import pandas as pd

    run = rl.load(name)
    assert run.directory is not None
    stored = pd.read_csv(run.directory / "scores.csv").set_index(["split", "metric"])["value"]
    fresh = rl.evaluate(run, ["train", "test"], samples=0, n_noise_samples=16).set_index(["split", "metric"])["value"]
    for key in fresh.index:
        assert fresh[key] == pytest.approx(stored[key], abs=0.003), key
    read = {"nats_per_dim", "gradient_accuracy", "bayes_accuracy"}
    assert set(stored["train"].index) == read
    assert set(stored["test"].index) == read | {"FD[digits]", "label_agreement"}


def test_bundled_reverse_reaches_what_is_asked_of_it():
    import pandas as pd

    run = rl.load("digits-reverse")
    assert run.directory is not None
    scores = pd.read_csv(run.directory / "scores.csv").set_index(["split", "metric"])["value"]
    assert scores["test", "gradient_accuracy"] >= 0.80
    assert scores["test", "bayes_accuracy"] >= 0.95


def test_available_lists_bundled_and_local_runs(trained, monkeypatch):
    monkeypatch.setenv("RREPA_RUNS", str(trained.parent))
    infos = {info.name: info for info in rl.available()}
    assert set(BUNDLED) <= set(infos)
    assert infos["trained"].strategy == "reverse"
    assert "reverse on blocks 2 at layer 2" in infos["trained"].summary
    assert rl.load("trained").directory == trained


def test_load_gives_a_fresh_run_each_time():
    first, second = rl.load("digits-reverse"), rl.load("digits-reverse")
    first.flow.block(1).proj_in.weight.data.zero_()
    assert second.flow.block(1).proj_in.weight.any()
    assert not any(p.requires_grad for p in second.flow.parameters())


def test_save_and_load_keep_every_number(trained, tmp_path):
    run = rl.load(trained)
    run.save(tmp_path / "copy")
    again = rl.load(tmp_path / "copy")
    x, y = run.data("test", 8)
    assert torch.equal(again.flow.log_prob(x, y), run.flow.log_prob(x, y))
    run.save(tmp_path / "half", torch.bfloat16)
    small = (tmp_path / "half" / "model.safetensors").stat().st_size
    assert small < 0.6 * (tmp_path / "copy" / "model.safetensors").stat().st_size
    assert_close(rl.load(tmp_path / "half").flow.log_prob(x, y), run.flow.log_prob(x, y), atol=1.0, rtol=0.02)


def broken(trained, tmp_path, change):
    target = tmp_path / "broken"
    shutil.copytree(trained, target)
    change(target)
    return target


def test_damaged_run_directories_are_told_in_one_line(trained, tmp_path):
    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])

    def cut_late(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])

    def foreign(folder):
        save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")

    def reshaped(folder):
        weights = load_file(folder / "model.safetensors")
        weights["flow.blocks.1.proj_out.weight"] = torch.zeros(48, 16)
        save_file(weights, folder / "model.safetensors")

    def extra(folder):
        save_file(load_file(folder / "model.safetensors") | {"flow.more": torch.zeros(1)}, folder / "model.safetensors")

    def pickled(folder):
        torch.save({"weight": torch.zeros(3)}, folder / "model.safetensors")

    def unknown_key(folder):
        about = json.loads((folder / "config.json").read_text())
        about["config"]["flow"]["colour"] = 1
        (folder / "config.json").write_text(json.dumps(about))

    def not_json(folder):
        (folder / "config.json").write_text("weights!")

    def from_the_future(folder):
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | {"format": 99}))

    for change, message in (
        (cut, "is damaged or no safetensors file"),
        (cut_late, "is damaged or no safetensors file"),
        (foreign, "has no flow.blocks.0"),
        (reshaped, r"flow.blocks.1.proj_out.weight is \(48, 16\) on file, but its config builds \(8, 16\)"),
        (extra, "holds flow.more, which its config does not build"),
        (pickled, "is damaged or no safetensors file"),
        (unknown_key, "unknown setting 'flow.colour'"),
        (not_json, "config.json is not JSON: "),
        (from_the_future, "has format 99; this version reads formats 1 to 2"),
    ):
        folder = broken(trained, tmp_path / change.__name__, change)
        with pytest.raises(LabError, match=message) as caught:
            rl.load(folder)
        assert "\n" not in str(caught.value)


def test_unknown_runs(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LabError, match="unknown run 'digits-revers'; did you mean 'digits-reverse'"):
        rl.load("digits-revers")
    with pytest.raises(LabError, match="is not a run directory: it has no config.json"):
        rl.load(tmp_path)
    with pytest.raises(LabError, match="no run 'somebody/flow' on this machine .* not in the cache of this machine"):
        rl.load("somebody/flow")


# --- the judge --------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_known_gaussians():
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=draw, dtype=torch.float64)
    # N(0, 1) against N(1, 2^2) in each of three dimensions: 1 + (1 - 2)^2 each
    assert frechet_distance(a, 2 * torch.randn(200_000, 3, generator=draw, dtype=torch.float64) + 1) == pytest.approx(
        6.0, rel=0.02
    )
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_agrees_with_scipy():
    from scipy.linalg import sqrtm

    draw = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(100, 8, generator=draw, dtype=torch.float64) @ torch.randn(8, 8, generator=draw, dtype=torch.float64)
        for _ in "ab"
    )
    shift, (ca, cb) = (a.mean(0) - b.mean(0)).numpy(), (np.cov(part.numpy(), rowvar=False) for part in (a, b))
    assert frechet_distance(a, b) == pytest.approx(shift @ shift + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real), rel=1e-6)


def test_evaluator_is_a_good_judge_and_not_the_teacher():
    evaluator = load_evaluator(DataConfig())
    assert accuracy(evaluator, DataConfig()) > 0.98
    x = whole(load_split(DataConfig(), "train")).x
    features = evaluator.features(x)
    assert features.shape == (1437, 64)
    assert features.square().sum(dim=1).mean() == pytest.approx(1.0, abs=0.02)
    with pytest.raises(LabError, match="no evaluator is bundled for 'folder'"):
        load_evaluator(DataConfig(name="folder"))


def test_evaluate_table_names_its_protocol(trained):
    table = rl.evaluate(rl.load(trained), samples=100)
    first = ["run", "strategy", "data", "space", "encoder", "split", "train_seed", "metric", "value", "unit", "n", "protocol"]
    assert table.columns.tolist()[:12] == first
    check(table)
    row = table.set_index("metric").loc["FD[digits]"]
    assert row.n == 100
    assert "unguided, denoised, labels in turn, seeds 0..99, against 360 real images" in row.protocol


def test_a_float64_run_has_the_scores_of_float32():
    run = rl.load("digits-none")
    expected = rl.evaluate(run, samples=70, limit=40)
    run.flow.double()
    found = rl.evaluate(run, samples=70, limit=40)
    numbers = ["value", "standard_error", "low", "high"]
    assert found.drop(columns=numbers).equals(expected.drop(columns=numbers))
    for name in numbers:
        assert found[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-3, abs=1e-6, nan_ok=True), name


def test_samples_are_scored_under_the_settings_asked_for(trained):
    run = rl.load(trained)
    whole_table = rl.evaluate(run, samples=100, seed=7)
    told = whole_table.set_index("metric").loc[["FD[digits]", "label_agreement"]]
    plain = rl.evaluate_samples(run, 100, seed=7).set_index("metric")
    assert plain.loc[told.index, "value"].tolist() == told["value"].tolist(), "evaluate says the same, bit for bit"
    protocol = "100 samples, unguided, denoised, labels in turn, seeds 7..106"
    assert told["protocol"].tolist() == [f"{protocol}, against 360 real images", protocol]
    guidance = rl.Guidance(2.0, annealed=True, temperature=0.5)
    settings = {"guidance": 2.0, "annealed": True, "temperature": 0.5, "denoise": False}
    other = rl.evaluate_samples(run, 100, guidance=guidance, denoise=False, seed=7).set_index("metric")
    assert all((other[name] == value).all() for name, value in settings.items())
    assert other["protocol"].tolist() == plain["protocol"].tolist(), "settings are columns: a table can be compared by them"
    # the distance by hand
    made = rl.sample(run, range(7, 107), [k % 10 for k in range(100)], guidance, denoise=False)
    evaluator = load_evaluator(DataConfig())
    expected = frechet_distance(evaluator.features(made.images), evaluator.features(run.data("test").x))
    assert other.loc["FD[digits]", "value"] == pytest.approx(expected)
    agree = float((evaluator(made.images).argmax(dim=1) == made.labels).double().mean())
    assert other.loc["label_agreement", "value"] == pytest.approx(agree)
    assert other.loc["label_agreement", "standard_error"] == pytest.approx((agree * (1 - agree) / 100) ** 0.5)
    with pytest.warns(LabWarning, match=r"FD\[digits\] of 20 samples and 64 features"):
        rl.evaluate_samples(run, 20)


def test_bayes_reads_blocks_below_the_first_labelled_one_once():
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    rows = dict[int, int]()
    for number in (1, 2, 3):
        flow.block(number).transformer.register_forward_hook(
            lambda _module, given, _out, number=number: rows.__setitem__(number, rows.get(number, 0) + len(given[0]))
        )
    found = rl.classify(flow, x, "bayes", blocks=[3], batch=7)
    assert rows == {1: 3, 2: 3, 3: 30}
    by_hand = torch.full((3, 10, 3, 10), 0.1, dtype=torch.float64)
    by_hand[:, :, 2] = torch.eye(10, dtype=torch.float64)
    one_by_one = torch.stack([flow.log_prob(x, by_hand[:, k]) for k in range(10)], dim=1).log_softmax(dim=1)
    assert_close(found.scores, one_by_one.detach(), atol=1e-10, rtol=0)
