"""The tab about training: its curves, its atlas, and the run that is trained from the page."""

import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import free_port, served

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError
from rrepa_lab.paths import bundled
from rrepa_lab.runs.presets import config_file
from rrepa_lab.runs.records import Records

gr = pytest.importorskip("gradio")

FORM = {"name": "my-run", "preset": "digits-reverse", "blocks": ("4", "2"), "layer": 3, "weight": 0.25, "steps": 150}
ALONE = {"run": "digits-none", "other": ""}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of local runs."""
    monkeypatch.setenv("RREPA_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def trainer(runs: Path) -> Iterator[object]:
    from tabs.training.trainer import Trainer

    made = Trainer()
    yield made
    made.stop()
    made.wait(60)


@pytest.fixture
def page_trainer(trainer, monkeypatch):
    """The trainer of the page, fresh."""
    from tabs.training import form as training_form

    monkeypatch.setattr(training_form, "trainer", trainer)
    return trainer


# --- curves -----------------------------------------------------------------------------------------------------------


def test_curves_are_the_metrics_of_the_runs():
    from tabs.training import tab as training

    figure, note, table = training.draw_curves(
        training.TrainingView(run="digits-reverse", other="digits-none", more=("digits-detach",))
    )
    metrics = Records(rl.load("digits-detach").directory).table()
    curve = next(trace for trace in figure.data if trace.name == "digits-detach, training")
    assert list(curve.x) == list(metrics["step"])
    assert np.allclose(curve.y, metrics["nats_per_dim"])
    held = next(trace for trace in figure.data if trace.name == "digits-detach, held out")
    assert np.allclose(held.y, metrics["held_out_nats_per_dim"].dropna())
    assert table["visible"]
    assert table["value"].to_dict("records") == [
        {"setting": "align.strategy", "digits-reverse": "reverse", "digits-none": "none", "digits-detach": "detach"}
    ]
    assert "Not recorded" not in note


@pytest.mark.parametrize(("along", "factor"), [("steps", 1), ("images", 64)])
def test_curves_in_other_units(along, factor):
    from tabs.training import tab as training

    nats, _, _ = training.draw_curves(training.TrainingView(run="digits-none", other="", axis=along))
    bits, _, table = training.draw_curves(training.TrainingView(run="digits-none", other="", show="bits/dim", axis=along))
    assert np.allclose(np.array(bits.data[0].y), np.array(nats.data[0].y) / np.log(2))
    assert list(bits.data[0].x[:2]) == [10 * factor, 20 * factor]
    assert bits.layout.yaxis.title.text == "bits/dim under the training noise"
    assert not table["visible"], "a run alone differs in no setting: an empty table is not shown"


def test_parts_of_the_loss_add_up():
    from tabs.training import tab as training

    figure, note, _ = training.draw_curves(
        training.TrainingView(run="digits-reverse", other="digits-none", show="loss parts", axis="seconds")
    )
    part = {trace.name.removeprefix("digits-reverse, "): np.array(trace.y) for trace in figure.data}
    assert np.allclose(part["total"], part["L_nf"] + 0.5 * part["L_align"], atol=1e-5)
    assert [trace.name for trace in figure.data if "none" in trace.name] == ["digits-none, L_nf"]
    near, note, _ = training.draw_curves(training.TrainingView(run="digits-reverse", other="digits-none", show="similarity"))
    taps, floors = near.data[:2], near.data[2:]
    assert [trace.name for trace in taps] == ["digits-reverse, block.3.layer.2", "digits-reverse, block.4.layer.2"]
    assert [trace.name.split(" alone")[0] for trace in floors] == ["label and position", "position"]
    assert "Not recorded for `digits-none`: it is not aligned" in note


def test_a_run_without_the_column_is_told(runs, trained):
    import shutil

    from tabs.training import tab as training

    for name in ("with", "without", "empty"):
        shutil.copytree(trained, runs / name)
    Records(runs / "empty").path.unlink()
    rows = [json.loads(line) for line in Records(runs / "without").path.read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in row.items() if k != "held_out_accuracy"}) + "\n" for row in rows)
    Records(runs / "without").path.write_text(text)
    figure, note, _ = training.draw_curves(
        training.TrainingView(run="with", other="without", more=("empty",), show="accuracy", axis="images")
    )
    assert [trace.name for trace in figure.data] == ["with"]
    assert figure.data[0].y[-1] == rows[-1]["held_out_accuracy"]
    assert "Not recorded for `without`, `empty`" in note
    for show in training.SHOWN:
        training.draw_curves(training.TrainingView(run="with", other="without", more=("empty",), show=show, axis="seconds"))


def test_the_seconds_of_a_resumed_run_go_on(runs, trained):
    import shutil

    from tabs.training import curves as training_curves

    shutil.copytree(trained, runs / "resumed")
    row = json.loads(Records(runs / "resumed").path.read_text().splitlines()[-1])
    lines = [{**row, "step": step, "seconds": seconds} for step, seconds in ((1, 2.0), (2, 4.0), (3, 1.0), (4, 2.0), (5, 0.5))]
    Records(runs / "resumed").path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(training_curves.metrics_of("resumed")["seconds"]) == [2.0, 4.0, 5.0, 6.0, 6.5]


def test_settings_in_which_runs_differ(runs, trained, tiny):
    import shutil

    from tabs.training import tab as training

    shutil.copytree(trained, runs / "small")
    table = training.differences(["small", "digits-none"]).set_index("setting")
    small, other = config_file(runs / "small" / "config.json").flat(), rl.load("digits-none").config.flat()
    assert table.loc["flow.width"].tolist() == [str(small["flow.width"]), str(other["flow.width"])]
    assert table.loc["align.strategy"].tolist() == ["reverse", "none"]
    differing = {key for key in small if small[key] != other[key]}
    assert set(table.index) <= differing
    assert {key for key in differing if key.startswith(("flow.", "data."))} <= set(table.index)
    assert {"align.strategy", "flow.width", "train.steps"} <= set(table.index)
    with pytest.raises(LabError, match="no run 'nobody'"):
        training.draw_curves(training.TrainingView(run="small", other="", more=("nobody",)))


# --- the atlas --------------------------------------------------------------------------------------------------------


def test_the_atlas_is_that_of_the_library(runs, trained, monkeypatch):
    import shutil

    from server.runs import get_run
    from tabs.training import tab as training

    shutil.copytree(trained, runs / "small")
    run = get_run("small")
    assert training.tap_in(run, "block.4.layer.4") == "block.2.layer.2"
    assert [words for words, _ in training.tap_choices(run)][-1] == "block 2, layer 2 (aligned)"
    view = training.TrainingView(run="small", other="", tap="block.2.layer.2")
    _, note = training.draw_atlas(view)
    assert "Not computed yet for `block.2.layer.2`" in note
    training.compute_atlas(view)
    expected = rl.routing(run)
    pd.testing.assert_frame_equal(training.routing_of(run, "block.2.layer.2"), expected)
    monkeypatch.setattr(rl, "routing", None)
    after, note = training.draw_atlas(view)
    assert after.value is not None
    assert note == training.HOW_TO_READ
    assert training.tap_in(get_run("digits-none"), "") == "block.3.layer.2"


# --- the form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a b", "", ".x", "-x", "a/b", "x" * 61, "<b>", "ä", "a\n", "$(x)"])
def test_names_that_no_run_can_have(runs, page_trainer, name):
    from tabs.training import form as training_form
    from tabs.training.view import TrainingView

    with pytest.raises(LabError, match="made of letters"):
        training_form.begin(TrainingView(**FORM | {"name": name}))
    assert name in ("", ".x", "-x") or name not in "".join(training_form.code(TrainingView(**FORM | {"name": name})))
    assert page_trainer.training is None


def test_a_name_that_is_taken(runs, page_trainer):
    from tabs.training import form as training_form
    from tabs.training.view import TrainingView

    (runs / "mine").mkdir(parents=True)
    for name in ("mine", "digits-none"):
        with pytest.raises(LabError, match=f"there is a run '{name}' already"):
            training_form.begin(TrainingView(**FORM | {"name": name}))


def test_mistakes_in_the_form_are_told(runs, page_trainer, monkeypatch):
    from server.handlers import show_errors
    from tabs.training import form as training_form
    from tabs.training.view import TrainingView

    with pytest.raises(gr.Error, match="align.blocks is empty"):
        show_errors(training_form.press_start)(TrainingView(name="x", blocks=()))
    monkeypatch.setattr(training_form.server_settings, "may_train", False)
    for press in (lambda: show_errors(training_form.press_start)(TrainingView(**FORM)), training_form.press_stop):
        with pytest.raises(gr.Error, match="Training is off"):
            press()
    assert not any(button.interactive for button in training_form.progress_updates()[3:5])
    assert page_trainer.training is None


@pytest.mark.parametrize("form", [
    FORM, {"name": "x.1", "preset": "digits-none", "blocks": (), "layer": 1, "weight": 0.0, "steps": 50},
    {"name": "123", "preset": "digits-detach", "blocks": ("1",), "layer": 1, "weight": 2.0, "steps": 2000},
])  # fmt: skip
def test_the_code_trains_what_the_page_trains(runs, page_trainer, monkeypatch, capsys, form):
    from tabs.training import form as training_form
    from tabs.training.view import TrainingView

    begun = {}
    monkeypatch.setattr(page_trainer, "start", lambda config, folder, device: begun.update(config=config, folder=folder))
    view = TrainingView(seed=7, **form)
    training_form.begin(view)
    assert begun["folder"] == runs / view.name
    shell, python = training_form.code(view)
    words = shlex.split(shell.replace("\\\n", " "))
    assert words[0] == "rrepa-lab"
    assert main([*words[1:], "--dry-run", "--json"]) == 0
    assert rl.RunConfig.from_dict(json.loads(capsys.readouterr().out)["config"]) == begun["config"]

    given = {}
    monkeypatch.setattr(rl, "train", lambda source, out, **more: given.update(source=source, out=out, **more) or [])
    exec(python, {})
    assert rl.preset(given["source"]).override(given["settings"]) == begun["config"]
    assert (given["out"], given["device"]) == (f"runs/{view.name}", "cpu")


# --- the trainer ------------------------------------------------------------------------------------------------------


def learned(folder: Path) -> pd.DataFrame:
    return Records(folder).table().drop(columns=["seconds", "remaining", "data_wait"])


def test_it_trains_as_the_library_does(trainer, runs, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("tabs.training.trainer.SAMPLE_EVERY_SECONDS", 0)
    training = trainer.start(tiny, runs / "tiny", "cpu")
    trainer.wait(120)
    assert (training.state, training.message, training.step) == ("done", "", 12)
    assert list(rl.train(tiny, tmp_path / "expected", device="cpu"))
    pd.testing.assert_frame_equal(learned(runs / "tiny"), learned(tmp_path / "expected"))
    step, images = training.samples
    expected = rl.sample(rl.load(tmp_path / "expected"), [0] * 10 + [1] * 10, [*range(10)] * 2).images
    assert step == 12
    assert np.allclose(images, expected, atol=1e-5)


def test_one_at_a_time_and_stop_saves(trainer, runs, tiny):
    long = tiny.override({"train.steps": 100_000})
    training = trainer.start(long, runs / "tiny", "cpu")
    with pytest.raises(LabError, match=r"tiny is being trained \(step \d+ of 100000\)"):
        trainer.start(tiny, runs / "other", "cpu")
    while training.step < 6:
        time.sleep(0.01)
    assert trainer.busy
    began = time.monotonic()
    trainer.stop()
    trainer.wait(30)
    assert time.monotonic() - began < 10
    assert training.state == "stopped"
    assert rl.load(runs / "tiny").step == training.step
    assert not (runs / "other").exists()
    again = trainer.start(tiny, runs / "other", "cpu")
    trainer.wait(60)
    assert again.state == "done"


def test_others_may_compute_while_it_trains(trainer, runs, tiny):
    from server.handlers import model_lock

    training = trainer.start(tiny.override({"train.steps": 100_000}), runs / "tiny", "cpu")
    while training.step < 2:
        time.sleep(0.01)
    waited = []
    for _ in range(5):
        began, step = time.monotonic(), training.step
        with model_lock:
            waited.append(training.step - step)
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    assert max(waited) <= 20  # one report of two steps is under way, and where the machine is busy a few more
    assert any(thread.name == "training tiny" and thread.daemon for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.lr": 1e6, "train.grad_clip_norm": 1e9, "train.warmup": 0}, "the loss is"),
        ({"flow.classes": 3}, "flow.classes is 3"),
    ],
)
def test_errors_are_told(page_trainer, runs, tiny, monkeypatch, settings, message):
    from tabs.training import form as training_form

    reported = []
    monkeypatch.setattr(gr, "Warning", lambda text, title: reported.append((text, title)))
    begun = page_trainer.start(tiny.override(settings), runs / "tiny", "cpu")
    page_trainer.wait(60)
    assert begun.state == "failed"
    assert message in begun.message
    assert f"<b>tiny</b>: training failed. {message}" in training_form.refresh(True)[1]
    assert reported[0][1] == "Training of tiny failed"
    training_form.refresh(False)
    assert len(reported) == 1


def test_what_the_page_shows_of_it(page_trainer, runs, tiny):
    from tabs.training import form as training_form
    from tabs.training.view import TrainingView

    assert training_form.refresh(False)[:2] == (False, "")
    page_trainer.start(tiny.override({"train.steps": 100_000}), runs / "tiny", "cpu")
    while page_trainer.training.step < 4:
        time.sleep(0.01)
    busy, words, figure, _, start, stop, use, clock, *pickers = training_form.refresh(False)
    assert busy
    assert "step " in words
    assert '<progress max="100000"' in words
    assert figure.value is not None
    assert (start.interactive, stop.interactive, use.visible, clock.active) == (False, True, False, True)
    assert "tiny" in [name for _, name in training_form.draw_form(TrainingView())[-1].choices]
    training_form.press_stop()
    page_trainer.wait(30)
    busy, words, _, samples, start, stop, use, clock, *pickers = training_form.refresh(True)
    assert not busy
    assert "stopped at step" in words
    assert samples.value.count("<img") == 20
    assert (start.interactive, stop.interactive, use.visible, clock.active) == (True, False, True, False)
    for picker in pickers:
        assert "tiny" in [name for _, name in picker.choices]
    assert training_form.pick().value == "tiny"


# --- a real browser ---------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_a_run_is_trained_from_the_page(view, page_runs):
    view.get_by_role("tab", name="Training").click()
    view.wait_for_selector("#curves .js-plotly-plot .scatterlayer path")
    view.locator("#train-name input, #train-name textarea").fill("learned-here")
    steps = view.locator("#train-steps input[type=number]")
    steps.fill("50")
    steps.press("Enter")
    view.locator("#start-training").click()
    view.wait_for_selector("#training-progress progress", timeout=30_000)
    view.wait_for_selector("#training-progress :text('trained, 50 steps')", timeout=180_000)
    assert view.locator("#training-samples img").count() == 20
    assert rl.load(page_runs / "learned-here").step == 50
    view.locator("#pick-trained").click()
    view.wait_for_selector("#about :text('step 50 of 50')")
    view.get_by_label("Run", exact=True).click()
    assert "learned-here" in " ".join(view.get_by_role("option").all_inner_texts())
    assert view.errors == []
    assert view.strays == []


def test_accuracy_of_bundled_runs_is_that_of_their_records():
    from tabs.training import tab as training

    figure, words, _ = training.draw_curves(training.TrainingView(run="digits-reverse", other="digits-none", show="accuracy"))
    drawn = {trace.name: trace for trace in figure.data}
    for name in ("digits-reverse", "digits-none"):
        table = Records(bundled("assets") / "runs" / name).table()
        if "held_out_accuracy" not in table:
            assert name not in drawn
            assert f"`{name}`" in words.partition("Not recorded for")[2]
            continue
        rows = table.dropna(subset=["held_out_accuracy"])
        assert list(drawn[name].y) == rows["held_out_accuracy"].tolist()
        assert list(drawn[name].x) == rows["step"].tolist()
    _, words, _ = training.draw_curves(training.TrainingView(run="digits-reverse", other="digits-none"))
    assert "Not recorded" not in words


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_page_that_is_ended_saves_the_run_it_trains(tmp_path, tiny, number):
    """A script that serves one tab and begins a training, as a visitor would."""
    config = tiny.override({"train.steps": 100_000, "train.save_every": 100_000, "train.eval_every": 100_000})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    script = tmp_path / "serve.py"
    script.write_text(
        f"import json, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(bundled('app'))!r})\n"
        "import rrepa_lab as rl\nfrom demo import build_demo\nfrom page.serve import serve\n"
        "from tabs.training.trainer import trainer\n"
        "config = rl.RunConfig.from_dict(json.loads(Path('config.json').read_text()))\n"
        "def build(names):\n    page = build_demo(['samples'])\n"
        "    trainer.start(config, Path('run'), 'cpu')\n    return page\n"
        "serve(build, ['samples'])\n"
    )
    port = free_port()
    with served([sys.executable, str(script), "--port", str(port)], f"http://127.0.0.1:{port}", tmp_path) as process:
        records = Records(tmp_path / "run")
        while len(records.rows()) < 4:
            time.sleep(0.1)
            assert process.poll() is None, (tmp_path / "log").read_text()
        process.send_signal(number)
        process.wait(40)
    run = rl.load(tmp_path / "run")
    assert run.step >= 8, "more than the checkpoint before the first step"
    assert records.rows()[-1]["step"] <= run.step
    assert "Traceback" not in (tmp_path / "log").read_text()
