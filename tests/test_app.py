"""The page without a browser: handlers as plain functions, the frame, and what is read from outside."""

import io
import json
import re
import shlex
import sys
import urllib.request
import zipfile
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import free_port, served
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.data.pictures import from_picture, read_picture
from rrepa_lab.paths import bundled
from rrepa_lab.sampling.sample import noise
from rrepa_lab.viz.html import picture_table
from rrepa_lab.viz.images import picture

gr = pytest.importorskip("gradio")
PAIR = ("digits-reverse", "digits-none")


def run_code(code):
    """What a snippet of the page leaves behind."""
    left: dict = {}
    exec(compile(code.python, "view", "exec"), left)
    return left


# --- reverse path -----------------------------------------------------------------------------------------------------

START = ("fresh noise", "3", 0, 1.5, 0.8, 3)


def test_the_way_is_the_trace_of_the_library():
    import reverse_path

    run = rl.load("digits-reverse")
    way = reverse_path.way_of(run, "fresh noise", 17, 0, "3", 1.5, 0.8, "block.3.layer.2")
    expected = rl.trace(run, noise(run.flow, range(17, 23)), 3, "reverse", "block.*.layer.*", guidance=1.5, temperature=0.8)
    assert torch.equal(way.trace.states["block.3.layer.2"], expected.states["block.3.layer.2"])
    assert torch.equal(way.trace.error, expected.error)
    made = rl.sample(run, range(17, 23), 3, 1.5, temperature=0.8)
    assert torch.allclose(way.finished, made.images, atol=1e-5)
    stages = reverse_path.strip(way)
    assert list(stages) == ["noise", "after block 4", "after block 3", "after block 2", "after block 1", "finished"]
    assert torch.equal(stages["after block 1"], expected.images["block.1.in"][0])


def test_the_strip_shows_both_runs_and_marks_the_block():
    import reverse_path

    strips = reverse_path.draw_way(*PAIR, 0, *START)
    left, right, said = reverse_path.draw_features(*PAIR, 0, 2, *START)
    assert strips.count("<img") == 12
    assert strips.count('class="marked"') == 2
    assert 'alt="from noise to image, digits-none, seed 0, after block 3"' in strips
    assert "features through the projector" in left
    assert "features through the projector" not in right["value"], "digits-none is not aligned"
    assert "blocks.2.transformer.layers.1" in said
    assert reverse_path.draw_way("digits-none", "", 0, *START).count("<img") == 6
    _, nothing, _ = reverse_path.draw_features("digits-none", "", 0, 2, *START)
    assert nothing == gr.update(visible=False)


def test_the_cosine_of_the_way_is_that_of_the_alignment():
    """On test images the reverse features are the forward ones, so `rl.alignment` must say the same."""
    import reverse_path

    run = rl.load("digits-reverse")
    tap = "block.3.layer.2"
    way = reverse_path.way_of(run, reverse_path.IMAGE, 0, 40, "any (no label)", 0.0, 1.0, tap)
    x = run.data("test").x[40:46]
    expected = rl.alignment(run, x, None, "forward", [tap]).similarity[tap]
    said = reverse_path.facts("digits-reverse", run, way, reverse_path.Tap.parse(tap))
    assert f"projector {expected:.3f}" in said


def test_other_blocks_and_classes_than_the_sliders_know_are_brought_into_range(trained):
    import reverse_path

    run = rl.load(trained)  # 2 blocks x 2 layers
    assert reverse_path.tap_in(run, 4, 4).name == "block.2.layer.2"
    updates = reverse_path.fit(run, "fresh noise", "eleven", 999, 0.0, 1.0, 4, 4)
    assert updates["layer"].value == 2
    assert (updates["block"].maximum, updates["block"].value) == (2, 2)
    assert updates["class"].value == "any (no label)"
    assert updates["image"].value == 359


def test_the_film_goes_from_the_noise_to_the_image(monkeypatch):
    import reverse_path

    monkeypatch.setattr(reverse_path, "PACE", 0)
    assert list(reverse_path.film("digits-none")) == [4, 3, 2, 1]
    assert reverse_path.step_back(4, "digits-none") == 4
    assert reverse_path.step_forth(2) == 1


@pytest.mark.parametrize("start", ["fresh noise", "test image"])
def test_code_of_the_way_gives_its_numbers(start, tmp_path, monkeypatch):
    import reverse_path

    values = (*PAIR, 5, start, "3", 2, 1.0, 0.9, 4, 1)
    code = reverse_path.code(*values)
    way = reverse_path.way_of(rl.load("digits-reverse"), start, 5, 2, "3", 1.0, 0.9, "block.4.layer.1")
    made = run_code(code)["t"]
    assert torch.equal(made.states["block.4.layer.1"], way.trace.states["block.4.layer.1"])
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(code.shell)[1:]) == 0
    from safetensors.torch import load_file

    stored = load_file("states.safetensors")["block.4.layer.1"]
    assert torch.equal(stored, way.trace.states["block.4.layer.1"])


# --- samples ----------------------------------------------------------------------------------------------------------


def test_sheets_show_the_samples_of_the_library():
    import samples

    *_, last = samples.draw(*PAIR, 7, "3", 4, 2.0, 1.0, True, "auto")
    made = rl.sample(rl.load("digits-reverse"), range(7, 11), 3, 2.0)
    heading, sheet, other, _, caption = last
    scale = samples.SHEET // 32
    shown = from_picture(sheet["value"].crop((scale, scale, 9 * scale, 9 * scale)), 1, 8)
    assert (shown[0] - made.images[0]).abs().max() < 0.01
    assert heading == "**digits-reverse**"
    assert other == "**digits-none**"
    assert sheet["alt_text"] == "4 samples of class 3 from digits-reverse"
    assert "seeds 7 to 10" in caption
    assert "Demo size" in caption


def test_sheets_fill_row_by_row(monkeypatch):
    import samples

    monkeypatch.setattr(samples, "BREATH", 0)
    views = list(samples.draw(*PAIR, 3, samples.EVERY, 2, 0.0, 1.0, True, "cached"))
    assert len(views) == 10
    assert "2 samples" in views[0][1]["alt_text"]
    assert "20 samples" in views[-1][1]["alt_text"]
    assert len({view[1]["value"].size for view in views}) == 1, "room is kept for what is to come"


def test_the_decoding_error_is_measured():
    import samples

    run = rl.load("digits-none")
    for method in ("cached", "sequential"):
        drawn = samples.row(run, 3, 0, 4, 1.0, 1.0, True, method)
        assert 0 < drawn.error < 1e-4
        assert torch.allclose(drawn.images, rl.sample(run, range(4), 3, 1.0, method=method).images)


def test_code_of_the_samples_gives_their_images(tmp_path, monkeypatch):
    import samples

    controls = (samples.EVERY, 2, 1.0, 0.9, True, "auto")
    code = samples.code(*PAIR, 3, *controls)
    made = run_code(code)["s"]
    run = rl.load("digits-reverse")
    rows = torch.cat([samples.row(run, label, 3, *controls[1:]).images for label in range(10)])
    assert torch.allclose(made.images, rows, atol=1e-5)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(code.shell)[1:]) == 0
    with Image.open("grid.png") as opened:
        assert opened.size == (2 * 9 * 8 + 8, 10 * 9 * 8 + 8)
        first = from_picture(opened.crop((8, 8, 72, 72)), 1, 8)
    assert (first[0] - rows[0]).abs().max() < 0.01


def test_the_zip_holds_every_image_and_says_how_it_was_made():
    import samples

    path = samples.pack(*PAIR, 5, "7", 3, 0.0, 1.0, False, "auto")
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


def test_judge_says_what_the_library_says():
    import classify

    runs = {name: rl.load(name) for name in PAIR}
    x, y = runs["digits-none"].data("test")
    _, verdict = classify.judge(*PAIR, 0, 5, None)
    by_step = classify.weigh(*PAIR, 0, 5, None)
    by_bayes, evidence, sure = classify.weigh_exactly(*PAIR, 0, 5, None)
    expected = {name: rl.classify(run, x[5:6]) for name, run in runs.items()}
    for trace in by_step.data:
        assert np.allclose(trace.y, expected[trace.name].scores[0].tolist())
        assert f"**{trace.name}** says **{int(expected[trace.name].label)}**" in verdict
    assert f"a {int(y[5])}" in verdict
    for trace in by_bayes.data:
        bayes = rl.classify(runs[trace.name], x[5:6], "bayes")
        assert np.allclose(trace.y, bayes.scores[0].tolist(), atol=1e-3)
        assert f"{float(bayes.probability.max()):.1%} sure" in sure
    for trace in evidence.data:
        assert np.allclose(trace.z, rl.evidence(runs[trace.name], x[5:6])[0])


def test_the_race_stops_at_the_step_on_the_axes_of_the_whole():
    import classify

    x = rl.load("digits-none").data("test").x[8:9]
    path = rl.classify(rl.load("digits-none"), x, "iterated").path
    _, figure = classify.race(*PAIR, 0, 6, 8, None)
    assert len(figure.data[0].y) == 7
    best = next(trace for trace in figure.data if trace.name == str(int(path[-1].argmax())))
    assert np.allclose(best.y, path[:7, 0, int(path[-1].argmax())])
    _, whole = classify.race(*PAIR, 0, 20, 8, None)
    assert figure.layout.xaxis.range[1] == len(whole.data[0].y) - 0.5


def test_mistakes_are_those_of_the_report():
    import classify

    run = rl.load("digits-none")
    report = rl.classification_report(run)
    wrong = {int(row) for row in report.images.loc[~report.images["right"].astype(bool), "image"]}
    first, second, gallery, note = classify.browse("digits-none", "digits-reverse", 0, "one gradient step", "any", "any", True)
    assert set(classify.chosen(report, "any", "any", True)) == wrong
    assert len(gallery["value"]) == len(wrong)
    assert f"**{len(wrong)} of 360**" in note
    assert first.layout.title.text.startswith("digits-none:")
    assert np.array(first.data[0].text).sum() == np.array(second.data[0].text).sum() == 360
    eights = classify.chosen(report, "8", "any", False)
    assert len(eights) == int((run.data("test").y == 8).sum())
    event = gr.SelectData(None, {"index": 2, "value": None})
    assert classify.pick("digits-none", "one gradient step", "8", "any", False, event)[0] == eights[2]


def test_code_of_the_classification_gives_its_scores(capsys):
    import classify

    code = classify.code(*PAIR, 0, 11, None)
    left = run_code(code)
    assert torch.equal(left["c"].scores, rl.classify(rl.load("digits-reverse"), left["x"], "bayes").scores)
    drawn = classify.code(*PAIR, 0, 11, ([[[0.5] * 8] * 8], "your drawing", 11))
    assert run_code(drawn)["x"].shape == (1, 1, 8, 8)
    assert main(shlex.split(code.shell)[1:]) == 0
    assert "gradient_accuracy" in capsys.readouterr().out


def test_uploads_are_turned_to_light_on_dark():
    import classify

    x = rl.load("digits-none").data("test").x[0]
    light_on_dark = classify.upload("digits-none", 0, picture(x, scale=10))
    dark_on_light = classify.upload("digits-none", 0, picture(-x, scale=10))
    assert np.allclose(light_on_dark[0], dark_on_light[0], atol=0.02)
    assert "inverted" in dark_on_light[1]


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
    import classify
    import reverse_path
    from shell import class_choices, get_run

    monkeypatch.setenv("RREPA_RUNS", str(few_classes))
    run = get_run(name)
    assert "frog" in classify.look_at(name, 0, None)[1]
    if name == "one":
        assert "says **frog** ✓, its only class" in classify.judge(name, "", 0, 0, None)[1]
        assert classify.weigh(name, "", 0, 0, None).data
        assert "**one** by Bayes' rule: frog, 100.0% sure" in classify.weigh_exactly(name, "", 0, 0, None)[2]
        assert classify.race(name, "", 0, 20, 0, None)[0].data
        assert "**0 of 8**" in classify.browse(name, "", 0, "one gradient step", "any", "any", True)[3]
    else:
        with pytest.raises(rl.LabError, match="trained without classes: there is nothing to classify"):
            classify.judge(name, "", 0, 0, None)
        assert classify.weigh(name, "", 0, 0, None) is None
        assert classify.weigh_exactly(name, "", 0, 0, None) == (None, None, "")
        assert classify.race(name, "", 0, 20, 0, None) == (None, None)
        assert classify.browse(name, "", 0, "one gradient step", "any", "any", True)[3] == ""
    choice = class_choices(run)[-1]
    assert "after block 1" in reverse_path.draw_way(name, "", 0, reverse_path.NOISE, choice, 0, 0.0, 1.0, 1)


# --- shell and frame --------------------------------------------------------------------------------------------------


def test_mistakes_become_notices(page_runs, monkeypatch):
    import classify
    from shell import computes, get_run, told

    monkeypatch.setenv("RREPA_RUNS", str(page_runs))
    assert told(classify.drawing)("digits-none", 0, {"layers": [np.zeros((280, 280, 4), np.uint8)]}) is None
    with pytest.raises(gr.Error, match="no picture yet"):
        told(classify.upload)("digits-none", 0, None)
    for name in ("../../etc", "/etc", "", str(bundled("assets") / "runs" / "digits-none")):
        with pytest.raises(gr.Error, match="no run"):
            computes(get_run)(name)
    with pytest.raises(gr.Error, match="^'damaged/model.safetensors is damaged"):  # by name: no folder of this machine
        computes(get_run)("damaged")

    @computes
    def slowly():
        yield 1
        raise rl.LabError("half way")

    values = slowly()
    assert next(values) == 1
    with pytest.raises(gr.Error, match="half way"):
        next(values)


def test_a_run_is_kept_until_its_weights_change(trained, tmp_path, monkeypatch):
    import os
    import shutil

    from shell import get_run

    monkeypatch.setenv("RREPA_RUNS", str(tmp_path))
    shutil.copytree(trained, tmp_path / "mine")
    first = get_run("mine")
    assert get_run("mine") is first
    weights = tmp_path / "mine" / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert get_run("mine") is not first


def test_the_lock_is_free_while_a_value_is_shown():
    import threading

    from shell import computes, lock

    @computes
    def values():
        yield "first"
        yield "second"

    shown = values()
    next(shown)
    taken = []

    def take():
        if lock.acquire(timeout=5):
            lock.release()
            taken.append(True)

    other = threading.Thread(target=take)
    other.start()
    other.join()
    assert taken == [True]


def test_controls_are_read_back_from_a_link():
    from frame import _from_text, _to_text

    slider, box = gr.Slider(0, 5, 1, step=0.1), gr.Checkbox()
    choice, several = gr.Dropdown(["a b", "c"]), gr.CheckboxGroup(["x", "y"])
    for control, value in ((slider, 2.5), (slider, 3), (box, True), (box, False), (choice, "a b"), (several, ["x", "y"])):
        assert _from_text(control, _to_text(value)) == value
    for control, text in ((slider, "9"), (slider, "much"), (box, "on"), (choice, "../d"), (several, "x|z")):
        with pytest.raises((ValueError, gr.Error)):
            _from_text(control, text)


@pytest.mark.parametrize("seed", [None, -5, 2**31])
def test_a_seed_out_of_range_is_told(seed):
    from frame import checked_seed

    assert checked_seed(2**31 - 1) == 2**31 - 1
    with pytest.raises(rl.LabError, match="the seed"):
        checked_seed(seed)


def test_pictures_in_a_table_are_described_and_escaped():
    x = torch.zeros(1, 8, 8)
    table = picture_table({"<b>": {"first": x, "second": x}}, "a & b", "second", "image")
    assert 'alt="image, &lt;b&gt;, first"' in table
    assert "a &amp; b" in table
    assert table.count("marked") == 1
    with pytest.raises(rl.LabError, match="no pictures"):
        picture_table({})


@pytest.mark.slow
@pytest.mark.parametrize("tab", ["reverse_path", "layers", "classify", "samples", "feature_map", "training"])
def test_every_tab_launches_alone(tab, tmp_path):
    port = free_port()
    command = [sys.executable, str(bundled("app") / f"{tab}.py"), "--port", str(port)]
    with (
        served(command, f"http://127.0.0.1:{port}", tmp_path),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as page,
    ):
        tabs = [part["props"].get("id") for part in json.load(page)["components"] if part["type"] == "tabitem"]
    assert import_module(tab).NAME in tabs
    assert len([name for name in tabs if name]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run-dir", "nowhere"], "is no folder"),
        (["--device", "tpu"], "unknown device"),
        (["--auth", "me"], "USER:PASSWORD"),
        (["--mcp"], "gradio\\[mcp\\]"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message, monkeypatch, capsys):
    import frame
    import samples

    monkeypatch.setattr(sys, "argv", ["samples.py", *flags])
    monkeypatch.setitem(sys.modules, "mcp", None)  # as where it is not installed
    with pytest.raises(SystemExit) as ended:
        frame.serve([samples])
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
