"""The tab of layers: numbers of tables and of the library, best cells by path, own studies, measuring, code, and a browser."""

import base64
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from conftest import reopen

import rrepa_lab as rl
from rrepa_lab.errors import LabError
from rrepa_lab.paths import assets, runs_root
from rrepa_lab.studies.alignment import curves_of, load_study_tables, study_settings, unguided
from rrepa_lab.studies.reading import load_table
from rrepa_lab.viz.layers import layer_curves, layer_map
from rrepa_lab.viz.training import setting_curves

gr = pytest.importorskip("gradio")
from server import shipped  # noqa: E402
from tabs.layers import tab as layers  # noqa: E402
from tabs.layers import tables as layer_tables  # noqa: E402
from tabs.layers.view import CHOICES, LayersView  # noqa: E402

A, B = LayersView().choices
PINS = (*A, *B)


def view_of(pins=PINS, **values):
    return LayersView(**dict(zip(CHOICES, pins, strict=True)), **values)


def words(*args, **values):
    return layers.draw_notes(view_of(**dict(zip(("metric", "direction", "source"), args, strict=False)), **values))


def known(*args, **values):
    view = view_of(**dict(zip(("metric", "direction", "source"), args, strict=False)), **values)
    return [figure_of(plot) for plot in layers.draw_known(view)]


def compared(*args, **values):
    view = view_of(**dict(zip(("metric", "direction"), args, strict=False)), **values)
    return [figure_of(plot) for plot in layers.draw_compared(view)]


def figure_of(plot):
    return go.Figure(json.loads(plot.value["plot"], object_hook=decoded)) if plot.visible else None


def decoded(part):
    """Arrays as plotly sends them, back as lists."""
    if "bdata" not in part:
        return part
    flat = np.frombuffer(base64.b64decode(part["bdata"]), part["dtype"])
    shape = [int(size) for size in part["shape"].split(",")] if "shape" in part else [-1]
    return flat.reshape(shape).tolist()


def maps(figure):
    return {trace.name: np.array(trace.z, float) for trace in figure.data if trace.type == "heatmap"}


def grid(rows):
    return rows[rows["layer"] > 0].pivot(index="block", columns="layer", values="value").to_numpy()


# --- what every layer knows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["seeds", "bundled"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("metric", ["linear_accuracy", "knn_accuracy", "cknna", "cka", "mutual_knn"])
def test_heat_maps_show_the_rows_of_the_table(metric, direction, source):
    table = load_table(shipped.TABLES["digits"][source])
    table = table[
        (table.metric == metric) & (table.direction == direction) & (table.guidance == 0) & (table.label_fed == "none")
    ]
    table = table[table.pool == "mean"]
    figure, curves = known(metric, direction, source)
    assert list(maps(figure)) == ["digits-none", "digits-forward", "digits-detach", "digits-reverse"]
    for run, shown in maps(figure).items():
        assert np.allclose(shown, grid(table[table.run == run]))
        curve = next(trace for trace in curves.data if trace.name == run)
        assert np.allclose(curve.y, table[(table.run == run) & (table.layer > 0)].value)
    note = words(metric, direction, source)[0]
    for row in rl.best_layer(table, metric).itertuples():
        assert f"**{row.run}** block {row.block}, layer {row.layer}, `{row.module_path}`: {row.value:.4f}" in note
    assert ("± " in note) == (source == "seeds")


@pytest.mark.parametrize("metric", ["linear_accuracy", "cka", "lds"])
@pytest.mark.parametrize(
    ("run", "name", "words_of"),
    [("cifar10-reverse", "cifar10-layers", "cifar10"), ("cifar10-latent-none", "cifar10-latent-layers", "latents of cifar10")],
)
def test_photographs_have_tables_of_their_own(run, name, words_of, metric):
    """No table of digits is shown beside a run of photographs, whichever source is chosen, nor pixels beside latents."""
    table = load_table(name)
    rows = table[(table.metric == metric) & (table.direction == "forward") & (table.layer > 0)]
    for source in ("seeds", "bundled"):
        figure, _ = known(metric, source=source, run=run)
        assert list(maps(figure)) == list(dict.fromkeys(rows.run))
        assert all(np.allclose(shown, grid(rows[rows.run == one])) for one, shown in maps(figure).items())
        told = f"There is no table of several training seeds on {words_of}: this is “the bundled runs”."
        assert (told in words(metric, source=source, run=run)[0]) == (source == "seeds")
    code = layers.code(view_of(metric=metric, run=run))
    got: dict = {}
    exec(code.python, got)
    assert set(got["rows"].run) == set(rows.run)
    assert "--limit 2000" in code.shell


def test_only_the_strategies_chosen_are_shown_and_taken_away():
    figure, _ = known("cka", strategies=("reverse", "none"))
    assert list(maps(figure)) == ["digits-none", "digits-reverse"]
    file = words("cka", strategies=("reverse", "none"))[1].value["path"]
    kept = pd.read_csv(file)
    table = load_table(shipped.TABLES["digits"]["seeds"])
    table = table[(table.metric == "cka") & (table.direction == "forward") & table.strategy.isin(["reverse", "none"])]
    assert np.allclose(kept["value"], table["value"])
    assert set(kept["run"]) == {"digits-none", "digits-reverse"}


def test_what_a_run_lacks_is_told():
    figure, _ = known("teacher_cosine")
    assert list(maps(figure)) == ["digits-forward", "digits-detach", "digits-reverse"]
    assert (
        "**digits-none**: no cosine to the teacher, through the projector, because no layer was aligned"
        in (words("teacher_cosine")[0])
    )
    assert known("teacher_cosine", strategies=("none",)) == [None, None]
    assert known(strategies=()) == [None, None]
    note, download, *_ = words(strategies=())
    assert note == "Choose at least one strategy."
    assert not download.visible


# --- which layer is aligned -------------------------------------------------------------------------------------------


def test_two_settings_side_by_side():
    table, curves = load_study_tables()
    names = {"A: reverse, blocks 3,4, layer 2": "reverse, blocks 3,4, layer 2"}
    names |= {"B: detach, blocks 1,2,3,4, layer 2": "detach, blocks 1,2,3,4, layer 2"}
    pair, over, held_out, near, accuracy = compared("cka", "reverse")
    for shown, name in names.items():
        rows = unguided(table[table.run == name], "cka", "reverse")
        assert np.allclose(maps(pair)[shown], grid(rows))
    assert len({trace.coloraxis for trace in pair.data}) == 1
    # outlined: blocks 3 and 4 of A at layer 2, all four of B
    assert [(shape.x0 + 0.47, shape.y0 + 0.45) for shape in pair.layout.shapes] == [
        (1, 2), (1, 3), (1, 0), (1, 1), (1, 2), (1, 3)
    ]  # fmt: skip
    assert [trace.name for trace in over.data if trace.showlegend is not False] == [*names, "none"]
    for figure, metric in ((held_out, "held_out_nats_per_dim"), (near, "similarity")):
        part = curves[(curves.metric == metric) & (curves.run == names["A: reverse, blocks 3,4, layer 2"])]
        curve = next(trace for trace in figure.data if trace.name == "A: reverse, blocks 3,4, layer 2")
        assert np.allclose(curve.y, part.value)
    assert (accuracy is not None) == ("held_out_accuracy" in set(curves.metric))


def test_scores_of_two_settings_are_those_of_the_study():
    scores = pd.read_csv(assets() / "studies" / "digits-layer-alignment.csv")
    _, _, note, table, _ = words()
    for pins in (A, B):
        mine = scores[(scores["align.strategy"] == pins[0]) & (scores["align.blocks"] == pins[1])]
        for row in mine[mine["align.layers"] == pins[2]].itertuples():
            shown = [[float(number) for number in pair] for pair in re.findall(r"(\d\.\d+) ± (\d\.\d+)", table)]
            assert any(np.allclose(pair, (row.value, row.sd), atol=1.1e-4) for pair in shown)
            assert row.protocol in table
    assert "| training seeds (mean ± sd) | 5 | 5 |" in table
    assert "aligned at `blocks.2.transformer.layers.1`, `blocks.3.transformer.layers.1`; best at block" in note


def test_choices_follow_what_the_study_has():
    def values(*pins):
        updates = layers.narrow(view_of(pins))
        return [(update["choices"], update.get("value", text)) for update, text in zip(updates, pins, strict=True)]

    got = values("reverse", "1,2", "3", "", "none", "3,4", "2", "")
    assert [text for text, _ in got[0][0]] == ["none", "forward", "detach", "reverse"]
    assert got[1] == ([("1,2,3,4",) * 2, ("1,2",) * 2, ("3,4",) * 2], "1,2")
    assert got[2] == ([("2", "2")], "2")  # layer 3 exists for blocks 3,4 alone
    assert [value for _, value in got[4:]] == ["none", "-", "-", ""]
    assert [text for text, _ in values("reverse", "3,4", "3", "", *B)[2][0]] == ["1", "2", "3"]
    assert not any("value" in update for update in layers.narrow(view_of()))
    # what does not exist falls back, also before the lists are narrowed
    assert "**A: detach, blocks 1,2,3,4, layer 2**" in words(pins=("detach", "nine", "", "", *B))[2]
    assert "A and B are the same setting" in words(pins=(*A, *A))[2]
    assert len(maps(compared(pins=(*A, *A))[0])) == 1


def test_an_unaligned_setting_has_no_cosine():
    note = words("teacher_cosine", pins=("none", "-", "-", "", *B))[2]
    assert "**A: none**: not aligned; cosine to the teacher, through the projector on real images: no layer was aligned" in note
    pair, *_ = compared("teacher_cosine", pins=("none", "-", "-", "", *B))
    assert list(maps(pair)) == ["B: detach, blocks 1,2,3,4, layer 2"]
    assert compared("teacher_cosine", pins=("none", "-", "-", "", "none", "-", "-", ""))[:2] == [None, None]


# --- own studies ------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(trained: Path, tmp_path, monkeypatch) -> Path:
    """A folder of local runs with a study of two settings, not yet read layer by layer, and a broken one."""
    monkeypatch.setenv("RREPA_RUNS", str(tmp_path))
    study = tmp_path / "mine"
    for strategy in ("reverse", "forward"):
        folder = study / "cells" / strategy / "run"
        shutil.copytree(trained, folder)
        about = json.loads((folder / "config.json").read_text())
        about["config"]["align"]["strategy"] = strategy
        (folder / "config.json").write_text(json.dumps(about))
    lines = ["align.strategy,source,train_seed,metric,value,unit,n,protocol"]
    lines += [
        f"{strategy},x,0,nats_per_dim,{value},nats/dim,360,how" for strategy, value in (("reverse", 0.5), ("forward", 0.625))
    ]
    (study / "measurements.csv").write_text("\n".join(lines) + "\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "measurements.csv").write_text("nothing,here\n")
    return study


MINE = ("reverse", "2", "2", "", "forward", "2", "2", "")


def test_an_own_study_is_offered_by_name_and_told_what_is_missing(own):
    assert layers.study_names() == [layers.SHIPPED_STUDY, "broken", "mine"]
    _, _, note, table, download = words(study="mine", pins=MINE)
    assert "**A: reverse, block 2, layer 2**: aligned at `blocks.1.transformer.layers.1`" in note
    assert f"`python -m rrepa_lab.studies.alignment runs/{own.name}` makes it" in note
    assert "0.5000 | 0.6250" in table
    assert not download.visible
    pair, over, held_out, near, _ = compared(study="mine", pins=MINE)
    assert (pair, over) == (None, None)
    assert held_out is not None or near is not None
    curves = curves_of(own)
    part = curves[(curves.metric == "similarity") & (curves.run == "reverse, block 2, layer 2")]
    assert np.allclose(next(trace for trace in near.data if trace.name.startswith("A: ")).y, part.value)


def test_an_own_study_shows_its_layers(own):
    table, _ = load_study_tables()
    table = table[table.run == "none"].drop(columns=["align.strategy", "align.blocks", "align.layers"])
    parts = [table.assign(**row) for row in study_settings(own).to_dict("records")]
    pd.concat(parts).to_csv(own / "layers.csv", index=False)
    pair, over, *_ = compared("cka", study="mine", pins=MINE)
    assert np.allclose(maps(pair)["B: forward, block 2, layer 2"], grid(unguided(table, "cka", "forward")))
    assert over is not None
    assert "best at block" in words("cka", study="mine", pins=MINE)[2]
    code = layers.code(view_of(MINE, metric="cka", strategies=("none",), study="mine"))
    got: dict = {}
    exec(code.python, got)
    assert np.allclose(
        got["compared"].loc[got["compared"].run == "forward, block 2, layer 2", "value"], grid(unguided(table, "cka")).ravel()
    )
    assert sorted(got["scores"]["value"]) == [0.5, 0.625]


def test_a_broken_study_breaks_nothing(own):
    note, _, second, table, _ = words(study="broken")
    assert "Best layer" in note
    assert second.startswith("**This study cannot be shown:**")
    assert table == ""
    assert compared(study="broken") == [None] * 5
    assert layers.narrow(view_of(study="broken")) == [gr.skip()] * 8
    (own / "layers.csv").write_text("tap\nblock.1\n")
    assert "layers.csv is damaged: write it again by python -m rrepa_lab.studies.alignment" in words(study="mine", pins=MINE)[2]
    shutil.rmtree(own / "cells")
    os.utime(own / "measurements.csv", ns=(1, 1))
    note, table = words(study="mine", pins=MINE)[2:4]
    assert "holds no run" in note
    assert "0.5000 | 0.6250" in table


@pytest.mark.parametrize("name", ["../runs", "/etc", "", "mine/cells"])
def test_a_study_is_never_a_path(own, name):
    with pytest.raises(LabError, match="no study"):
        layers.read_study(name)
    assert "no study" in words(study=name or "nothing")[2]


def test_settings_that_differ_elsewhere_can_be_told_apart(own):
    path = own / "cells" / "again" / "run"
    shutil.copytree(own / "cells" / "reverse" / "run", path)
    about = json.loads((path / "config.json").read_text())
    about["config"]["train"]["lr"] = 0.25
    (path / "config.json").write_text(json.dumps(about))
    rest = layers.narrow(view_of(MINE, study="mine"))[3]
    assert rest["visible"]
    assert "lr 0.25" in [text for text, _ in rest["choices"]]
    assert (
        "**A: reverse, block 2, layer 2, lr 0.25**" in words(study="mine", pins=("reverse", "2", "2", "lr 0.25", *MINE[4:]))[2]
    )


# --- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture
def local(trained: Path, tmp_path, monkeypatch):
    """A small local run, read in part, with nothing measured yet."""
    monkeypatch.setenv("RREPA_RUNS", str(tmp_path))
    from tabs.layers import code as layer_code

    for module in (layer_tables, layer_code):
        monkeypatch.setattr(module, "limit_for", lambda _run: 60)
    monkeypatch.setattr(layer_tables, "_measured", {})
    shutil.copytree(trained, tmp_path / "small")
    return "small"


def test_runs_of_the_sidebar_are_measured(local):
    args = ("linear_accuracy", "forward", "measured", ())
    view = LayersView(run=local, other="", source="measured", strategies=())
    rows, (remark,) = layers.known_rows(layers.pair(local, ""), *args)
    assert rows.empty
    assert "not measured on real images yet" in remark
    assert layers.draw_notes(view)[0] == remark
    steps = list(layers.measure(replace(view, source="seeds")))
    assert [said.split(": ")[-1] for said, _, _ in steps[:-1]] == [
        "linear probes …",
        "k-NN probes …",
        "similarity to the teacher …",
        "spatial structure …",
    ]
    assert steps[-1] == ("Measured on real images: **small**.", "measured", 4)
    run = rl.load(runs_root() / local)
    expected = {
        "linear_accuracy": rl.probe(run, probes=["linear"], limit=60),
        "knn_accuracy": rl.probe(run, probes=["knn"], limit=60),
    }
    expected |= {
        metric: rl.similarity(run, images=rl.Images(limit=60)) for metric in ("cknna", "cka", "mutual_knn", "teacher_cosine")
    }
    expected |= {metric: rl.spatial_structure(run, images=rl.Images(limit=60)) for metric in ("lds", "cds", "rmsc")}
    for metric, measured in expected.items():
        table = measured[measured.metric == metric]
        figure, _ = (figure_of(plot) for plot in layers.draw_known(replace(view, metric=metric)))
        assert np.allclose(maps(figure)["small"], grid(table))
        note = layers.draw_notes(replace(view, metric=metric))[0]
        assert rl.best_layer(table, metric).iloc[0]["module_path"] in note
        code = layers.code(replace(view, metric=metric))
        assert (
            code.shell == f"rrepa-lab probe small --metrics {metric.removesuffix('_accuracy')} --direction forward --limit 60"
        )
        got: dict = {}
        exec(code.python, got)
        assert np.allclose(grid(got["rows"]), maps(figure)["small"])
    again = list(layers.measure(replace(view, measurements=4)))
    assert len(again) == 1
    assert again[0][0].startswith("Already measured")


def test_data_without_a_table_have_what_is_measured_here(local, monkeypatch):
    for module in (shipped, layers):
        monkeypatch.setattr(module, "TABLES", {})
    view = LayersView(run=local, other="")
    note = layers.draw_notes(view)[0]
    assert "There is no table of several training seeds on digits: this is “measured here”." in note
    assert "**small**: not measured on real images yet" in note
    assert [figure_of(plot) for plot in layers.draw_known(view)] == [None, None]
    assert "rl.probe(" in layers.code(view).python


def test_a_stopped_measurement_keeps_what_was_done(local):
    going = layers.measure(LayersView(run=local, other="", source="measured"))
    next(going)
    next(going)
    going.close()
    assert [kind for _, _, kind in layer_tables._measured] == ["linear"]
    rows, _ = layers.known_rows(layers.pair(local, ""), "linear_accuracy", "forward", "measured", [])
    assert len(rows)
    rows, (remark,) = layers.known_rows(layers.pair(local, ""), "cka", "forward", "measured", [])
    assert "not measured" in remark


def test_a_large_set_is_read_in_part(monkeypatch):
    run = rl.load("digits-none")
    assert layer_tables.limit_for(run) is None
    monkeypatch.setattr(rl.Run, "images", lambda *_: range(6000))
    assert layer_tables.limit_for(run) == 2000


# --- as code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "direction", "source"), [
    ("linear_accuracy", "forward", "seeds"), ("cknna", "reverse", "bundled"), ("teacher_cosine", "forward", "seeds"),
])  # fmt: skip
def test_the_code_gives_the_numbers_of_the_figures(metric, direction, source):
    code = layers.code(view_of(metric=metric, direction=direction, source=source))
    got: dict = {}
    exec(code.python, got)
    for run, shown in maps(known(metric, direction, source)[0]).items():
        assert np.allclose(shown, grid(got["rows"][got["rows"].run == run]), equal_nan=True)
    for run, shown in maps(compared(metric, direction)[0]).items():
        rows = got["compared"][got["compared"].run == run.removeprefix("A: ").removeprefix("B: ")]
        assert np.allclose(shown[~np.isnan(shown)], grid(rows).ravel())
    names = "digits-none digits-forward digits-detach digits-reverse"
    assert code.shell == (f"rrepa-lab probe {names} --metrics {metric} --direction {direction}" if source == "bundled" else "")


def test_code_without_anything_to_show_still_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("RREPA_RUNS", str(tmp_path))
    exec(layers.code(view_of(metric="cka", strategies=())).python, {})
    exec(layers.code(view_of(metric="cka", source="bundled", strategies=("none",), study="gone")).python, {})


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_title_of_its_own_leaves_the_metric_to_the_caption():
    rows = unguided(load_table(), "cka")
    for draw in (layer_map, layer_curves):
        figure = draw(rows, "cka", title="Where?")
        assert figure.layout.title.text == "Where?"
        assert "Linear CKA; " in figure.layout.annotations[-1].text
        assert draw(rows, "cka").layout.title.text.startswith("Linear CKA, ")


def test_runs_with_different_taps_share_their_axes():
    rows = unguided(load_table(), "cka")
    first = rows[(rows.run == "digits-none") & (rows.block > 2)]
    both = pd.concat([first, rows[rows.run == "digits-reverse"]])
    assert np.isnan(maps(layer_map(both, "cka"))["digits-none"][:2]).all()
    assert list(layer_curves(both, "cka").layout.xaxis.categoryarray[:5]) == ["1.1", "1.2", "1.3", "1.4", "2.1"]


def test_setting_curves_keep_the_colours_of_settings():
    table = pd.DataFrame({
        "run": ["one", "one", "two", "two"], "metric": ["a", "a", "a", "similarity"], "step": [20, 10, 10, 10],
        "value": [2.0, 1.0, 3.0, 0.5], "sd": [0.1, 0.1, 0.1, float("nan")], "train_seeds": [3, 3, 3, 1],
    })  # fmt: skip
    figure = setting_curves(table, "a")
    assert list(next(trace for trace in figure.data if trace.name == "one").y) == [1.0, 2.0]
    assert "3 training seeds" in figure.layout.annotations[0].text
    (near,) = setting_curves(table, "similarity").data
    assert near.line.color == next(trace for trace in figure.data if trace.name == "two").line.color
    with pytest.raises(LabError, match="no training recorded 'b'; recorded: a, similarity"):
        setting_curves(table, "b")


# --- a real browser ---------------------------------------------------------------------------------------------------


def choose(view, label, option):
    view.get_by_label(label, exact=True).click()
    view.get_by_role("option", name=option, exact=True).click()


@pytest.mark.browser
def test_layers_are_drawn_and_change(view):
    view.get_by_role("tab", name="Layers").click()
    view.wait_for_selector("#layer-map .heatmaplayer image")
    assert view.locator("#layer-map .heatmaplayer image").count() == 4
    view.wait_for_selector("#pair-map .shapelayer path")
    choose(view, "Measured by", layers.METRICS["cknna"])
    view.wait_for_function("document.querySelector('#layer-note').innerText.includes('CKNNA')")
    assert "blocks.3.transformer.layers" in view.locator("#layer-note").inner_text()
    choose(view, "Strategy of A", "none")
    view.wait_for_function("document.querySelector('#pair-note').innerText.includes('A: none: not aligned')")
    view.wait_for_function("document.querySelector('#a-blocks input').value == '-'")
    assert view.errors == []
    assert view.strays == []


@pytest.mark.browser
def test_layers_come_back_from_a_link_on_a_phone(view, page):
    view.set_viewport_size({"width": 390, "height": 844})
    pins = "a-strategy=forward&a-blocks=1,2&b-strategy=reverse&b-blocks=3,4&b-layer=3"
    reopen(view, f"{page}?tab=layers&metric=cka&read=reverse&strategies=none|reverse&{pins}&__theme=dark")
    view.wait_for_selector("#pair-map .heatmaplayer image")
    view.wait_for_function("document.querySelector('#b-layer input').value == '3'")
    view.wait_for_function("document.querySelector('#pair-note').innerText.includes('B: reverse, blocks 3,4, layer 3')")
    assert "A: forward, blocks 1,2, layer 2" in view.locator("#pair-note").inner_text()
    assert view.locator("#layer-map .heatmaplayer image").count() == 2
    assert view.evaluate("document.documentElement.scrollWidth") <= 390, "the page can be pushed sideways"
    assert view.errors == []
