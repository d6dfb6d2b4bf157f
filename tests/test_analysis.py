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
from rrepa_lab.analysis.evaluator import accuracy, frechet_distance, load_evaluator
from rrepa_lab.data.datasets import DataConfig, load_split, whole
from rrepa_lab.errors import LabError
from rrepa_lab.sampling.denoise import denoise_step
from rrepa_lab.sampling.sample import noise
from rrepa_lab.viz.images import grid

BUNDLED = ["digits-none", "digits-forward", "digits-detach", "digits-reverse"]


# --- samples ----------------------------------------------------------------------------------------------------------


def test_a_seed_draws_the_same_image_alone_and_in_company():
    flow = make_flow(CONFIGS["plain"])
    assert torch.equal(noise(flow, [17])[0], noise(flow, [3, 17, 5])[1])
    alone = rl.sample(flow, [17], labels=3, guidance=1.0)
    company = rl.sample(flow, [3, 17, 5], labels=[1, 3, 2], guidance=1.0)
    assert_close(company.images[1], alone.images[0], atol=1e-10, rtol=0)
    split = rl.sample(flow, [3, 17, 5], labels=[1, 3, 2], guidance=1.0, batch=2)
    assert_close(split.images, company.images, atol=1e-10, rtol=0)


def test_path_goes_from_the_noise_to_the_image():
    flow = make_flow(CONFIGS["plain"])
    made = rl.sample(flow, [0, 1], labels=3)
    assert len(made.path) == 1 + flow.config.blocks + 1
    assert torch.equal(made.path[0], flow.images(noise(flow, [0, 1]).double()))
    assert torch.equal(made.images, made.path[-1].clamp(-1, 1))
    plain = rl.sample(flow, [0, 1], labels=3, denoise=False)
    assert torch.equal(plain.path[-1], made.path[-2])
    # each stage is the encoding of the next: walking there gives the path backwards
    encoded = flow(plain.path[-1], torch.tensor([3, 3]), "block.*.out").states
    for t in (1, 2, 3):
        assert_close(flow.images(encoded[f"block.{t}.out"]), plain.path[3 - t], atol=1e-8, rtol=0)


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


@pytest.mark.parametrize("method", ["gradient", "bayes"])
def test_batch_size_changes_nothing(method):
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    assert_close(rl.classify(flow, x, method, batch=2).scores, rl.classify(flow, x, method).scores, atol=1e-9, rtol=0)


def test_classify_leaves_no_gradient_behind():
    flow = make_flow(CONFIGS["plain"])
    rl.classify(flow, torch.randn(2, 1, 8, 8, dtype=torch.float64))
    assert all(p.grad is None for p in flow.parameters())


def test_classify_errors():
    with pytest.raises(LabError, match="unknown classification method 'guess'"):
        rl.classify(make_flow(CONFIGS["plain"]), torch.zeros(1, 1, 8, 8), "guess")
    with pytest.raises(LabError, match="trained without classes"):
        rl.classify(make_flow(CONFIGS["unconditional"]), torch.zeros(1, 1, 8, 8))


# --- bundled runs and scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLED)
def test_stored_scores_are_what_the_bundled_weights_give(name):
    """The figures of cards, page and README come from scores.csv: they must follow from the files that are shipped."""
    import pandas as pd

    run = rl.load(name)
    stored = pd.read_csv(run.directory / "scores.csv").set_index("metric")
    fresh = rl.evaluate(run, samples=0).set_index("metric")
    for metric in fresh.index:
        assert fresh.loc[metric, "value"] == pytest.approx(stored.loc[metric, "value"], abs=0.003), metric
    assert set(stored.index) == {"nats_per_dim", "gradient_accuracy", "bayes_accuracy", "frechet_distance", "label_agreement"}


def test_bundled_reverse_reaches_what_is_asked_of_it():
    import pandas as pd

    scores = {name: pd.read_csv(rl.load(name).directory / "scores.csv").set_index("metric")["value"] for name in BUNDLED}
    assert scores["digits-reverse"]["gradient_accuracy"] >= 0.80
    assert scores["digits-reverse"]["bayes_accuracy"] >= 0.95


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
        (not_json, "is not the configuration of an rrepa_lab run"),
        (from_the_future, "has format 99; this version reads format 1"),
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
    with pytest.raises(LabError, match="no run 'somebody/flow' here, and the Hub did not give it"):
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
    with pytest.raises(LabError, match="needs more than 3 images"):
        frechet_distance(a[:3], a)


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
    assert table.columns.tolist() == ["run", "strategy", "split", "train_seed", "metric", "value", "unit", "n", "protocol"]
    row = table.set_index("metric").loc["frechet_distance"]
    assert row.n == 100
    assert "unguided, denoised, labels in turn, seeds 0..99, against 360 real images" in row.protocol
