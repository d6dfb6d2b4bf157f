"""Probes, similarities and embeddings: against their definitions, by hand, and on the bundled runs."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import rrepa_lab as rl
from rrepa_lab.align.similarity import patch_cosine
from rrepa_lab.align.target import match_grid
from rrepa_lab.analysis.embed import fit_umap, pca
from rrepa_lab.analysis.features import concatenate
from rrepa_lab.analysis.kernels import cka, cknna, hsic, mutual_knn
from rrepa_lab.analysis.probe_fit import fit_knn, fit_linear
from rrepa_lab.data.images import Batch
from rrepa_lab.errors import LabError
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.sampling.sample import noise
from rrepa_lab.studies.reading import (
    ALIGNED_LAYER,
    CLASSES,
    LAYERS,
    PHOTOGRAPHS,
    READINGS,
    evidence,
    levels,
    load_table,
    photographs,
    reading_verdicts,
)  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return rl.load("digits-reverse")


@pytest.fixture(scope="module")
def some(run):
    """Small parts of the training and test splits."""
    train, test = run.data("train"), run.data("test")
    return Batch(train.x[:300], train.y[:300]), Batch(test.x[:100], test.y[:100])


TAP = "block.4.layer.2"


def splits(some):
    return {"train": some[0], "test": some[1]}


# --- features ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "all"])
def test_features_are_the_states_pooled(run, some, pool):
    x, y = some[1]
    states = run.flow(x, None, TAP).states[TAP]
    read = concatenate(rl.FeatureProtocol(pool=pool, batch=32).batches(run, [TAP], rl.Images(data=some[1])))
    expected = states.mean(dim=1) if pool == "mean" else states.flatten(1)
    torch.testing.assert_close(read.features[TAP], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(read.y, y)
    assert torch.equal(read.x, x)


def test_what_is_fed_is_what_was_said(run, some):
    x, y = some[1]
    images = rl.Images(data=some[1])
    fed = concatenate(rl.FeatureProtocol(feed_label=True).batches(run, [TAP], images)).features[TAP]
    torch.testing.assert_close(fed, run.flow(x, y, TAP).states[TAP].mean(dim=1), atol=1e-5, rtol=1e-5)
    protocols = (
        rl.FeatureProtocol(noise=rl.NoiseSamples(std=0.2, seed=seed), batch=batch)
        for seed, batch in ((1, 256), (1, 7), (2, 256))
    )
    noisy, again, other = (concatenate(how.batches(run, [TAP], images)).features[TAP] for how in protocols)
    torch.testing.assert_close(noisy, again, atol=1e-5, rtol=1e-5)  # the noise of an image does not depend on its company
    assert (noisy - other).abs().max() > 1e-2


def test_generated_features_are_those_of_the_pass_that_made_the_sample(run):
    how = rl.FeatureProtocol("reverse", feed_label=True, guidance=1.5, samples=12, seed=5)
    read = concatenate(how.batches(run, [TAP]))
    labels = torch.arange(12) % 10
    z = noise(run.flow, range(5, 17))
    states = run.flow.inverse(z, labels, 1.5, taps=TAP).states[TAP]
    torch.testing.assert_close(read.features[TAP], states.mean(dim=1), atol=1e-5, rtol=1e-5)
    made = rl.sample(run, range(5, 17), labels.tolist(), 1.5)
    torch.testing.assert_close(read.x, made.images, atol=1e-5, rtol=1e-5)
    assert torch.equal(read.y, labels)


# --- probes -----------------------------------------------------------------------------------------------------------


def test_probes_agree_with_probes_made_by_hand(run, some):
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    table = rl.probe(run, ["block.2.layer.1", TAP], data=splits(some)).set_index(["tap", "metric"])["value"]
    (train, y_train), (test, y_test) = some
    for tap in ("block.2.layer.1", TAP):
        a, b = (run.flow(x, None, tap).states[tap].mean(dim=1).numpy() for x in (train, test))
        scaler = StandardScaler().fit(a)
        linear = LogisticRegression(max_iter=2000).fit(scaler.transform(a), y_train.numpy())
        assert table[tap, "linear_accuracy"] == pytest.approx(linear.score(scaler.transform(b), y_test.numpy()), abs=0.011)
        near = KNeighborsClassifier(5, metric="cosine").fit(a, y_train.numpy())
        assert table[tap, "knn_accuracy"] == pytest.approx(near.score(b, y_test.numpy()), abs=0.011)
    pixels = KNeighborsClassifier(5, metric="cosine").fit(train.flatten(1).numpy(), y_train.numpy())
    assert table["pixels", "knn_accuracy"] == pytest.approx(pixels.score(test.flatten(1).numpy(), y_test.numpy()))
    encoder = run.encoder()
    a, b = (encoder(x).mean(dim=1) for x in (train, test))
    by_hand = float((fit_linear(a, y_train, b) == y_test).double().mean())
    assert table["encoder", "linear_accuracy"] == pytest.approx(by_hand, abs=0.011)


def test_every_choice_is_a_column(run, some):
    how = rl.FeatureProtocol(pool="all", noise=rl.NoiseSamples(std=0.1, seed=3), seed=3)
    table = rl.probe(run, TAP, probes=["knn"], data=splits(some), protocol=how, fit=rl.ProbeFit(neighbours=7))
    row = table[table.tap == TAP].iloc[0].to_dict()
    expected = {
        "run": "digits-reverse", "strategy": "reverse", "train_seed": 0, "block": 4, "layer": 2, "n": 100, "n_train": 300,
        "module_path": "blocks.3.transformer.layers.1", "metric": "knn_accuracy", "direction": "forward", "label_fed": "none",
        "guidance": 0.0, "n_noise_samples": 1, "noise_std": 0.1, "pool": "all", "probe": "7-NN, cosine", "seed": 3,
        "device": "cpu",
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert row["standard_error"] == pytest.approx(np.sqrt(row["value"] * (1 - row["value"]) / 100))


def test_the_torch_solver_finds_what_scikit_learn_finds(run, some):
    taps = ["block.1.layer.1", TAP]
    settings = {"probes": ["linear"], "data": splits(some), "protocol": rl.FeatureProtocol(batch=50), "baselines": False}
    exact = rl.probe(run, taps, fit=rl.ProbeFit(solver="sklearn"), **settings)
    ours = rl.probe(run, taps, fit=rl.ProbeFit(solver="torch", epochs=25), **settings)
    assert list(ours.tap) == list(exact.tap)
    assert (ours.value - exact.value).abs().max() < 0.08
    assert ours.value.min() > 0.5
    once, again = (rl.probe(run, TAP, fit=rl.ProbeFit(solver="torch", epochs=2), **settings) for _ in range(2))
    assert once.equals(again)


def test_the_torch_solver_reads_each_batch_once_for_all_layers(run, some, monkeypatch):
    read = list[int]()
    forward = type(run.flow).forward

    def counted(self, x, *rest):
        read.append(len(x))
        return forward(self, x, *rest)

    monkeypatch.setattr(type(run.flow), "forward", counted)
    fit, how = rl.ProbeFit(solver="torch", epochs=2), rl.FeatureProtocol(batch=100)
    rl.probe(run, probes=["linear"], fit=fit, protocol=how, data=splits(some))
    assert read == [100] + [100] * 6, "the test images, then two epochs of three batches, for sixteen taps"


def test_generated_images_are_scored_against_the_label_asked_for(run, some):
    how = rl.FeatureProtocol("reverse", samples=40, guidance=1.0)
    table = rl.probe(run, TAP, protocol=how, probes=["linear"], data={"train": some[0]})
    row = table[table.tap == TAP].iloc[0]
    labels = torch.arange(40) % 10
    made = rl.sample(run, range(40), labels.tolist(), 1.0).images
    train, test = (run.flow(x, None, TAP).states[TAP].mean(dim=1) for x in (some[0].x, made))
    by_hand = float((fit_linear(train, some[0].y, test) == labels).double().mean())
    assert row.value == pytest.approx(by_hand, abs=0.03)
    assert (row.direction, row.label_fed, row.guidance, row.n) == ("reverse", "none", 1.0, 40)
    assert row.value > 0.5


def test_labels_that_would_leak_are_refused_unless_forced(run, some):
    with pytest.raises(LabError, match="features that were fed the label carry it.*force=True"):
        rl.probe(run, TAP, protocol=rl.FeatureProtocol(feed_label=True))
    settings = {"probes": ["linear"], "data": splits(some), "baselines": False}
    forced = rl.probe(run, TAP, protocol=rl.FeatureProtocol(feed_label=True), force=True, **settings)
    assert forced.value.iloc[0] == 1.0, "the label is read back, which is why it was refused"
    assert forced.label_fed.iloc[0] == "own"
    made = rl.probe(run, TAP, protocol=rl.FeatureProtocol("reverse", feed_label=True, samples=20), force=True, **settings)
    assert made.label_fed.iloc[0] == "own"


def test_figure_four_in_one_call(run, some):
    runs = [rl.load("digits-none"), run]
    table = rl.probe(runs, probes=["linear"], classifiers=["gradient", "bayes"], data=splits(some), baselines=False)
    assert len(table) == 2 * (16 + 2)
    for one in runs:
        levels = table[(table.run == one.name) & (table.tap == "")].set_index("metric").value
        for method in ("gradient", "bayes"):
            right = rl.classify(one, some[1].x, method).label == some[1].y
            assert levels[f"{method}_accuracy"] == pytest.approx(float(right.double().mean()))
    best = rl.best_layer(table)
    assert list(best.run) == ["digits-none", "digits-reverse"]
    assert (best.value == table[table.layer > 0].groupby("run").value.max().loc[best.run].to_numpy()).all()


KINDS = {"protocol": rl.FeatureProtocol, "fit": rl.ProbeFit, "images": rl.Images, "umap": rl.Umap}


def grouped(settings):
    """Settings in which a group is a dict -> with the group's class, made within the test, where it raises."""
    return {name: KINDS[name](**value) if name in KINDS else value for name, value in settings.items()}


def images(count, y):
    return Batch(torch.rand(count, 1, 8, 8), torch.as_tensor(y))


BLANK = Batch(torch.zeros(6, 1, 8, 8), torch.arange(6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taps": "block.5.layer.1"}, "unknown tap 'block.5.layer.1'; did you mean 'block.4.layer.1' or"),
        ({"probes": ["quadratic"]}, "unknown probe 'quadratic'"),
        ({"classifiers": ["guess"]}, "unknown classification method 'guess'"),
        ({"protocol": {"direction": "sideways"}}, "unknown direction 'sideways'"),
        ({"protocol": {"pool": "max"}}, "unknown pool 'max'; known: mean, all"),
        ({"fit": {"solver": "lbfgs"}}, "unknown solver 'lbfgs'"),
        ({"data": {"train": images(0, [])}}, "there are no images to measure"),
        ({"data": {"test": images(0, [])}}, "there are no images to measure"),
        ({"data": {"train": images(5, [3] * 5)}}, "every label is 3: a probe needs at least two classes"),
        (
            {"data": {"train": images(5, [3] * 5)}, "fit": {"solver": "torch", "epochs": 1}, "probes": ["linear"]},
            "every label is 3",
        ),
        ({"data": {"train": BLANK}, "baselines": False}, "block.4.layer.2 over 6 training images are constant"),
        (
            {"data": {"train": images(4, [0, 1, 2, 3])}, "fit": {"neighbours": 5}, "probes": ["knn"]},
            "5 neighbours among 4 images",
        ),
        (
            {"data": {"train": images(1, [3])}, "fit": {"solver": "torch"}, "probes": ["linear"]},
            "batches of at least two images",
        ),
        (
            {"data": {"test": BLANK}, "fit": {"solver": "torch"}, "probes": ["linear"], "baselines": False},
            "over 6 images are constant",
        ),
        ({"data": {"train": images(4, [0, 1])}}, "4 images but 2 labels"),
        ({"protocol": {"guidance": 1.0}}, "guidance belongs to generated samples"),
        ({"protocol": {"direction": "reverse", "samples": 0}}, "samples must be at least 1"),
        ({"limit": 0}, "there are no images to measure"),
    ],
)
def test_probe_mistakes(run, some, settings, message):
    with pytest.raises(LabError, match=message):
        rl.probe(run, **{"taps": TAP, **grouped(settings), "data": splits(some) | settings.get("data", {})})


def test_a_flow_without_classes_has_no_label_to_condition_on(tiny):
    from rrepa_lab.runs.run import build

    plain = build(tiny.override({"align.strategy": "none", "flow.classes": 0}), [str(k) for k in range(10)])
    with pytest.raises(LabError, match="no classes to condition on"):
        rl.probe(plain, protocol=rl.FeatureProtocol("reverse"))


# --- similarity -------------------------------------------------------------------------------------------------------


def features(n, d, seed):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_cka_is_one_for_the_same_and_zero_in_the_mean_for_independent_features():
    a = features(100, 8, 0)
    rotation, _ = torch.linalg.qr(features(8, 8, 1))
    assert cka(a, a) == pytest.approx(1.0)
    assert cka(a, 3 * a @ rotation + 5) == pytest.approx(1.0)
    values = [cka(features(50, 20, 2 * k), features(50, 30, 2 * k + 1)) for k in range(60)]
    assert abs(np.mean(values)) < 0.02
    assert min(values) < 0, "an unbiased estimate falls on both sides"
    # the biased estimator, which this one replaces, is far from zero here
    k, h = features(50, 20, 0), torch.eye(50, dtype=torch.float64) - 1 / 50
    k, l = h @ (k @ k.T) @ h, h @ (features(50, 30, 1) @ features(50, 30, 1).T) @ h  # noqa: E741
    assert float((k * l).sum() / (k.norm() * l.norm())) > 0.25


def test_hsic_is_the_u_statistic_of_its_definition():
    """The mean of h(i, j, q, r) = k_ij (l_ij + l_qr - 2 l_iq) over all ordered quadruples of different rows."""
    from itertools import permutations

    k, l = (x @ x.T for x in (features(7, 3, 0), features(7, 2, 1)))  # noqa: E741
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in permutations(range(7), 4)]
    assert float(hsic(k, l)) == pytest.approx(float(sum(terms)) / len(terms))


def test_cknna_against_its_definition():
    n, k = 12, 4
    a, b = (F.normalize(features(n, d, seed), dim=1) for d, seed in ((5, 0), (3, 1)))

    def near(x):
        cosines = (x @ x.T).tolist()
        order = [sorted((j for j in range(n) if j != i), key=lambda j: -cosines[i][j]) for i in range(n)]
        return [set(row[:k]) for row in order]

    def align(x, y):
        both = [p & q for p, q in zip(near(x), near(y), strict=True)]
        kx, ky = (
            torch.tensor([[float(v[i] @ v[j]) if j in both[i] else 0.0 for j in range(n)] for i in range(n)]).double()
            for v in (x, y)
        )
        first = sum(kx[i, j] * ky[j, i] for i in range(n) for j in range(n) if i != j)
        second = kx.sum() * ky.sum() / ((n - 1) * (n - 2))
        third = 2 * sum(kx[i, j] * ky[j, q] for i in range(n) for j in range(n) for q in range(n)) / (n - 2)
        return float(first + second - third) / (n * (n - 3))

    expected = align(a, b) / np.sqrt(align(a, a) * align(b, b))
    assert cknna(a, b, k) == pytest.approx(expected, abs=1e-6)
    assert cknna(3 * a, b, k) == pytest.approx(expected, abs=1e-6), "only directions count"
    assert cknna(a, a, k) == pytest.approx(1.0)
    # with all others as neighbours it is CKA of the cosine kernels
    assert cknna(a, b, n - 1) == pytest.approx(cka(a, b), abs=1e-9)


def test_mutual_knn_against_its_definition():
    a, b = features(30, 6, 0), features(30, 6, 1)
    assert mutual_knn(a, a, 5) == 1.0
    shared = []
    for i in range(30):
        sets = []
        for x in (a, b):
            unit = F.normalize(x, dim=1)
            cosines = (unit @ unit[i]).tolist()
            sets.append(set(sorted((j for j in range(30) if j != i), key=cosines.__getitem__)[-5:]))
        shared.append(len(sets[0] & sets[1]) / 5)
    assert mutual_knn(a, b, 5) == pytest.approx(np.mean(shared))
    chance = np.mean([mutual_knn(features(100, 9, 2 * s), features(100, 9, 2 * s + 1), 10) for s in range(20)])
    assert chance == pytest.approx(10 / 99, abs=0.02)


def test_similarity_table_of_a_run_and_its_encoder(run, some):
    table = rl.similarity(run, images=rl.Images(data=some[1]), neighbours=5).set_index(["tap", "metric"])
    assert len(table) == 16 * 3 + 2
    x = some[1].x
    seen, flow = run.encoder()(x), run.flow(x, None, TAP).states[TAP]
    a, b = flow.mean(dim=1), seen.mean(dim=1)
    assert table.loc[(TAP, "cka"), "value"] == pytest.approx(cka(a, b), abs=1e-4)
    assert table.loc[(TAP, "cknna"), "value"] == pytest.approx(cknna(a, b, 5), abs=0.02)
    assert table.loc[(TAP, "mutual_knn"), "value"] == pytest.approx(mutual_knn(a, b, 5), abs=0.01)
    target = match_grid(seen, run.encoder().grid, 4)
    near = float(patch_cosine(run.projectors.project(TAP, flow), target).mean())
    assert table.loc[(TAP, "teacher_cosine"), "value"] == pytest.approx(near, abs=1e-4)
    assert set(table.other) == {"vit_tiny_patch16_224, bundled:digits"}


def test_along_the_generating_pass_the_encoder_sees_the_finished_sample(run):
    how = rl.FeatureProtocol("reverse", samples=60, feed_label=True, guidance=1.0, seed=2)
    table = rl.similarity(run, taps=TAP, protocol=how)
    labels = torch.arange(60) % 10
    states = run.flow.inverse(noise(run.flow, range(2, 62)), labels, 1.0, taps=TAP).states[TAP]
    sample = rl.sample(run, range(2, 62), labels.tolist(), 1.0).images
    expected = cka(states.mean(dim=1), run.encoder()(sample).mean(dim=1))
    assert table.set_index("metric").value["cka"] == pytest.approx(expected, abs=1e-3)
    assert set(table.direction) == {"reverse"}
    assert set(table.guidance) == {1.0}


def test_the_generating_pass_needs_no_data_set(tiny):
    """A run loaded without its images can still be measured while it generates."""
    from rrepa_lab.runs.run import build

    far = build(tiny.override({"data.name": "folder", "data.path": "nowhere"}), [str(k) for k in range(10)])
    perturb(far.flow, 0)
    taps, how = "block.1.layer.*", rl.FeatureProtocol("reverse", samples=20)
    assert rl.similarity(far, metrics=["cka"], taps=taps, protocol=how).value.notna().all()
    assert len(rl.embed(far, taps, protocol=how)) == 40
    with pytest.raises(LabError, match=f"no image folder at {Path('nowhere').absolute()}"):
        rl.similarity(far)


def test_similarity_between_two_runs(run, some):
    none, given = rl.load("digits-none"), rl.Images(data=some[1])
    same = rl.similarity(run, run, images=given, metrics=["cka", "mutual_knn"])
    assert (same.tap == same.other_tap).all()
    assert same.value.to_numpy() == pytest.approx(np.ones(len(same)))
    square = rl.similarity(run, none, taps="block.4.*", other_taps="block.[34].layer.*", images=given, metrics=["cka"])
    assert len(square) == 6 * 8
    x = some[1].x
    a, b = (one.flow(x, None, tap).states[tap].mean(1) for one, tap in ((run, "block.4.layer.1"), (none, "block.3.layer.2")))
    cell = square[(square.tap == "block.4.layer.1") & (square.other_tap == "block.3.layer.2")]
    assert cell.value.iloc[0] == pytest.approx(cka(a, b), abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taps": "block.1.layer.9"}, "unknown tap 'block.1.layer.9'"),
        ({"metrics": ["ckka"]}, "unknown metric 'ckka'; did you mean 'cka'"),
        ({"neighbours": 20}, "20 neighbours among 20 images: at most 19"),
        ({"neighbours": 0}, "0 neighbours among 20 images"),
        ({"images": {"data": images(0, [])}}, "there are no images to measure"),
        ({"images": {"data": images(3, [0, 1, 2])}}, "3 images are too few: a similarity needs at least 4"),
        (
            {"images": {"data": Batch(torch.zeros(20, 1, 8, 8), torch.zeros(20))}},
            "block.4.layer.2 over 20 images are constant",
        ),
        ({"protocol": {"guidance": 2.0}}, "guidance belongs to the generating pass"),
        ({"protocol": {"guidance": 2.0, "direction": "reverse"}}, "guidance needs a label that is fed"),
        ({"protocol": {"noise": rl.NoiseSamples(std=0.1), "direction": "reverse"}}, "noise_std belongs to real images"),
        (
            {"taps": "block.1.layer.1", "metrics": ["teacher_cosine"]},
            "a tap with a projector .run .* has: block.3",
        ),
    ],
)
def test_similarity_mistakes(run, some, settings, message):
    twenty = Batch(some[1].x[:20], some[1].y[:20])
    with pytest.raises(LabError, match=message):
        rl.similarity(run, **{"taps": TAP, "images": rl.Images(data=twenty), **grouped(settings)})


def test_metrics_refuse_what_they_cannot_measure():
    a = features(10, 3, 0)
    with pytest.raises(LabError, match="the first set are constant"):
        cka(torch.ones(10, 3), a)
    with pytest.raises(LabError, match="the second set are not finite"):
        cka(a, a / 0)
    with pytest.raises(LabError, match="of the same images, not"):
        cka(a, a[:5])


def test_a_run_without_an_encoder(trained, some):
    run = rl.load(trained)
    run.config = run.config.override({"encoder": None, "align.strategy": "none"})
    with pytest.raises(LabError, match="has no encoder"):
        rl.similarity(run, images=rl.Images(data=some[1]))


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_pca_holds_the_variance_it_says():
    a = features(200, 5, 0) * torch.tensor([10.0, 5.0, 1.0, 0.1, 0.1])
    at, explained = pca(a, 2)
    assert at.shape == (200, 2)
    centred = a - a.mean(dim=0)
    assert explained == pytest.approx(float(at.square().sum() / centred.square().sum()))
    assert explained > 0.95
    with pytest.raises(LabError, match="3 components of"):
        pca(a[:2], 3)


def test_embedding_table(run, some):
    table = rl.embed(run, ["block.1.layer.1", TAP], images=rl.Images(data=some[1]), components=3)
    assert len(table) == 200
    part = table[table.tap == TAP]
    assert list(part.image) == list(range(100))
    assert list(part.label) == [str(int(k)) for k in some[1].y]
    at, _ = pca(run.flow(some[1].x, None, TAP).states[TAP].mean(dim=1), 3)
    assert np.abs(part[["c1", "c2", "c3"]].to_numpy()) == pytest.approx(np.abs(at.numpy()), abs=1e-3)
    made = rl.embed(run, TAP, protocol=rl.FeatureProtocol("reverse", samples=12, seed=4))
    assert list(made.image) == list(range(4, 16))
    assert set(made.label) == {""}


@pytest.mark.filterwarnings("ignore")  # numba's own
def test_umap_is_reproducible_and_keeps_neighbours_together(run, some):
    a = torch.cat([features(40, 6, 0) + 8, features(40, 6, 1) - 8])
    first, second = (fit_umap(a, settings=rl.Umap(neighbours=8), seed=1) for _ in range(2))
    assert torch.equal(first, second)
    within = (first[:40] - first[:40].mean(0)).norm(dim=1).mean()
    assert (first[:40].mean(0) - first[40:].mean(0)).norm() > 2 * within
    table = rl.embed(run, TAP, "umap", images=rl.Images(data=some[1]))
    assert table.explained.isna().all()
    with pytest.raises(LabError, match="80 neighbours among 80 images: between 2 and 79"):
        fit_umap(a, settings=rl.Umap(neighbours=80))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("count", "components"), [(3, 2), (4, 3), (5, 3), (6, 2)])
def test_umap_of_very_few_images_takes_every_number_of_neighbours_it_names(count, components):
    for near in (2, count - 1):
        made = fit_umap(features(count, 6, 0), components, rl.Umap(neighbours=near))
        assert made.shape == (count, components)
        assert made.isfinite().all()
    with pytest.raises(LabError, match=f"between 2 and {count - 1}"):
        fit_umap(features(count, 6, 0), components, rl.Umap(neighbours=count))


def test_umap_of_fewer_than_three_images_is_one_line():
    with pytest.raises(LabError, match="at least 3 images, not 2"):
        fit_umap(features(2, 6, 0), settings=rl.Umap(neighbours=2))


def test_neighbours_are_the_nearest_by_cosine():
    a = features(20, 4, 0)
    table = rl.neighbours(a, a[[3, 7]], k=4, exclude=[3, 7])
    unit = F.normalize(a, dim=1)
    for query, row in ((0, 3), (1, 7)):
        cosines = (unit @ unit[row]).tolist()
        expected = sorted((j for j in range(20) if j != row), key=cosines.__getitem__)[:-5:-1]
        part = table[table["query"] == query]
        assert list(part.image) == expected
        assert list(part["rank"]) == [1, 2, 3, 4]
        assert part.cosine.to_numpy() == pytest.approx([cosines[j] for j in expected])
    assert rl.neighbours(a, a[:1], k=1).image[0] == 0, "without exclude it finds itself"
    with pytest.raises(LabError, match="20 neighbours among 19 images"):
        rl.neighbours(a, a[:1], k=20, exclude=[0])


def test_patch_colours_share_one_basis():
    a = features(3 * 16, 8, 0).view(3, 16, 8)
    colours = rl.patch_colours({"a": a, "the same, larger": 7 * a + 2, "turned over": -a}, 4)
    assert colours["a"].shape == (3, 3, 4, 4)
    torch.testing.assert_close(colours["a"], colours["the same, larger"])
    # what points the other way has the complementary colour, up to the clipping of the scale at both ends
    inner = (colours["a"] > 0.05) & (colours["a"] < 0.95)
    total = (colours["a"] + colours["turned over"])[inner]
    assert inner.float().mean() > 0.8
    assert total.std() < 0.1
    assert min(float(c.min()) for c in colours.values()) == 0.0
    assert max(float(c.max()) for c in colours.values()) == 1.0
    # three axes that hold the most variance, by singular values
    one = rl.patch_colours({"a": a}, 4)["a"].permute(0, 2, 3, 1).reshape(-1, 3)
    scores = pca(a.flatten(0, 1), 3)[0]
    for axis in range(3):
        assert abs(np.corrcoef(one[:, axis], scores[:, axis])[0, 1]) > 0.97


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({}, "no states to colour"),
        ({"a": torch.rand(1, 16, 8), "b": torch.rand(1, 16, 4)}, "different widths have no common basis: {'a': 8, 'b': 4}"),
        ({"a": torch.rand(1, 9, 8)}, "a has 9 tokens, not 4 x 4"),
        ({"a": torch.ones(1, 16, 8)}, "features of a are constant"),
    ],
)
def test_patch_colour_mistakes(states, message):
    with pytest.raises(LabError, match=message):
        rl.patch_colours(states, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "tsne"}, "unknown embedding 'tsne'; known: pca, umap"),
        ({"components": 4}, "components must be 2 or 3"),
        ({"method": "umap", "umap": {"neighbours": 100}}, "100 neighbours among 100 images"),
        ({"taps": "block.9.layer.1"}, "unknown tap"),
    ],
)
def test_embed_mistakes(run, some, settings, message):
    with pytest.raises(LabError, match=message):
        rl.embed(run, **{"taps": TAP, "images": rl.Images(data=some[1]), **grouped(settings)})


def test_knn_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.2, 1.0]])
    y = torch.tensor([0, 0, 1, 1, 1])
    assert fit_knn(a, y, torch.tensor([[5.0, 0.5], [0.5, 5.0]]), 3).tolist() == [0, 1]


def test_tables_of_both_instruments_stand_together(run, some):
    probed, similar = rl.probe(run, TAP, data=splits(some)), rl.similarity(run, taps=TAP, images=rl.Images(data=some[1]))
    both = pd.concat([probed, similar])
    assert both[["run", "tap", "block", "layer", "module_path", "metric", "value", "direction", "n"]].notna().all().all()


# --- the shipped tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-none", "digits-reverse"])
def test_shipped_tables_are_what_the_bundled_weights_give(name):
    one = rl.load(name)
    stored = load_table()
    stored = stored[(stored.run == name) & (stored.tap == "block.3.layer.2") & (stored.guidance == 0)]
    stored = stored[stored.pool == "mean"]
    stored = stored.set_index(["direction", "label_fed", "metric"]).value
    probes = rl.probe(one, "block.3.layer.2", baselines=False)
    for row in probes.itertuples():
        assert stored["forward", "none", row.metric] == pytest.approx(row.value, abs=0.01), row.metric
    for direction, fed in (("forward", False), ("reverse", False), ("reverse", True)):
        fresh = rl.similarity(one, taps="block.3.layer.2", protocol=rl.FeatureProtocol(direction, feed_label=fed))
        for row in fresh.itertuples():
            assert stored[direction, row.label_fed, row.metric] == pytest.approx(row.value, abs=0.01), (direction, row.metric)
    classes = load_table(CLASSES)
    classes = classes[(classes.run == name) & (classes.method == "gradient") & (classes.metric == "gradient_accuracy")]
    for blocks, shown in ((None, "all"), ([4], "4")):
        fresh = rl.classification_report(one, blocks=blocks).summary.value[0]
        assert classes[(classes.blocks == shown) & (classes.n_noise_samples == 0)].value.iloc[0] == pytest.approx(
            fresh, abs=0.01
        )


def test_shipped_tables_are_whole():
    names = ["digits-none", "digits-forward", "digits-detach", "digits-reverse"]
    for suffix in ("", "-seeds"):
        table = load_table(LAYERS + suffix)
        for direction in ("forward", "reverse"):
            for metric in ("linear_accuracy", "knn_accuracy", "cknna", "cka", "mutual_knn"):
                rows = table[(table.direction == direction) & (table.label_fed == "none") & (table.guidance == 0)]
                cells = rows[(rows.metric == metric) & (rows.layer > 0) & (rows.pool == "mean")]
                assert len(cells) == len(cells[["run", "tap"]].drop_duplicates()) == 4 * 16, (suffix, direction, metric)
        every = table[(table.pool == "all") & (table.metric == "linear_accuracy") & (table.layer > 0)]
        assert len(every) == len(every[["run", "tap"]].drop_duplicates()) == 4 * 16, suffix
        assert list(levels(table).run) == names
        assert list(evidence(load_table(CLASSES + suffix)).columns) == ["how", *sorted(names)]
    with pytest.raises(LabError, match="no table at"):
        load_table("nothing")


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_the_shipped_tables_of_photographs_are_whole(name):
    """Every bundled run of CIFAR-10, every layer once for each metric; an unaligned run has no projector to compare through."""
    table = load_table(name)
    names = photographs(name)
    assert list(dict.fromkeys(table.run)) == names
    for direction in ("forward", "reverse"):
        for metric in ("linear_accuracy", "knn_accuracy", "cknna", "cka", "mutual_knn", "lds", "cds", "rmsc"):
            cells = table[(table.direction == direction) & (table.metric == metric) & (table.layer > 0)]
            assert len(cells) == len(cells[["run", "tap"]].drop_duplicates()) == len(names) * 16, (direction, metric)
    aligned = table[table.metric == "teacher_cosine"]
    assert set(aligned.run) == {name for name in names if name.endswith("reverse")}
    assert set(aligned.tap) == {"block.3.layer.3", "block.4.layer.3"}
    assert set(table[table.direction == "forward"].n) == {2000}


@pytest.mark.slow
@pytest.mark.skipif("RREPA_DATA" not in os.environ, reason="CIFAR-10 is in no repository: set RREPA_DATA to its folder")
def test_the_table_of_photographs_is_what_the_bundled_weights_give():
    run, tap = rl.load("cifar10-reverse"), "block.3.layer.3"
    stored = load_table(PHOTOGRAPHS[0])
    stored = stored[(stored.run == run.name) & (stored.tap == tap) & (stored.direction == "forward")].set_index("metric").value
    images = rl.Images(limit=2000)
    fresh = pd.concat([
        rl.probe(run, tap, baselines=False, limit=2000), rl.similarity(run, taps=tap, images=images),
        rl.spatial_structure(run, tap, baselines=False, images=images),
    ])  # fmt: skip
    assert len(fresh) == len(stored)
    for row in fresh.itertuples():
        assert stored[row.metric] == pytest.approx(row.value, abs=0.02), row.metric


def test_shipped_verdicts_are_differences_of_the_shipped_means():
    table, judged = load_table(f"{LAYERS}-seeds"), load_table(f"{LAYERS}-verdicts")
    table = table[(table.direction == "forward") & (table.label_fed == "none")].set_index("strategy")
    mean, layers = table[table.pool == "mean"], table[(table.metric == "linear_accuracy") & (table.layer > 0)]

    def value(setting, metric):
        strategy, read = setting.split(", read ")
        if read in READINGS.values():
            name = next(key for key, words in READINGS.items() if words == read)
            return mean[mean.metric == f"{name}_accuracy"].value[strategy]
        if read == ALIGNED_LAYER:
            rows = mean[(mean.tap == read) & (mean.metric == ("cka" if metric == "cka" else "linear_accuracy"))]
            return rows[(rows.other != "") | (metric != "cka")].value[strategy]
        return layers[layers.pool == ("all" if "all tokens" in read else "mean")].value[strategy].max()

    assert len(judged) == 4 * 4 + 2 * 3
    for row in judged.itertuples():
        difference = value(row.better, row.metric) - value(row.than, row.metric)
        assert row.difference == pytest.approx(difference, abs=1e-4), (row.claim, row.better)
        assert row.low < row.difference < row.high
        assert row.seeds == 5


def test_a_reading_that_is_always_ahead_holds_and_one_that_is_behind_is_contradicted():
    one = load_table()
    noise = torch.randn(5, len(one), generator=torch.Generator().manual_seed(0)).numpy() / 1000
    tables = [one.assign(train_seed=seed, value=one.value + noise[seed]) for seed in range(5)]
    table = pd.concat(tables, ignore_index=True)
    judged = reading_verdicts(table).set_index("claim")
    assert set(judged.loc["One step: at least as accurate as a linear probe of the best layer (all tokens)"].outcome) == {
        "contradicted"
    }
    assert set(judged.loc["Alignment brings the aligned layer closer to the encoder"].outcome) == {"holds"}
    ahead = table.assign(value=table.value.where(table.metric != "gradient_accuracy", table.value + 0.2))
    judged = reading_verdicts(ahead).set_index("claim")
    assert set(judged.loc["One step: at least as accurate as a linear probe of the best layer (all tokens)"].outcome) == {
        "holds"
    }
