"""The noise that images are read under: one choice of the run for all instruments, made on validation data."""

import json

import pytest
import torch

import rrepa_lab as rl
from rrepa_lab.analysis.alignment import alignment
from rrepa_lab.analysis.noise_choice import save_read_noise
from rrepa_lab.cli import main
from rrepa_lab.data.images import Batch
from rrepa_lab.evaluation.validation import Validation


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> rl.Run:
    """A small run with a validation split."""
    out = tmp_path_factory.mktemp("held") / "run"
    config = rl.preset("digits-reverse").override({
        "data.holdout": 0.2, "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 2, "align.blocks": [2],
        "align.projector_width": 16, "train.steps": 30, "train.warmup": 2, "train.batch": 32,
    })  # fmt: skip
    assert list(rl.train(config, out, device="cpu"))
    return rl.load(out)


def chosen(run: rl.Run, n: int) -> rl.Run:
    """The run with another choice."""
    read = run.config.read.model_copy(update={"n_noise_samples": n})
    return rl.Run(run.flow, run.config.model_copy(update={"read": read}), run.classes, run.projectors, run.step, run.directory)


INSTRUMENTS = {
    "gradient": lambda run, x, **given: rl.classify(run, x, **given).scores,
    "iterated": lambda run, x, **given: rl.classify(run, x, "iterated", ascent=rl.Ascent(3), **given).scores,
    "bayes": lambda run, x, **given: rl.classify(run, x, "bayes", **given).scores,
    "features": lambda run, x, **given: next(
        rl.FeatureProtocol(**given).batches(run, ["block.2.layer.1"], rl.Images(data=Batch(x, torch.zeros(len(x)).long())))
    ).features["block.2.layer.1"],
}


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_every_instrument_follows_the_choice_of_the_run(held, instrument):
    x = held.data("test", 5).x
    read = INSTRUMENTS[instrument]
    clean, noisy = read(held, x), read(chosen(held, 3), x)
    assert torch.equal(noisy, read(held, x, noise=3))
    assert torch.equal(clean, read(chosen(held, 3), x, noise=0))
    assert not torch.allclose(clean, noisy)


def test_the_mean_over_noise_samples_is_that_of_single_ones(held):
    x = held.data("test", 5).x
    path = rl.classify(held, x, noise=4).path  # the mean over 1..4 samples
    singles = torch.stack([path[0], *(path[i] * (i + 1) - path[i - 1] * i for i in range(1, 4))])
    assert torch.allclose(singles.mean(dim=0), path[-1], atol=1e-6)
    assert float((singles[1] - singles[0]).abs().max()) > 1e-6
    # the noise of an image is its own, whatever its company
    alone = rl.classify(held, x[:1], noise=4).scores
    assert torch.allclose(alone, path[-1][:1], atol=1e-6)


def test_validation_reads_under_the_choice(held):
    validation = Validation(held.config, held.images("train"), held.device)
    x, y = validation.batches["held_out"]
    for n in (0, 2):
        expected = float((rl.classify(held, x, noise=n).label == y).double().mean())
        assert validation(chosen(held, n))["held_out_accuracy"] == expected


def test_the_choice_is_made_on_validation_images_and_kept_with_the_run(held):
    table = rl.choose_read_noise(held, counts=(0, 1, 2), methods=("gradient", "bayes"), limit=100)
    assert list(table["metric"]) == ["gradient_accuracy"] * 3 + ["bayes_accuracy"] * 3
    assert set(table["split"]) == {"val"}
    x, y = held.data("val", 100)
    for row in table.itertuples():
        method = row.metric.removesuffix("_accuracy")
        assert row.value == float((rl.classify(held, x, method, noise=row.n_noise_samples).label == y).double().mean())
    (n,) = set(table.loc[table["chosen"], "n_noise_samples"])
    before = held.config.read
    try:
        reported = rl.choose_read_noise(held, counts=(0, 1, 2), limit=100, test=True)
        on_test = reported[reported["split"] == "test"]
        assert set(on_test["n_noise_samples"]) == {0, *table.loc[table["chosen"], "n_noise_samples"]}
        assert on_test["chosen"].any()
        assert save_read_noise(held, table.assign(chosen=table["n_noise_samples"] == 2)).n_noise_samples == 2
        again = rl.load(held.directory)
        assert again.config.read.n_noise_samples == 2
        assert torch.equal(rl.classify(again, x).scores, rl.classify(held, x, noise=2).scores)
        scores = rl.evaluate(again, samples=0, limit=50)
        assert scores.loc[scores["metric"] == "gradient_accuracy", "protocol"].str.startswith("2 draws of gaussian noise").all()
        # another reading is not another training
        assert not list(rl.train(again.config, held.directory, resume=True, device="cpu"))
        assert n in (0, 1, 2)
    finally:
        held.config = held.config.model_copy(update={"read": before})
        held.save_config(held.directory)


def test_the_fewest_samples_that_are_not_worse_by_a_standard_error_are_chosen(held, monkeypatch):
    y = held.data("val", 100).y
    right = {0: 80, 1: 70, 4: 84, 16: 96}  # 84 of 100 against 96: worse by more than an error; 80 too

    def answers(run, x, method, *, noise):
        assert noise.seed == 0
        label = y.clone()
        label[right[noise.n] :] = (label[right[noise.n] :] + 1) % 10
        return rl.Classification(torch.zeros(len(y), 10), label, method, torch.zeros(1))

    monkeypatch.setattr("rrepa_lab.analysis.noise_choice.classify", answers)
    assert set(rl.choose_read_noise(held, limit=100).query("chosen")["n_noise_samples"]) == {16}
    right[1] = 96
    assert set(rl.choose_read_noise(held, limit=100).query("chosen")["n_noise_samples"]) == {1}


def test_test_images_do_not_decide(tmp_path, capsys):
    run = rl.load("digits-none")
    data = run.config.data.model_copy(update={"holdout": 0.0})
    run.config = run.config.model_copy(update={"data": data})
    with pytest.raises(rl.LabError, match="no validation split"):
        rl.choose_read_noise(run)


@pytest.mark.parametrize("flag", ["--noise-samples", "--draws"])
def test_the_command_prints_and_saves_the_choice(held, capsys, flag):
    words = ["read-noise", str(held.directory), flag, "0,2", "--limit", "60", "--json"]
    before = (held.directory / "config.json").read_text()
    try:
        assert main(words) == 0
        rows = json.loads(capsys.readouterr().out)
        assert (held.directory / "config.json").read_text() == before
        assert main([*words, "--save"]) == 0
        (n,) = {row["n_noise_samples"] for row in rows if row["chosen"]}
        assert rl.load(held.directory).config.read.n_noise_samples == n
    finally:
        (held.directory / "config.json").write_text(before)


def test_alignment_of_noised_images_gives_the_teacher_the_clean_ones(held):
    x, y = held.data("test", 40)
    noised = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    encoder, tap = held.encoder(), "block.2.layer.2"
    state = held.flow(noised, y, [tap]).states[tap]
    expected = torch.nn.functional.cosine_similarity(held.projectors.project(tap, state), encoder(x), dim=-1).mean()
    result = alignment(held, noised, y, "forward", clean=x)
    assert float((result.similarity[tap] - expected).abs()) < 1e-6
    assert float((alignment(held, noised, y, "forward").similarity[tap] - expected).abs()) > 1e-4
    with pytest.raises(rl.LabError, match="clean"):
        alignment(held, noised, y, "forward", clean=x[:3])
