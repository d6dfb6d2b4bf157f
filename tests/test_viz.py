"""Figures hold the numbers they were given, with title, axes, units and a caption that says n, seed and run."""

import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

import rrepa_lab as rl
from rrepa_lab.data.images import Batch
from rrepa_lab.errors import LabError
from rrepa_lab.sampling.sample import noise
from rrepa_lab.studies.reading import over_seeds
from rrepa_lab.viz import charts, classes, layers, routing, spaces, training, widgets
from rrepa_lab.viz.theme import COLOURS, INK, styled


def layer_table(runs=("digits-none", "digits-reverse"), seeds=(0,), metric="linear_accuracy"):
    """A small table in the layout of rl.probe, with known values."""
    rows = [
        {
            "run": run, "strategy": run.split("-")[1], "train_seed": seed, "tap": f"block.{t}.layer.{n}", "block": t,
            "layer": n, "module_path": f"blocks.{t - 1}.transformer.layers.{n - 1}", "metric": metric, "direction": "forward",
            "value": 0.5 + 0.1 * t + 0.01 * n + 0.2 * k + 0.002 * seed, "standard_error": 0.01, "n": 360, "n_train": 1437,
            "label_fed": "none", "guidance": 0.0, "noise_std": 0.0, "pool": "mean", "probe": "p", "seed": 0,
        }
        for k, run in enumerate(runs) for seed in seeds for t in (1, 2) for n in (1, 2, 3)
    ]  # fmt: skip
    for k, run in enumerate(runs):
        rows.append(
            rows[0] | {"run": run, "tap": "", "block": 0, "layer": 0, "metric": "gradient_accuracy", "value": 0.8 + k / 100}
        )
        rows.append(rows[0] | {"run": run, "tap": "pixels", "block": 0, "layer": 0, "value": 0.96})
    return pd.DataFrame(rows)


def words(figure: go.Figure) -> str:
    return " ".join(note.text for note in figure.layout.annotations).replace("<br>", " ")


@pytest.fixture(scope="module")
def run():
    return rl.load("digits-reverse")


@pytest.fixture(scope="module")
def batch(run):
    x, y = run.data("test")
    return Batch(x[:60], y[:60])


def test_layer_map_is_on_one_scale_with_the_best_cell_marked():
    figure = layers.layer_map(layer_table())
    assert [trace.coloraxis for trace in figure.data] == ["coloraxis", "coloraxis"]
    assert np.allclose(figure.data[0].z, [[0.61, 0.62, 0.63], [0.71, 0.72, 0.73]])
    assert figure.data[1].z[1][2] == pytest.approx(0.93)
    stars = [[bool("★" in cell) for row in trace.text for cell in row] for trace in figure.data]
    assert [sum(row) for row in stars] == [1, 1]
    assert stars[0][-1]
    assert figure.data[0].customdata[1][2] == "blocks.1.transformer.layers.2"
    assert "n = 360 real images" in words(figure)
    assert "training seed 0" in words(figure)
    assert "digits-none" in words(figure)


def test_layer_curves_have_levels_and_bands():
    one = layers.layer_curves(layer_table())
    assert [trace.name for trace in one.data if trace.showlegend is not False] == ["digits-none", "digits-reverse"]
    levels = {trace.name: trace.y[0] for trace in one.data if trace.mode == "lines+text"}
    assert levels == {"digits-none: One gradient step": 0.8, "digits-reverse: One gradient step": 0.81, "pixels": 0.96}
    assert "one gradient step without a probe, dashed: digits-none 0.800, digits-reverse 0.810" in words(one)
    assert "pixels 0.960" in one.data[-1].text
    assert "pixels" in {trace.name for trace in layers.layer_curves(layer_table(), levels=()).data}
    similar = layer_table(metric="cka")
    assert not [trace for trace in layers.layer_curves(similar[similar.tap != "pixels"], "cka").data if "step" in trace.name]
    several = layers.layer_curves(layer_table(seeds=(0, 1, 2)))
    band = next(trace for trace in several.data if trace.fill == "toself")
    assert max(band.y) - 0.732 == pytest.approx(0.002)
    mean = next(trace for trace in several.data if trace.name == "digits-none")
    assert mean.y[0] == pytest.approx(0.612)
    assert "3 training seeds, mean ± sd" in words(several)
    # the same from a table that holds the means already
    again = layers.layer_curves(over_seeds(layer_table(seeds=(0, 1, 2))))
    assert [list(trace.y) for trace in again.data] == [pytest.approx(list(trace.y)) for trace in several.data]
    assert "3 training seeds, mean ± sd" in words(again)


def test_layer_figures_refuse_what_does_not_belong_together():
    table = layer_table()
    with pytest.raises(LabError, match="no layer measured by 'cka'; it has: linear_accuracy"):
        layers.layer_map(table, "cka")
    mixed = pd.concat([table, table.assign(direction="reverse")])
    with pytest.raises(LabError, match="mixes direction forward, reverse for linear_accuracy: choose one"):
        layers.layer_curves(mixed)


def test_pair_map(run, batch):
    images = rl.Images(data=batch)
    table = rl.similarity(run, rl.load("digits-none"), other_taps="block.4.layer.*", images=images, metrics=["cka"])
    figure = layers.pair_map(table)
    assert np.shape(figure.data[0].z) == (16, 4)
    cell = table[(table.tap == "block.2.layer.3") & (table.other_tap == "block.4.layer.2")].value.iloc[0]
    assert figure.data[0].z[6][1] == pytest.approx(cell)
    with pytest.raises(LabError, match="compares no taps of two runs"):
        layers.pair_map(layer_table())


def test_class_race_draws_the_path(run, batch):
    result = rl.classify(run, batch.x[:2], "iterated", ascent=rl.Ascent(5))
    figure = classes.class_race(result, run.classes, row=1, truth=int(batch.y[1]), run="digits-reverse", top=3)
    assert len(figure.data) == 3
    winner = int(result.label[1])
    assert figure.data[0].name == str(winner)
    assert np.allclose(figure.data[0].y, result.path[:, 1, winner])
    thick = {trace.name: trace.line.width for trace in figure.data}[str(int(batch.y[1]))]
    assert thick == 4
    assert figure.layout.yaxis.title.text == "logit of the soft label"
    draws = classes.class_race(rl.classify(run, batch.x[:1], noise=3), run.classes)
    assert list(draws.data[0].x) == [1, 2, 3]
    assert draws.layout.xaxis.title.text == "noise draws averaged"


def test_confusion_and_calibration(run, batch):
    report = rl.classification_report(run, images=rl.Images(data=batch))
    figure = classes.confusion(report)
    assert np.sum(figure.data[0].text) == 60
    assert figure.layout.yaxis.title.text == "class"
    for drawn in (figure, classes.calibration(report)):
        assert "60 images" in words(drawn)
        assert "digits-reverse (training seed 0)" in words(drawn)
    assert list(classes.calibration(report).data[1].y) == list(report.calibration["accuracy"])


def test_path_strip_shows_every_stage(run):
    traces = {"one": rl.trace(run, noise(run.flow, [1, 2]), 4), "two": rl.trace(run, noise(run.flow, [1, 2]), 4, guidance=2.0)}
    figure = spaces.path_strip(traces, 1, "class 4, seed 2")
    assert len(figure.data) == 2 * 5
    titles = [note.text for note in figure.layout.annotations[:5]]
    assert titles == ["noise", "after 4", "after 3", "after 2", "image"]
    last = torch.as_tensor(np.array(figure.data[4].z))[..., 0].float() / 127.5 - 1
    assert (last - traces["one"].images["block.1.in"][1, 0].clamp(-1, 1)).abs().max() < 0.01
    assert "round-trip error: one" in words(figure)
    forward = spaces.path_strip({"x": rl.trace(run, run.data("test").x[:1], direction="forward")})
    assert [note.text for note in forward.layout.annotations[:2]] == ["image", "after 1"]


def test_feature_maps_show_the_colours(run):
    states = rl.trace(run, noise(run.flow, [1]), taps="block.4.layer.*").states
    colours = rl.patch_colours(states, 4)
    figure = spaces.feature_maps({"run": {tap: image[0] for tap, image in colours.items()}}, "seed 1")
    assert len(figure.data) == 4
    shown = torch.as_tensor(np.array(figure.data[2].z)).float() / 255
    assert (shown - colours["block.4.layer.3"][0].permute(1, 2, 0)).abs().max() < 0.01
    with pytest.raises(LabError, match="no pictures"):
        spaces.feature_maps({})


def test_embedding_scatter(run, batch):
    images = rl.Images(data=batch)
    table = rl.embed(run, "block.4.layer.2", images=images)
    figure = spaces.embedding(table, highlight=7)
    points = {trace.name: trace for trace in figure.data}
    assert len(points["3"].x) == int((batch.y == 3).sum())
    assert points["image 7"].x[0] == pytest.approx(table[table.image == 7].c1.iloc[0])
    assert len({(trace.marker.color, trace.marker.symbol) for trace in figure.data[:10]}) == 10, "colour and shape tell apart"
    assert "60 real images, no label fed" in words(figure)
    assert isinstance(spaces.embedding(rl.embed(run, "block.4.layer.2", images=images, components=3)).data[0], go.Scatter3d)
    names = [f"German_shepherd_{number}" for number in range(30)]
    many = spaces.embedding(table.assign(label=[names[row % 30] for row in range(len(table))]))
    assert many.layout.showlegend is False, "a legend of 15 lines on a phone is taller than the map"
    assert "30 classes, named where the pointer is" in words(many)
    with pytest.raises(LabError, match="a map shows one tap"):
        spaces.embedding(rl.embed(run, "block.4.layer.*", images=images))


def test_neighbour_strips_show_the_nearest_and_count_the_class(batch):
    near = rl.neighbours(batch.x.flatten(1), batch.x.flatten(1), 3, exclude=range(60))
    figure = spaces.neighbour_strips({"pixels": near, "again": near}, batch.x, batch.y, 7, "60 images")
    rows = near[near["query"] == 7]["image"].tolist()
    assert len(figure.data) == 8
    shown = torch.as_tensor(np.array(figure.data[1].z))[..., 0].float() / 127.5 - 1
    assert (shown - batch.x[rows[0], 0]).abs().max() < 0.01
    same = int((batch.y[rows] == batch.y[7]).sum())
    assert f"pixels {same} of 3, again {same} of 3; 60 images" in words(figure)


def test_bars_carry_errors_and_texts():
    figure = charts.bars({"one": 0.5, "two": 0.7}, "title", "by", "accuracy", "n = 3", [0.1, 0.2], ["a half", "more"])
    assert list(figure.data[0].y) == [0.5, 0.7]
    assert list(figure.data[0].error_y.array) == [0.1, 0.2]
    assert list(figure.data[0].text) == ["a half", "more"]
    plain = charts.bars({"one": 0.5}, "title", "by", "accuracy", "n = 3")
    assert plain.data[0].error_y.array is None
    assert plain.data[0].text is None


def test_sweep_draws_means_spreads_and_levels():
    rows = [
        {"metric": "m", "guidance": g, "kind": kind, "value": g + shift, "standard_error": 0.5}
        for g in (2.0, 0.0, 1.0) for kind, shifts in (("a", (0.0,)), ("b", (1.0, 3.0))) for shift in shifts
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    figure = charts.sweep(table, "guidance", "title", "guidance", "m", "n = 3", by="kind", levels={"best": 1.5})
    one, many, level = figure.data
    assert [trace.name for trace in figure.data] == ["a", "b", "best"]
    assert list(one.x) == [0.0, 1.0, 2.0]
    assert list(one.y) == [0.0, 1.0, 2.0]
    assert list(one.error_y.array) == [0.5, 0.5, 0.5], "alone, a row has its standard error"
    assert list(many.y) == [2.0, 3.0, 4.0]
    assert list(many.error_y.array) == pytest.approx([2**0.5] * 3), "several have their standard deviation"
    assert set(level.y) == {1.5}
    assert one.line.color != many.line.color
    dashed = charts.sweep(table[table.kind == "a"], "guidance", "title", "guidance", "m", dash="kind")
    assert dashed.data[0].line.dash == "solid"
    assert charts.sweep(table, "guidance", "t", "g", "m", dash="kind").data[1].line.dash == "dash"
    without = table[table.kind == "a"].drop(columns="standard_error")
    assert charts.sweep(without, "guidance", "t", "g", "m").data[0].error_y.array is None
    with pytest.raises(LabError, match="a sweep shows one metric, the table holds m, other"):
        charts.sweep(pd.concat([table, table.assign(metric="other")]), "guidance", "t", "g", "m")
    with pytest.raises(LabError, match="nothing to draw"):
        charts.sweep(table[:0], "guidance", "t", "g", "m")


def contrast(colour: str, ground: str) -> float:
    """WCAG contrast ratio of two #rrggbb colours."""

    def luminance(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_look_is_legible_on_light_and_dark():
    for ground in ("#ffffff", "#0b0f19"):
        assert contrast(INK, ground) > 3.5
        # lines and markers: three to one where a run is told apart by colour alone, and shapes besides
        assert sorted(contrast(colour, ground) for colour in COLOURS)[2] > 2.2
    figure = styled(go.Figure(), "title", "a caption " * 30)
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert max(map(len, figure.layout.annotations[0].text.split("<br>"))) <= 54


def test_figures_are_drawable_json(run, batch):
    """What gradio's older plotly.js and JupyterLab's newer one both draw."""
    both = {"heatmap", "scatter", "scatter3d", "bar", "image"}
    report = rl.classification_report(run, images=rl.Images(data=batch))
    drawn = [
        layers.layer_map(layer_table()),
        layers.layer_curves(layer_table()),
        classes.confusion(report),
        classes.calibration(report),
    ]
    for figure in drawn:
        parsed = json.loads(figure.to_json())
        assert {trace["type"] for trace in parsed["data"]} <= both
        assert parsed["layout"]["title"]["text"]
        assert "hsv(" not in figure.to_json()


def test_loss_and_similarity_curves():
    table = pd.DataFrame({"step": [10, 20], "nats_per_dim": [0.5, 0.4], "held_out_nats_per_dim": [float("nan"), 0.45],
                          "similarity.block.1.layer.2": [0.1, 0.2]})  # fmt: skip
    figure = training.loss_curves({"one": table, "not begun": table.iloc[:0]}, "seed 0")
    assert [trace.name for trace in figure.data] == ["one, training", "one, held out"]
    assert list(figure.data[1].x) == [20]
    assert list(figure.data[1].y) == [0.45]
    (curve,) = training.similarity_curves({"one": table}).data
    assert curve.name == "one, block.1.layer.2"
    assert list(curve.y) == [0.1, 0.2]


def test_the_atlas_leaves_unreached_places_empty():
    rows = [{"strategy": strategy, "tap": "block.1.layer.1", "group": group, "gradient_norm": norm, "n": 4, "seed": 0}
            for strategy, norm in (("forward", 0.0), ("reverse", 10.0)) for group in ("block.1.in", "block.1.out")]  # fmt: skip
    figure = routing.atlas(pd.DataFrame(rows), "block.1.layer.1")
    assert np.isnan(figure.data[0].z[0]).all()
    assert list(figure.data[0].z[1]) == [1.0, 1.0]
    assert "n = 4 test images, seed 0" in words(figure)
    with pytest.raises(LabError, match="unknown tap 'block.1.layer.2'; did you mean 'block.1.layer.1'"):
        routing.atlas(pd.DataFrame(rows), "block.1.layer.2")


def test_refinement_curves_and_costs():
    errors = pd.DataFrame([{"refinements": k, "tap": "t", "block": b, "cosine": 1.0, "relative_error": 0.1 / (k + b), "n": 4,
                            "seed": 0} for k in (0, 1) for b in (1, 2)])  # fmt: skip
    figure = routing.refinement_curves(errors, "t")
    assert [trace.name for trace in figure.data] == ["block 1", "block 2"]
    assert list(figure.data[1].y) == [0.05, 0.1 / 3]
    costs = pd.DataFrame({"strategy": ["none", "reverse"], "refinements": [0, 1], "ratio": [1.0, 1.5], "seconds": [0.1, 0.15],
                          "kept_mib": [10.0, 20.0], "images": 4, "repeats": 3})  # fmt: skip
    time, memory = routing.costs(costs).data
    assert (list(time.y), list(time.x), list(memory.x)) == (["none", "reverse, k = 1"], [1.0, 1.5], [1.0, 2.0])
    with pytest.raises(LabError, match="no strategy 'none'"):
        routing.costs(costs.iloc[1:])


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would display."""
    found: list[object] = []
    monkeypatch.setattr("IPython.display.display", lambda what, **_: found.append(what))
    monkeypatch.setattr(go.Figure, "show", lambda figure: found.append(figure))  # noqa: PLW0108
    return found


def test_explore_is_still_without_a_person_and_live_with_one(monkeypatch, shown):
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", widgets.SWITCH):
        monkeypatch.delenv(name, raising=False)

    def draw(block, run):
        if block == 3:
            raise LabError("there is no block 3")
        return go.Figure(layout={"title": f"{run} {block}"})

    widgets.explore(draw, start={"block": 2}, block=[1, 2, 3], run=["a", "b"])
    assert [figure.layout.title.text for figure in shown] == ["a 2"]

    monkeypatch.setenv("JPY_SESSION_NAME", "lab")
    assert widgets.live()
    widgets.explore(draw, start={"block": 2}, block=[1, 2, 3], run=["a", "b"])
    controls, stage = shown[-1].children
    slider, names = controls.children
    assert isinstance(stage.children[0], go.FigureWidget)
    slider.value, names.value = 1, "b"
    assert stage.children[0].layout.title.text == "b 1"
    slider.value = 3
    assert stage.children[0].value == "there is no block 3", "a mistake is told where the figure was"
    monkeypatch.setenv(widgets.SWITCH, "off")  # as a batch does
    assert not widgets.live()


def test_watch_passes_reports_on_and_draws(monkeypatch, shown):
    monkeypatch.setenv(widgets.SWITCH, "off")
    assert list(widgets.watch(range(3), lambda: go.Figure(layout={"title": "end"}))) == [0, 1, 2]
    assert [figure.layout.title.text for figure in shown] == ["end"]
    assert list(widgets.watch(range(2), go.Figure, still=False)) == [0, 1]
    assert len(shown) == 1
