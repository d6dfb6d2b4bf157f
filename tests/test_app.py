"""The page without a browser: handlers as plain functions, the frame, and what is read from outside."""

import gc
import io
import json
import re
import shlex
import shutil
import sys
import urllib.request
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import free_port, served
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.data.pictures import from_picture, read_picture
from rrepa_lab.flow.taps import Tap
from rrepa_lab.paths import bundled
from rrepa_lab.sampling.sample import noise
from rrepa_lab.viz.html import picture_table
from rrepa_lab.viz.images import picture

gr = pytest.importorskip("gradio")
PAIR = ("digits-reverse", "digits-none")
BOTH = {"run": PAIR[0], "other": PAIR[1]}
ALONE = {"run": PAIR[1], "other": ""}


def run_code(code):
    """What a snippet of the page leaves behind."""
    left: dict = {}
    exec(compile(code.python, "view", "exec"), left)
    return left


# --- reverse path -----------------------------------------------------------------------------------------------------

START = {"choice": "3", "guidance": 1.5, "temperature": 0.8, "block": 3}


def test_the_way_is_the_trace_of_the_library():
    from tabs import reverse_path

    run = rl.load("digits-reverse")
    trajectory = reverse_path.trajectory_of(run, reverse_path.ReversePathView(seed=17, **START), "block.3.layer.2")
    expected = rl.trace(
        run, noise(run.flow, range(17, 23)), 3, "reverse", "block.*.layer.*", guidance=rl.Guidance(1.5, temperature=0.8)
    )
    assert torch.equal(trajectory.trace.states["block.3.layer.2"], expected.states["block.3.layer.2"])
    assert torch.equal(trajectory.trace.error, expected.error)
    made = rl.sample(run, range(17, 23), 3, rl.Guidance(1.5, temperature=0.8))
    assert torch.allclose(trajectory.finished, made.images, atol=1e-5)
    stages = reverse_path.strip(trajectory)
    assert list(stages) == ["noise", "after block 4", "after block 3", "after block 2", "after block 1", "finished"]
    assert torch.equal(stages["after block 1"], expected.images["block.1.in"][0])


def test_the_strip_shows_both_runs_and_marks_the_block():
    from tabs import reverse_path

    view = reverse_path.ReversePathView(**BOTH, **START, layer=2)
    strips = reverse_path.draw_trajectory(view)
    left, right, note = reverse_path.draw_features(view)
    assert strips.count("<img") == 12
    assert strips.count('class="marked"') == 2
    assert 'alt="from noise to image, digits-none, seed 0, after block 3"' in strips
    assert "features through the projector" in left
    assert "features through the projector" not in right["value"], "digits-none is not aligned"
    assert "blocks.2.transformer.layers.1" in note
    alone = reverse_path.ReversePathView(**ALONE, **START)
    assert reverse_path.draw_trajectory(alone).count("<img") == 6
    _, nothing, _ = reverse_path.draw_features(alone)
    assert nothing == gr.update(visible=False)


def test_the_cosine_of_the_way_is_that_of_the_alignment():
    """On test images the reverse features are the forward ones, so `rl.alignment` must say the same."""
    from tabs import reverse_path

    run = rl.load("digits-reverse")
    tap = "block.3.layer.2"
    view = reverse_path.ReversePathView(start=reverse_path.IMAGE, image=40, choice="any (no label)")
    trajectory = reverse_path.trajectory_of(run, view, tap)
    x = run.data("test").x[40:46]
    expected = rl.alignment(run, x, None, "forward", [tap]).similarity[tap]
    said = reverse_path.facts("digits-reverse", run, trajectory, Tap.parse(tap))
    assert f"projector {expected:.3f}" in said


def test_other_blocks_and_classes_than_the_sliders_know_are_brought_into_range(trained):
    from tabs import reverse_path

    run = rl.load(trained)  # 2 blocks x 2 layers
    assert reverse_path.tap_in(run, 4, 4).name == "block.2.layer.2"
    updates = reverse_path.fit(run, reverse_path.ReversePathView(choice="eleven", image=999, block=4, layer=4))
    assert updates["layer"].value == 2
    assert (updates["block"].maximum, updates["block"].value) == (2, 2)
    assert updates["choice"].value == "any (no label)"
    assert updates["image"].value == 359


def test_the_film_goes_from_the_noise_to_the_image(monkeypatch):
    from tabs import reverse_path

    monkeypatch.setattr(reverse_path, "SECONDS_PER_BLOCK", 0)
    assert list(reverse_path.play_blocks("digits-none")) == [4, 3, 2, 1]
    assert reverse_path.previous_block(4, "digits-none") == 4
    assert reverse_path.next_block(2) == 1


@pytest.mark.parametrize("start", ["fresh noise", "test image"])
def test_code_of_the_way_gives_its_numbers(start, tmp_path, monkeypatch):
    from tabs import reverse_path

    view = reverse_path.ReversePathView(
        **BOTH, seed=5, start=start, choice="3", image=2, guidance=1.0, temperature=0.9, block=4, layer=1
    )
    code = reverse_path.code(view)
    trajectory = reverse_path.trajectory_of(rl.load("digits-reverse"), view, "block.4.layer.1")
    made = run_code(code)["t"]
    assert torch.equal(made.states["block.4.layer.1"], trajectory.trace.states["block.4.layer.1"])
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(code.shell)[1:]) == 0
    from safetensors.torch import load_file

    stored = load_file("states.safetensors")["block.4.layer.1"]
    assert torch.equal(stored, trajectory.trace.states["block.4.layer.1"])


# --- samples ----------------------------------------------------------------------------------------------------------


def test_sheets_show_the_samples_of_the_library():
    from tabs import samples

    *_, last = samples.draw(samples.SamplesView(**BOTH, seed=7, choice="3", count=4, guidance=2.0))
    made = rl.sample(rl.load("digits-reverse"), range(7, 11), 3, 2.0)
    heading, sheet, other, _, caption = last
    scale = samples.GRID_PIXELS // 32
    shown = from_picture(sheet["value"].crop((scale, scale, 9 * scale, 9 * scale)), 1, 8)
    assert (shown[0] - made.images[0]).abs().max() < 0.01
    assert heading == "**digits-reverse**"
    assert other == "**digits-none**"
    assert sheet["alt_text"] == "4 samples of class 3 from digits-reverse"
    assert "seeds 7 to 10" in caption
    assert "Demo size" in caption


def test_sheets_fill_row_by_row(monkeypatch):
    from tabs import samples

    monkeypatch.setattr(samples, "POLL_SECONDS", 0)
    views = list(samples.draw(samples.SamplesView(**BOTH, seed=3, count=2, method="cached")))
    assert len(views) == 10
    assert "2 samples" in views[0][1]["alt_text"]
    assert "20 samples" in views[-1][1]["alt_text"]
    assert views[2][4].startswith("3 of 10 rows so far. Rows are classes")
    assert views[-1][4].startswith("Rows are classes")
    assert len({view[1]["value"].size for view in views}) == 1, "room is kept for what is to come"


def test_the_rows_of_a_run_of_other_classes_are_named():
    from tabs import samples

    def run(*classes):
        return SimpleNamespace(classes=list(classes), flow=SimpleNamespace(config=SimpleNamespace(classes=len(classes))))

    assert samples._other_rows({"one": run("cat", "dog"), "two": run("cat", "dog")}) == ""
    assert samples._other_rows({"one": run("cat", "dog"), "two": run("alp")}) == "Of two rows are classes: alp. "


def test_the_decoding_error_is_measured():
    from tabs import samples

    run = rl.load("digits-none")
    for method in ("cached", "sequential"):
        row = samples.row_of(run, 3, samples.SamplesView(count=4, guidance=1.0, method=method))
        assert 0 < row.error < 1e-4
        assert torch.allclose(row.images, rl.sample(run, range(4), 3, 1.0, method=method).images)


def test_code_of_the_samples_gives_their_images(tmp_path, monkeypatch):
    from tabs import samples

    view = samples.SamplesView(**BOTH, seed=3, count=2, guidance=1.0, temperature=0.9)
    code = samples.code(view)
    made = run_code(code)["s"]
    run = rl.load("digits-reverse")
    rows = torch.cat([samples.row_of(run, label, view).images for label in range(10)])
    assert torch.allclose(made.images, rows, atol=1e-5)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(code.shell)[1:]) == 0
    with Image.open("grid.png") as opened:
        assert opened.size == (2 * 9 * 8 + 8, 10 * 9 * 8 + 8)
        first = from_picture(opened.crop((8, 8, 72, 72)), 1, 8)
    assert (first[0] - rows[0]).abs().max() < 0.01


def test_the_zip_holds_every_image_and_says_how_it_was_made():
    from tabs import samples

    path = samples.pack(samples.SamplesView(**BOTH, seed=5, choice="7", count=3, denoise=False))
    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read("metadata.json"))
        assert [entry["seed"] for entry in about["images"] if entry["run"] == "digits-none"] == [5, 6, 7]
        assert about["denoise"] is False
        files = {entry["file"] for entry in about["images"]}
        assert files | {"metadata.json", "digits-none.png", "digits-reverse.png"} == set(archive.namelist())
        with Image.open(io.BytesIO(archive.read("digits-none/label-7-seed-6.png"))) as opened:
            x = from_picture(opened, 1, 8)
    expected = rl.sample(rl.load("digits-none"), [6], 7, denoise=False).images
    assert (x - expected).abs().max() < 0.01


# --- classify ---------------------------------------------------------------------------------------------------------


def test_verdicts_and_charts_are_those_of_the_library():
    from tabs.classify import tab as classify

    runs = {name: rl.load(name) for name in PAIR}
    x, y = runs["digits-none"].data("test")
    view = classify.ClassifyView(**BOTH, index=5)
    _, verdict = classify.draw_verdict(view)
    by_step = classify.draw_gradient(view)
    by_bayes, evidence, sure = classify.draw_bayes(view)
    expected = {name: rl.classify(run, x[5:6]) for name, run in runs.items()}
    for trace in by_step.data:
        assert np.allclose(trace.y, expected[trace.name].scores[0].tolist())
        assert f"**{trace.name}** says **{int(expected[trace.name].label)}**" in verdict
    assert f"class {int(y[5])}" in verdict
    for trace in by_bayes.data:
        bayes = rl.classify(runs[trace.name], x[5:6], "bayes")
        assert np.allclose(trace.y, bayes.scores[0].tolist(), atol=1e-3)
        assert f"{float(bayes.probability.max()):.1%} sure" in sure
    for trace in evidence.data:
        assert np.allclose(trace.z, rl.evidence(runs[trace.name], x[5:6])[0])


def test_the_ascent_stops_at_the_step_on_the_axes_of_the_whole():
    from tabs.classify import tab as classify

    x = rl.load("digits-none").data("test").x[8:9]
    path = rl.classify(rl.load("digits-none"), x, "iterated").path
    _, figure = classify.draw_ascent(classify.ClassifyView(**BOTH, index=8, step=6))
    assert len(figure.data[0].y) == 7
    best = next(trace for trace in figure.data if trace.name == str(int(path[-1].argmax())))
    assert np.allclose(best.y, path[:7, 0, int(path[-1].argmax())])
    _, whole = classify.draw_ascent(classify.ClassifyView(**BOTH, index=8))
    assert figure.layout.xaxis.range[1] == len(whole.data[0].y) - 0.5


def test_mistakes_are_those_of_the_report():
    from tabs.classify import tab as classify

    run = rl.load("digits-none")
    report = rl.classification_report(run)
    wrong = {int(row) for row in report.images.loc[~report.images["right"].astype(bool), "image"]}
    first, second, gallery, note = classify.draw_answers(classify.ClassifyView(run="digits-none", other="digits-reverse"))
    assert set(classify.matching_rows(report, "any", "any", True)) == wrong
    assert len(gallery["value"]) == len(wrong)
    assert f"**{len(wrong)} of 360**" in note
    assert first.layout.title.text.startswith("digits-none:")
    assert np.array(first.data[0].text).sum() == np.array(second.data[0].text).sum() == 360
    eights = classify.matching_rows(report, "8", "any", False)
    assert len(eights) == int((run.data("test").y == 8).sum())
    assert classify.pick(classify.ClassifyView(run="digits-none", of="8", mistakes=False), 2) == (eights[2], None)


def test_code_of_the_classification_gives_its_scores(capsys):
    from tabs.classify import tab as classify
    from tabs.classify.input import OwnPicture

    code = classify.code(classify.ClassifyView(**BOTH, index=11))
    left = run_code(code)
    assert torch.equal(left["c"].scores, rl.classify(rl.load("digits-reverse"), left["x"], "bayes").scores)
    drawn = classify.code(classify.ClassifyView(**BOTH, index=11, picture=OwnPicture([[[0.5] * 8] * 8], "your drawing", 11)))
    assert run_code(drawn)["x"].shape == (1, 1, 8, 8)
    assert main(shlex.split(code.shell)[1:]) == 0
    assert "gradient_accuracy" in capsys.readouterr().out


def test_uploads_are_turned_to_light_on_dark():
    from tabs.classify.input import from_upload

    x = rl.load("digits-none").data("test").x[0]
    light_on_dark = from_upload("digits-none", 0, picture(x, scale=10))
    dark_on_light = from_upload("digits-none", 0, picture(-x, scale=10))
    assert np.allclose(light_on_dark[0], dark_on_light[0], atol=0.02)
    assert "inverted" in dark_on_light[1]


def test_own_pictures_are_checked_against_those_of_the_run(monkeypatch):
    from tabs.classify import input as classify_input

    photos = rl.load("digits-none").config.override({
        "data.name": "folder", "data.image_size": 16, "data.channels": 3, "flow.image_size": 4, "flow.channels": 5,
        "flow.patch_size": 1, "space.kind": "small-vae", "space.weights": "vae",
    })  # fmt: skip
    monkeypatch.setattr(classify_input, "get_run", lambda name: SimpleNamespace(config=photos))
    own = classify_input.from_upload("latent", 2, Image.new("RGB", (40, 40), "red"))
    assert np.shape(own.values) == (3, 16, 16), "of a flow of latents too, what is classified is a picture"
    ink = np.full((280, 280, 4), 255, np.uint8)
    with pytest.raises(rl.LabError, match="^latent takes pictures of 3x16x16, not of 1x16x16: upload a picture instead$"):
        classify_input.from_pad("latent", 2, {"layers": [ink]})


@pytest.fixture(scope="module")
def few_classes(tmp_path_factory):
    """A folder of runs: one of a single class, and one without classes."""
    root = tmp_path_factory.mktemp("few")
    for split in ("train", "test"):
        (root / "photos" / split / "frog").mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (20 * i, 200 - 10 * i, 90)).save(root / "photos" / split / "frog" / f"{i}.png")
    for name, classes in (("one", -1), ("no-classes", 0)):
        config = rl.preset("imagefolder-none").override({
            "data.path": str(root / "photos"), "data.image_size": 8, "flow.image_size": 8, "flow.patch_size": 4,
            "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 1, "flow.classes": classes,
            "train.steps": 2, "train.batch": 4, "train.warmup": 0,
        })  # fmt: skip
        assert list(rl.train(config, root / "runs" / name, device="cpu"))
    return root / "runs"


@pytest.mark.parametrize("name", ["one", "no-classes"])
def test_runs_of_one_class_and_of_none_are_drawn(few_classes, monkeypatch, name):
    from server.runs import class_choices, get_run
    from tabs import reverse_path
    from tabs.classify import tab as classify
    from tabs.classify.input import subject_of

    monkeypatch.setenv("RREPA_RUNS", str(few_classes))
    run = get_run(name)
    view = classify.ClassifyView(run=name, other="", index=0, picture=None)
    assert "frog" in subject_of(name, 0, None).name
    if name == "one":
        assert "says **frog** ✓, its only class" in classify.draw_verdict(view)[1]
        assert classify.draw_gradient(view).data
        assert "**one** by Bayes' rule: frog, 100.0% sure" in classify.draw_bayes(view)[2]
        assert classify.draw_ascent(view)[0].data
        assert "**0 of 8**" in classify.draw_answers(view)[3]
    else:
        with pytest.raises(rl.LabError, match="trained without classes: there is nothing to classify"):
            classify.draw_verdict(view)
        assert classify.draw_gradient(view) is None
        assert classify.draw_bayes(view) == (None, None, "")
        assert classify.draw_ascent(view) == (None, None)
        assert classify.draw_answers(view)[3] == ""
    choice = class_choices(run)[-1]
    assert "after block 1" in reverse_path.draw_trajectory(reverse_path.ReversePathView(run=name, other="", choice=choice))


# --- handlers, views and links ------------------------------------------------------------------------------------------


def test_mistakes_become_notices(page_runs, monkeypatch):
    from server.handlers import show_errors, with_model_lock
    from server.runs import get_run
    from tabs.classify.input import from_pad, from_upload

    monkeypatch.setenv("RREPA_RUNS", str(page_runs))
    assert show_errors(from_pad)("digits-none", 0, {"layers": [np.zeros((280, 280, 4), np.uint8)]}) is None
    with pytest.raises(gr.Error, match="no picture yet"):
        show_errors(from_upload)("digits-none", 0, None)
    for name in ("../../etc", "/etc", "", str(bundled("assets") / "runs" / "digits-none")):
        with pytest.raises(gr.Error, match="no run"):
            with_model_lock(get_run)(name)
    with pytest.raises(gr.Error, match="^'damaged/model.safetensors is damaged"):  # by name: no folder of this machine
        with_model_lock(get_run)("damaged")

    @with_model_lock
    def slowly():
        yield 1
        raise rl.LabError("half way")

    values = slowly()
    assert next(values) == 1
    with pytest.raises(gr.Error, match="half way"):
        next(values)


def test_samples_stand_for_images_that_are_not_at_hand(trained, tmp_path, monkeypatch):
    from page import sidebar
    from server.runs import get_run, test_code, test_images
    from tabs import reverse_path
    from tabs.classify import tab as classify
    from tabs.classify.input import subject_of
    from tabs.map import tab as feature_map

    monkeypatch.setenv("RREPA_RUNS", str(tmp_path))
    shutil.copytree(trained, tmp_path / "moved")
    path = tmp_path / "moved" / "config.json"
    about = json.loads(path.read_text())
    about["config"]["data"] |= {"name": "folder", "path": str(tmp_path / "gone")}
    path.write_text(json.dumps(about))
    run = get_run("moved")
    x, y = test_images(run)
    assert y.tolist() == [*range(10)] * 10
    names = {"rl": rl, "run": run}
    assert torch.equal(eval(test_code("moved"), names), x)  # the code of the view gives them
    assert subject_of("moved", 13, None).name == "sample 13, class 3"
    assert "the test images of folder gone are not at hand: 100 samples stand for them" in sidebar.about_run("moved")
    # every tab fits it, and draws
    slider = classify.fit(run, classify.ClassifyView(run="moved", index=999))["index"]
    assert (slider.maximum, slider.value, slider.label) == (99, 99, "Sample")
    assert classify.fit(get_run("digits-none"), classify.ClassifyView())["index"].label == "Test image"
    note = classify.draw_answers(classify.ClassifyView(run="moved", other=""))[-1]
    assert note == "Nothing to show: the test images of folder gone are not at hand."
    assert reverse_path.fit(run, reverse_path.ReversePathView())["image"].maximum == 99
    assert feature_map.fit(run, feature_map.FeatureMapView())["images"]["value"] == "generated by class"
    assert "images" not in feature_map.fit(get_run("digits-none"), feature_map.FeatureMapView())


def test_a_run_is_kept_until_its_weights_change(trained, tmp_path, monkeypatch):
    import os

    from server.runs import get_run

    monkeypatch.setenv("RREPA_RUNS", str(tmp_path))
    shutil.copytree(trained, tmp_path / "mine")
    first = get_run("mine")
    assert get_run("mine") is first
    weights = tmp_path / "mine" / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert get_run("mine") is not first


def test_the_lock_is_free_while_a_value_is_shown():
    import threading

    from server.handlers import model_lock, with_model_lock

    @with_model_lock
    def values():
        yield "first"
        yield "second"

    shown = values()
    next(shown)
    taken = []

    def take():
        if model_lock.acquire(timeout=5):
            model_lock.release()
            taken.append(True)

    other = threading.Thread(target=take)
    other.start()
    other.join()
    assert taken == [True]


def test_controls_are_read_back_from_a_link():
    from page.views import check, from_text, to_text

    slider, box = gr.Slider(0, 5, 1, step=0.1), gr.Checkbox()
    choice, several = gr.Dropdown(["a b", "c"]), gr.CheckboxGroup(["x", "y"])
    for control, value in ((slider, 2.5), (slider, 3), (box, True), (box, False), (choice, "a b"), (several, ["x", "y"])):
        assert from_text(control, to_text(value)) == value
        check(control, value)
    for control, text in ((slider, "much"), (slider, "nan"), (slider, "1e999"), (box, "on")):
        with pytest.raises(ValueError, match=text):
            from_text(control, text)
    for control, text in ((slider, "9"), (choice, "../d"), (several, "x|z")):
        with pytest.raises((ValueError, gr.Error)):
            check(control, from_text(control, text))


# the parameters of links since the first version: links that visitors have kept must go on working
PARAMETERS = {
    "reverse-path": "start class image guidance temperature block layer",
    "layers": "metric read source strategies study a-strategy a-blocks a-layer a-rest b-strategy b-blocks b-layer b-rest",
    "intervene": "images target source action part block layer tokens strength towards keep",
    "classify": "image step by of said mistakes",
    "samples": "class count guidance temperature denoise method",
    "map": "read method block layer image neighbours distance",
    "training": "name preset blocks layer lambda steps more show along tap",
}


@pytest.fixture(scope="module")
def built():
    """The tabs of the page by name, as `build` returns them."""
    import tabs
    from page.sidebar import build_sidebar

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # gradio leaves event loops unclosed
        with gr.Blocks(analytics_enabled=False):
            sidebar, _ = build_sidebar()
            made = {module.NAME: module.build(sidebar) for module in tabs.load()}
        gc.collect()
    return made


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_fields_of_a_view_are_its_controls_and_its_link(built, name):
    from urllib.parse import parse_qs

    from page.views import from_text, make_view, query_of

    tab = built[name]
    assert list(tab.linked) == PARAMETERS[name].split()
    view = tab.view(**ALONE, seed=3)
    query = {key: text for key, (text,) in parse_qs(query_of(name, view)[1:], keep_blank_values=True).items()}
    assert [query.pop(key) for key in ("tab", "run", "compare", "seed")] == [name, "digits-none", "nothing", "3"]
    assert list(query) == PARAMETERS[name].split()
    names = {control: field for field, control in tab.controls.items()}
    restored = {names[control]: from_text(control, query[parameter]) for parameter, control in tab.linked.items()}
    assert make_view(tab.view, {"run": view.run, "other": None, "seed": 3.0} | restored) == view
    for field, control in tab.controls.items():  # the defaults of the page are those of the view
        value = tuple(control.value) if isinstance(control.value, list) else control.value
        assert value == getattr(tab.view(), field) or (name, field) == ("training", "tap")


def test_a_tab_names_its_controls_by_the_fields_of_its_view(built):
    from dataclasses import replace

    from page.panels import Panel

    tab = built["samples"]
    with pytest.raises(ValueError, match="SamplesView"):
        replace(tab, controls={"amount": tab.controls["count"]})
    with pytest.raises(ValueError, match="redraw_on"):
        replace(tab, panels=[Panel([], tab.panels[0].draw, ["amount"])])


def test_emptied_controls_have_their_default():
    from page.views import make_view
    from tabs.samples import SamplesView

    view = make_view(SamplesView, {"count": None, "guidance": 2, "other": None, "seed": 4})
    assert view == SamplesView(other="", seed=4, guidance=2.0)
    assert type(view.guidance) is float


@pytest.mark.parametrize("seed", [None, -5, 2**31])
def test_a_seed_out_of_range_is_reported(seed):
    from page.views import SeedError, checked_seed, make_view
    from tabs.samples import SamplesView

    assert checked_seed(2**31 - 1) == 2**31 - 1
    with pytest.raises(SeedError, match="the seed"):
        make_view(SamplesView, {"seed": seed})


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_seed_out_of_range_is_reported_once_for_a_tab(built, name, monkeypatch):
    from page.panels import describing, drawing

    reported, tab = [], built[name]
    monkeypatch.setattr(gr, "Warning", lambda message, **more: reported.append(message))
    values = {component: component.value for component in tab.components.values()} | {tab.sidebar.seed: -5}
    for panel in tab.panels:
        drawn = drawing(tab, panel, lambda _: True)(values)
        drawn = drawn if isinstance(drawn, dict | tuple) else list(drawn)[-1]
        for output, update in zip(panel.outputs, drawn if isinstance(drawn, tuple) else [drawn], strict=True):
            assert "value" not in update or update["value"] is None, output
    assert reported == []
    assert describing(name, tab, lambda _: True, lambda _: True)(values) == gr.skip()
    (message,) = reported
    assert message == "the seed must be a whole number from 0 to 2147483647, not -5"


class Request:
    """A request of a browser, with what the page reads of it."""

    def __init__(self, **query):
        self.query_params = query


@pytest.fixture
def restored(built, monkeypatch):
    """Restore a link: (updates by tab and name of the control, updates of the page, warnings)."""
    from page import links
    from page.panels import Page

    warnings = []
    monkeypatch.setattr(gr, "Warning", lambda message, **more: warnings.append(message))
    sidebar = next(iter(built.values())).sidebar
    redraw = {name: f"redraw {name}" for name in built}
    page = Page(built, sidebar, "about", "status", "tab bar", "active", redraw, "fitted run")

    def restore(**query):
        warnings.clear()
        updates = links.restoring(page, lambda: 1)("reverse-path", Request(**query))
        controls = {control: (name, field) for name, tab in built.items() for field, control in tab.controls.items()}
        own = {controls[one]: update for one, update in updates.items() if one in controls}
        return own, {one: update for one, update in updates.items() if one not in controls}, list(warnings)

    return restore


def test_a_link_fits_each_tab_once_and_restores_its_controls(built, restored, monkeypatch):
    calls = []
    for name, tab in built.items():
        if tab.fit:
            fit = tab.fit
            monkeypatch.setitem(tab.__dict__, "fit", lambda *args, fit=fit, name=name: calls.append(name) or fit(*args))
    query = {"tab": "samples", "run": "digits-none", "compare": "nothing", "seed": "7", "class": "3", "guidance": "1.5"}
    own, page, warnings = restored(**query, denoise="no")
    assert sorted(calls) == sorted(name for name, tab in built.items() if tab.fit)
    assert warnings == []
    assert (own["samples", "guidance"], own["samples", "denoise"]) == (1.5, False)
    assert own["samples", "choice"].value == "3"
    assert page["tab bar"].selected == "samples"
    assert "redraw reverse-path" not in page, "the tab of the link is drawn once it has opened"
    sidebar = built["samples"].sidebar
    assert (page[sidebar.run].value, page[sidebar.other].value, page[sidebar.seed]) == ("digits-none", "", 7)


def test_what_a_link_cannot_restore_is_reported_in_one_notice(restored):
    own, page, (warning,) = restored(
        tab="map", run="nobody", compare="nobody", seed="-1", read="imagined", block="nan", layer="99", neighbours="80"
    )  # fmt: skip
    for part in ("no run 'nobody'", "seed cannot be '-1'", "read cannot be 'imagined'", "neighbours cannot be '80'"):
        assert part in warning
    assert "block cannot be 'nan'" in warning
    assert own["map", "layer"]["value"] == 4, "a layer is brought into the range of the run"
    assert ("map", "images") not in own
    _, page, (warning,) = restored(tab="nowhere")
    assert warning == "Not in this page: no tab 'nowhere'."
    assert page["redraw reverse-path"] == 1


def test_pictures_in_a_table_are_described_and_escaped():
    x = torch.zeros(1, 8, 8)
    table = picture_table({"<b>": {"first": x, "second": x}}, "a & b", "second", "image")
    assert 'alt="image, &lt;b&gt;, first"' in table
    assert "a &amp; b" in table
    assert table.count("marked") == 1
    with pytest.raises(rl.LabError, match="no pictures"):
        picture_table({})


def test_long_names_under_pictures_have_room_and_break_at_underscores():
    x = torch.zeros(1, 8, 8)
    assert 'class="strip"' in picture_table({"": {"1. 3, 0.98": x, "after block 4": x}})
    table = picture_table({"": {"1. 3, 0.98": x, "2. German_shepherd, 0.97": x}})
    assert 'class="strip wide"' in table
    assert "<figcaption>2. German_<wbr>shepherd, 0.97</figcaption>" in table


@pytest.mark.slow
@pytest.mark.parametrize("tab", PARAMETERS)
def test_every_tab_launches_alone(tab, tmp_path):
    port = free_port()
    command = [sys.executable, str(bundled("app") / "demo.py"), "--tab", tab, "--port", str(port)]
    with (
        served(command, f"http://127.0.0.1:{port}", tmp_path),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as page,
    ):
        tabs = [part["props"].get("id") for part in json.load(page)["components"] if part["type"] == "tabitem"]
    assert [name for name in tabs if name] == [tab]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run-dir", "nowhere"], "is no folder"),
        (["--device", "tpu"], "unknown device"),
        (["--auth", "me"], "USER:PASSWORD"),
        (["--mcp"], "gradio\\[mcp\\]"),
        (["--tab", "sample"], "invalid choice: 'sample' \\(choose from '?reverse-path"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message, monkeypatch, capsys):
    import demo

    monkeypatch.setattr(sys, "argv", ["demo.py", *flags])
    monkeypatch.setitem(sys.modules, "mcp", None)  # as where it is not installed
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


# --- pictures from outside --------------------------------------------------------------------------------------------


def digit(size=80):
    return picture(rl.load("digits-none").data("test").x[2], scale=size // 8)


def save(path, image, **more):
    image.save(path, **more)
    return path


def test_pictures_of_every_kind_are_read_alike(tmp_path):
    plain = digit()
    x = from_picture(plain, 1, 8)
    sixteen = Image.fromarray((np.asarray(plain).astype(np.uint16)) * 257)
    clear = plain.convert("RGBA")
    clear.putalpha(Image.fromarray((np.asarray(plain) < 128).astype(np.uint8) * 255))  # light parts transparent: white
    kinds = {
        "grey.png": plain, "sixteen.png": sixteen, "sixteen.tiff": sixteen, "cmyk.jpg": plain.convert("CMYK"),
        "palette.png": plain.convert("P"), "picture.webp": plain.convert("RGB"), "one.gif": plain,
    }  # fmt: skip
    for name, image in kinds.items():
        lossless = {"lossless": True} if name.endswith("webp") else {}
        read = read_picture(save(tmp_path / name, image, **lossless))
        assert read.mode == "RGB"
        assert (from_picture(read, 1, 8) - x).abs().max() < 0.04, name
    read = np.asarray(read_picture(save(tmp_path / "clear.png", clear)))
    assert read[np.asarray(plain) >= 128].min() == 255


def test_a_camera_s_turn_is_undone(tmp_path):
    turned = digit().rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "photo.jpg", turned, exif=exif, quality=95)
    x = from_picture(read_picture(path), 1, 8)
    assert (x - from_picture(digit(), 1, 8)).abs().max() < 0.1


def test_a_photo_of_twenty_megapixels_is_read(tmp_path):
    path = save(tmp_path / "photo.jpg", digit().resize((5000, 4000)), quality=80)
    assert from_picture(read_picture(path), 1, 8).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"just text, whatever its name", "is not a picture"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "cannot be read|is not a picture"),
    ],
)
def test_files_that_are_no_pictures_are_told(content, message, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(rl.LabError, match=f"x.png {message}"):
        read_picture(path)


def test_a_broken_off_picture_and_a_bomb_are_told(tmp_path, monkeypatch):
    whole = save(tmp_path / "whole.png", digit(800)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(rl.LabError, match="half.png is a picture that cannot be read to its end"):
        read_picture(tmp_path / "half.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(rl.LabError, match="whole.png is too large"):
        read_picture(tmp_path / "whole.png")


def test_classify_leaves_out_a_run_of_other_classes_and_says_so(monkeypatch):
    from tabs.classify.tab import ClassifyView, draw_bayes, draw_verdict

    photos = rl.load("digits-none")
    photos.classes = [f"class {number}" for number in range(10)]
    monkeypatch.setattr("server.runs.get_run", lambda name: photos if name == "photos" else rl.load(name))
    _, both = draw_verdict(ClassifyView("digits-reverse", "digits-none"))
    _, one = draw_verdict(ClassifyView("digits-reverse", "photos"))
    assert "**digits-none** says" in both
    assert "**photos** says" not in one
    assert one.endswith("**photos** is left out: it has other classes.")
    assert "photos" not in draw_bayes(ClassifyView("digits-reverse", "photos"))[2]
