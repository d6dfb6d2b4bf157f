"""Spatial structure of features: against its definition, on features whose structure is known, and on the bundled runs."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import rrepa_lab as rl
from rrepa_lab.align.target import match_grid
from rrepa_lab.analysis import spatial
from rrepa_lab.analysis.spatial import cds, cosine_by_distance, far_distance, lds, rmsc, slope_reach
from rrepa_lab.cli import main
from rrepa_lab.data.images import Batch
from rrepa_lab.measurements.schema import check
from rrepa_lab.viz.layers import layer_curves, layer_map

TAP = "block.3.layer.2"


@pytest.fixture(scope="module")
def run():
    return rl.load("digits-reverse")


@pytest.fixture(scope="module")
def some(run):
    """A part of the test split."""
    test = run.data("test")
    return Batch(test.x[:50], test.y[:50])


def random_features(side, b=3, d=5, seed=0):
    return torch.randn(b, side * side, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_position(side):
    """Features (1, T, 4) that are nothing but the position: a point on a quarter of a circle for the row and for the column."""
    at = torch.arange(side, dtype=torch.float64) / (side - 1) * math.pi / 2
    circle = torch.stack([at.cos(), at.sin()], dim=1)
    rows, columns = circle.repeat_interleave(side, dim=0), circle.repeat(side, 1)
    return torch.cat([rows, columns], dim=1).unsqueeze(0)


def checkerboard(side):
    """Features (1, T, 1) of 1 and -1 in turn."""
    token = torch.arange(side * side)
    return (1.0 - 2.0 * ((token // side + token % side) % 2)).view(1, -1, 1)


# --- definitions -------------------------------------------------------------------------------------------------------


def pair_cosines(tokens):
    """Manhattan distance -> the cosines of all pairs of tokens (T, D) that are so far apart, pair by pair."""
    found: dict[int, list[float]] = {}
    side = math.isqrt(len(tokens))
    for i in range(len(tokens)):
        for j in range(i):
            distance = abs(i // side - j // side) + abs(i % side - j % side)
            cosine = float(tokens[i] @ tokens[j]) / math.sqrt(float(tokens[i] @ tokens[i]) * float(tokens[j] @ tokens[j]))
            found.setdefault(distance, []).append(cosine)
    return found


@pytest.mark.parametrize(("side", "far", "reach"), [(4, 2, 2), (5, 2, 3), (8, 3, 4), (16, 6, 8)])
def test_lds_and_cds_against_their_definitions(side, far, reach):
    features = random_features(side, b=2)
    assert (far_distance(side), slope_reach(side)) == (far, reach)
    for tokens, local, slope in zip(features, lds(features), cds(features), strict=True):
        cosines = pair_cosines(tokens)
        distant = [value for distance, values in cosines.items() if distance >= far for value in values]
        assert float(local) == pytest.approx(np.mean(cosines[1]) - np.mean(distant), abs=1e-10)
        distances = range(1, reach + 1)
        line = np.polyfit(distances, [np.mean(cosines[distance]) for distance in distances], 1)
        assert float(slope) == pytest.approx(-line[0], abs=1e-10)


@pytest.mark.parametrize("side", [2, 3, 6])
def test_rmsc_against_its_definition(side):
    features = random_features(side)
    for tokens, value in zip(features, rmsc(features), strict=True):
        unit = [token / token.norm() for token in tokens]
        mean = sum(unit) / len(unit)
        squares = [float((token - mean) @ (token - mean)) for token in unit]
        assert float(value) == pytest.approx(math.sqrt(sum(squares) / len(squares)), abs=1e-10)
        assert float(value) == pytest.approx(math.sqrt(1 - float(mean @ mean)), abs=1e-10)


def test_cosine_by_distance_against_its_definition(monkeypatch):
    features = random_features(5)
    mean, pairs = cosine_by_distance(features)
    for tokens, values in zip(features, mean, strict=True):
        cosines = pair_cosines(tokens)
        assert values.tolist() == pytest.approx([np.mean(cosines[distance]) for distance in range(1, 9)], abs=1e-10)
        assert pairs.tolist() == [len(cosines[distance]) for distance in range(1, 9)]
    monkeypatch.setattr(spatial, "MAX_COSINES", 1)
    torch.testing.assert_close(cosine_by_distance(features)[0], mean, atol=1e-14, rtol=0)


def test_other_distances():
    features, tokens = random_features(3, b=1), random_features(3, b=1)[0]
    cosines = pair_cosines(tokens)
    assert float(lds(features, far=4)) == pytest.approx(np.mean(cosines[1]) - np.mean(cosines[4]), abs=1e-10)
    assert float(cds(features, reach=2)) == pytest.approx(np.mean(cosines[1]) - np.mean(cosines[2]), abs=1e-10)
    line = np.polyfit(range(1, 5), [np.mean(cosines[distance]) for distance in range(1, 5)], 1)
    assert float(cds(features, reach=4)) == pytest.approx(-line[0], abs=1e-10)


# --- features whose structure is known ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [4, 7])
def test_constant_features_have_none(side):
    features = torch.tensor([0.3, -2.0, 0.7]).expand(2, side * side, 3)
    for measure in (lds, cds):
        torch.testing.assert_close(measure(features), torch.zeros(2, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(rmsc(features), torch.zeros(2, dtype=torch.float64), atol=1e-7, rtol=0)


def test_a_checkerboard():
    board = checkerboard(4)
    mean, pairs = cosine_by_distance(board)
    assert mean.tolist() == [[-1, 1, -1, 1, -1, 1]], "tokens at an even distance are alike"
    distant = float((mean[0, 1:] * pairs[1:]).sum() / pairs[1:].sum())
    assert float(lds(board)) == pytest.approx(-1 - distant)
    assert float(lds(board)) < -1
    assert float(cds(board)) == pytest.approx(-2)
    assert float(rmsc(board)) == 1.0, "as many tokens of either sign"


@pytest.mark.parametrize("side", [4, 8, 16])
def test_features_that_are_positions(side):
    features = by_position(side)
    mean = cosine_by_distance(features)[0][0]
    assert (mean.diff() < 0).all(), "the farther apart, the less alike"
    assert float(lds(features)) > 0.1
    assert float(cds(features)) > 0.01


def test_tokens_in_any_order():
    features = by_position(8)
    shuffled = torch.cat([features[:, torch.randperm(64, generator=torch.Generator().manual_seed(s))] for s in range(200)])
    assert float(lds(shuffled).mean()) == pytest.approx(0, abs=0.01)
    assert float(cds(shuffled).mean()) == pytest.approx(0, abs=0.005)
    assert lds(shuffled).abs().max() < float(lds(features)) / 2
    torch.testing.assert_close(rmsc(shuffled), rmsc(features).expand(200), atol=1e-12, rtol=0)


@pytest.mark.parametrize("measure", [lds, cds, rmsc])
def test_what_does_not_matter(measure):
    features = random_features(6)
    value = measure(features)
    rotation, _ = torch.linalg.qr(random_features(1, b=5)[:, 0])
    lengths = random_features(6, d=1, seed=1).exp()
    grid = features.unflatten(1, (6, 6))
    for other in (7 * features, 1e-20 * features, lengths * features, features @ rotation, F.pad(features, (0, 3)),
                  grid.flip(1).flatten(1, 2), grid.transpose(1, 2).flatten(1, 2)):  # fmt: skip
        torch.testing.assert_close(measure(other), value, atol=1e-12, rtol=0)
    torch.testing.assert_close(measure(features[1:2]), value[1:2], atol=1e-14, rtol=0)
    torch.testing.assert_close(measure(features.bfloat16()), value, atol=0.01, rtol=0)
    assert measure(features.float()).dtype == torch.float64


def test_a_token_of_length_zero_is_like_none():
    features = random_features(4, b=1)
    features[0, 5] = 0
    mean, pairs = cosine_by_distance(features)
    near = [float(F.cosine_similarity(features[0, i], features[0, j], dim=0))
            for i in range(16) for j in (i + 1, i + 4) if j < 16 and (j == i + 4 or j % 4)]  # fmt: skip
    assert len(near) == int(pairs[0]) == 24
    assert float(mean[0, 0]) == pytest.approx(sum(near) / 24, abs=1e-10)


# --- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [lds, cds, rmsc, cosine_by_distance])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(2, 1, 3), "features of a single token have no spatial structure: it needs at least 2x2 tokens"),
        (torch.ones(2, 17, 3), "17 tokens are not side x side; leave out tokens that stand for no patch"),
        (torch.ones(16, 3), r"features must be \(B, T, D\), none of them 0, not \(16, 3\)"),
        (torch.ones(0, 16, 3), r"not \(0, 16, 3\)"),
        (torch.ones(2, 0, 3), r"not \(2, 0, 3\)"),
        (torch.full((2, 16, 3), math.nan), "features are not finite"),
        (torch.full((2, 16, 3), math.inf), "features are not finite"),
    ],
)
def test_features_that_cannot_be_measured(measure, features, message):
    with pytest.raises(rl.LabError, match=message):
        measure(features)


def test_grids_without_distant_tokens():
    with pytest.raises(
        rl.LabError, match="3x3 tokens are too few for lds: the distance 6 on 16x16 tokens is in proportion 1 here"
    ):
        lds(torch.ones(1, 9, 2))
    with pytest.raises(
        rl.LabError, match=r"2x2 tokens are too few for cds: .*; leave cds out, or call cds\(features, reach=2\)"
    ):
        cds(torch.ones(1, 4, 2))
    assert cds(torch.ones(1, 9, 1)).tolist() == lds(torch.ones(1, 4, 1), far=2).tolist() == [0]
    far: Any
    for far in (1, 5, 2.5):
        with pytest.raises(rl.LabError, match=r"far must be .*in 2\.\.4"):
            lds(torch.ones(1, 9, 2), far)
    with pytest.raises(rl.LabError, match=r"reach must be in 2\.\.6, not 7"):
        cds(torch.ones(1, 16, 2), reach=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taps": "block.1.layer.9"}, "unknown tap 'block.1.layer.9'"),
        ({"metrics": ["ldc"]}, "unknown metric 'ldc'; did you mean"),
        ({"images": rl.Images(data=Batch(torch.zeros(0, 1, 8, 8), torch.zeros(0)))}, "there are no images to measure"),
        ({"protocol": rl.FeatureProtocol(guidance=2.0)}, "guidance belongs to the generating pass"),
    ],
)
def test_mistakes(run, settings, message):
    with pytest.raises(rl.LabError, match=message):
        rl.spatial_structure(run, **{"taps": TAP, **settings})


def test_flows_of_few_tokens(tiny):
    from rrepa_lab.runs.run import build

    names, images = [str(k) for k in range(10)], rl.Images(limit=10)
    four = build(tiny.override({"flow.patch_size": 4}), names)
    with pytest.raises(rl.LabError, match="2x2 tokens are too few for lds"):
        rl.spatial_structure(four, images=images)
    assert set(rl.spatial_structure(four, metrics=["rmsc"], images=images).protocol) == {
        "2x2 tokens", "2x2 tokens; averages of 4x4 patches"
    }  # fmt: skip
    assert four.flow.config.side == 2, "no flow has a single token"


def test_features_that_are_not_finite_are_named(run, some, monkeypatch):
    encoder = run.encoder()
    monkeypatch.setattr(type(encoder), "__call__", lambda self, x: torch.full((len(x), 16, 3), math.nan))
    with pytest.raises(rl.LabError, match="features of encoder are not finite"):
        rl.spatial_structure(run, TAP, images=rl.Images(data=some))


# --- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_holds_the_measures_of_the_features(run, some):
    table = rl.spatial_structure(run, protocol=rl.FeatureProtocol(batch=16), images=rl.Images(data=some))
    assert len(check(table)) == 17 * 3
    states = run.flow(some.x, None, "block.*.layer.*").states
    features = {"encoder": run.encoder()(some.x), **states}
    for row in table.to_dict("records"):
        values = spatial.SPATIAL_METRICS[row["metric"]](features[row["tap"]])
        assert row["value"] == pytest.approx(float(values.mean()), abs=1e-5)
        assert row["standard_error"] == pytest.approx(float(values.std()) / 50**0.5, abs=1e-5)
    assert list(table.tap.unique()) == [*states, "encoder"]
    assert table[table.tap == TAP][["block", "layer", "module_path"]].values.tolist()[0] == [
        3, 2, "blocks.2.transformer.layers.1"
    ]  # fmt: skip
    assert table[table.tap == TAP][["metric", "unit", "protocol", "n"]].values.tolist() == [
        ["lds", "cosine", "4x4 tokens, Manhattan distances: 1, and distant from 2 on", 50],
        ["cds", "cosine/token", "4x4 tokens, Manhattan distances 1..2", 50],
        ["rmsc", "", "4x4 tokens", 50],
    ]
    assert set(table.pool) == {""}
    assert set(table.encoder) == {"vit_tiny_patch16_224, bundled:digits"}
    assert table.columns.tolist() == [
        "run", "strategy", "data", "space", "encoder", "train_seed", "tap", "block", "layer", "module_path", "metric", "value",
        "unit", "standard_error", "n", "protocol", "direction", "label_fed", "guidance", "n_noise_samples", "noise_std", "pool",
        "seed", "device",
    ]  # fmt: skip


def test_tokens_are_in_image_order(run, some):
    """The tokens of an odd block, which runs through them from the last, too: their structure is that of the picture."""
    rows = rl.spatial_structure(run, "block.1.in", metrics=["lds"], baselines=False, images=rl.Images(data=some))
    patches = F.unfold(some.x, 2, stride=2).transpose(1, 2)
    assert rows.value.tolist() == pytest.approx([float(lds(patches).mean())], abs=1e-5)


def test_features_are_averaged_over_noise_samples_first(run, some):
    how = rl.FeatureProtocol(noise=rl.NoiseSamples(3, 0.2), feed_label=True)
    row = rl.spatial_structure(run, TAP, metrics=["lds"], protocol=how, images=rl.Images(data=some)).iloc[0]
    (batch,) = how.batches(run, [TAP], rl.Images(data=some))
    assert row.value == pytest.approx(float(lds(batch.states[TAP]).mean()), abs=1e-6)
    assert (row.n_noise_samples, row.noise_std, row.label_fed) == (3, 0.2, "own")


def test_along_the_generating_pass_the_encoder_sees_the_finished_sample(run):
    how = rl.FeatureProtocol("reverse", samples=30, feed_label=True, guidance=1.0, seed=2, batch=20)
    table = rl.spatial_structure(run, TAP, protocol=how).set_index(["tap", "metric"])
    labels = [k % 10 for k in range(30)]
    made = rl.sample(run, range(2, 32), labels, 1.0).images
    (batch,) = rl.FeatureProtocol("reverse", samples=30, feed_label=True, guidance=1.0, seed=2).batches(run, [TAP])
    for metric, measure in spatial.SPATIAL_METRICS.items():
        assert table.value[TAP, metric] == pytest.approx(float(measure(batch.states[TAP]).mean()), abs=1e-4)
        assert table.value["encoder", metric] == pytest.approx(float(measure(run.encoder()(made)).mean()), abs=1e-3)
    assert set(table.n) == {30}
    assert set(table.direction) == {"reverse"}


def test_a_teacher_on_another_grid(run, some, tiny):
    from rrepa_lab.runs.run import build

    fine = build(tiny.override({"flow.patch_size": 1}), run.classes)
    table = rl.spatial_structure(fine, "block.1.in", metrics=["lds"], images=rl.Images(data=some))
    assert table.protocol.tolist() == [
        "8x8 tokens, Manhattan distances: 1, and distant from 3 on",
        "8x8 tokens, Manhattan distances: 1, and distant from 3 on; interpolated from 4x4 patches",
    ]
    expected = lds(match_grid(run.encoder()(some.x), (4, 4), 8)).mean()
    assert table.value[1] == pytest.approx(float(expected), abs=1e-5)


def test_runs_without_a_teacher(run, some, trained):
    images = rl.Images(data=some)
    assert set(rl.spatial_structure(run, TAP, baselines=False, images=images).tap) == {TAP}
    plain = rl.load(trained)
    plain.config = plain.config.override({"encoder": None, "align.strategy": "none"})
    table = rl.spatial_structure(plain, "block.1.layer.1", images=images)
    assert table.tap.tolist() == ["block.1.layer.1"] * 3
    assert set(table.encoder) == {""}


def test_each_of_several_teachers_has_rows(tiny, some):
    from rrepa_lab.runs.run import build

    encoder = tiny.to_dict()["encoder"]
    two = build(tiny.override({"encoder": [encoder, {**encoder, "layer": 1}]}), [str(k) for k in range(10)])
    table = rl.spatial_structure(two, "block.1.layer.1", metrics=["lds"], images=rl.Images(data=some))
    assert table.tap.tolist() == ["block.1.layer.1", "encoder", "encoder.1"]
    assert table.value[1:].tolist() == pytest.approx([float(lds(one(some.x)).mean()) for one in two.encoders()], abs=1e-5)
    assert table.encoder[1] != table.encoder[2]


def test_one_image_has_no_standard_error(run, some):
    one = rl.Images(data=Batch(some.x[:1], some.y[:1]))
    assert rl.spatial_structure(run, TAP, images=one).standard_error.isna().all()


def test_figures(run, some):
    table = rl.spatial_structure(run, images=rl.Images(data=some))
    curves = layer_curves(table, "lds")
    drawn = {trace.name: list(trace.y) for trace in curves.data if trace.name}
    assert drawn["digits-reverse"] == table.value[(table.metric == "lds") & (table.layer > 0)].tolist()
    assert drawn["encoder"] == table.value[(table.metric == "lds") & (table.layer == 0)].tolist() * 3
    assert any("★ highest value" in note.text.replace("<br>", " ") for note in layer_map(table, "lds").layout.annotations)


def test_the_command(capsys, tmp_path):
    words = ["probe", "digits-none", "digits-reverse", "--limit", "40", "--taps", TAP, "--metrics"]
    assert main([*words, "lds,rmsc,cka", "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if row["metric"] == "lds"]
    runs = [rl.load("digits-none"), rl.load("digits-reverse")]
    expected = [rl.spatial_structure(one, TAP, metrics=["lds"], images=rl.Images(limit=40)) for one in runs]
    assert [row["value"] for row in rows] == pytest.approx([value for table in expected for value in table.value])
    assert main([*words, "lds", "--no-baselines", "--figure", str(tmp_path / "f.html")]) == 0
    text = capsys.readouterr().out
    assert f"highest lds: digits-reverse {TAP}" in text
    assert "encoder" not in text
    assert (tmp_path / "f.html").read_text().count("plotly-graph-div") == 2
