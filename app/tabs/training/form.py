"""The form that trains a small run, and the progress of its training."""

import json
import re
import shlex
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr
from page.panels import Code
from page.sidebar import refreshed_pickers
from server.handlers import show_errors
from server.runs import run_names
from server.settings import server_settings
from tabs.training.trainer import SEEDS, Training, trainer
from tabs.training.view import NEW_RUN, TrainingView

import rrepa_lab as rl
from rrepa_lab.errors import LabError
from rrepa_lab.paths import assets, runs_root
from rrepa_lab.runs.records import Records
from rrepa_lab.viz.html import picture_table
from rrepa_lab.viz.training import loss_curves

UNALIGNED = "digits-none"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}"
SAVE_EVERY = 50  # steps between checkpoints, and between validations
REPORT_EVERY = 5  # steps between reports, during which the model lock is held
CLOSED = (
    "Training is off: this page can be reached by others and has no password. Start it with `--auth USER:PASSWORD`, or "
    "on this machine only."
)


def settings(view: TrainingView) -> dict[str, Any]:
    """The form as settings of the preset."""
    given: dict[str, Any] = {"name": view.name}
    if view.preset != UNALIGNED:
        given |= {"align.blocks": sorted(map(int, view.blocks)), "align.layers": [view.layer], "align.weight": view.weight}
    every = {"train.log_every": REPORT_EVERY, "train.eval_every": SAVE_EVERY, "train.save_every": SAVE_EVERY}
    return given | {"train.steps": view.steps} | every | {"train.seed": view.seed}


def checked_name(name: str) -> str:
    """The name of a new run; LabError if it is not allowed, or taken."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise LabError(
            "the name of a run is made of letters A to Z, digits, - _ and . (60 at most), and begins with a letter or a digit"
        )
    if any((root / name).exists() for root in (assets() / "runs", runs_root())):
        raise LabError(f"there is a run {name!r} already: choose another name")
    return name


def begin(view: TrainingView) -> Training:
    """Begin to train what the form describes, in the background."""
    if not server_settings.may_train:
        raise LabError(CLOSED)
    name = checked_name(view.name)
    config = rl.preset(view.preset).override(settings(view))
    return trainer.start(config, runs_root() / name, server_settings.device)


def code(view: TrainingView) -> Code:
    """The training that the form describes; a name that is not allowed is replaced."""
    view = view if re.fullmatch(NAME_PATTERN, view.name) else replace(view, name=NEW_RUN)
    folder, device, given = f"runs/{view.name}", server_settings.device, settings(view)
    lines = [f"rrepa-lab train {view.preset} --out {folder} --seed {view.seed} --device {device}"]
    for key, value in given.items():
        if key != "train.seed":
            lines.append("--set " + shlex.quote(f"{key}={json.dumps(value, separators=(',', ':'))}"))
    pairs = "".join(f"    {json.dumps(key)}: {json.dumps(value)},\n" for key, value in given.items())
    python = (
        f"import rrepa_lab as rl\n\nsettings = {{\n{pairs}}}\n"
        f'for report in rl.train("{view.preset}", "{folder}", settings=settings, device="{device}"):\n'
        "    print(report.step, report.nats_per_dim, report.similarity)"
    )
    return Code(" \\\n  ".join(lines), python)


# --- progress ---------------------------------------------------------------------------------------------------------


def progress_updates() -> tuple[Any, ...]:
    """Updates of PROGRESS for the present training or the last one: text, curves, samples, the buttons and the timer."""
    now = trainer.training
    if now is None:
        return "", gr.Plot(visible=False), gr.HTML(visible=False), *_buttons(False, False)
    table = Records(now.folder).table()
    curves = gr.Plot(visible=False)
    if len(table) > 1:
        curves = gr.Plot(loss_curves({now.name: table}, f"training seed {now.config.train.seed}"), visible=True)
    samples = gr.HTML(visible=False)
    if now.samples is not None:
        samples = gr.HTML(_samples_table(now, *now.samples), visible=True)
    return _progress_text(now), curves, samples, *_buttons(trainer.busy, now.report is not None)


def _buttons(busy: bool, reported: bool) -> tuple[Any, Any, Any, Any]:
    """Start, stop, pick, and the timer that refreshes."""
    start = gr.Button(interactive=server_settings.may_train and not busy)
    stop = gr.Button(interactive=server_settings.may_train and busy)
    return start, stop, gr.Button(visible=reported and not busy), gr.Timer(active=busy)


def _progress_text(now: Training) -> str:
    name, steps = escape(now.name), now.config.train.steps
    if now.state == "failed":
        return f"<p><b>{name}</b>: training failed. {escape(now.message)}</p>"
    facts = []
    if now.report:
        facts.append(f"{now.report.nats_per_dim:.3f} nats/dim under the training noise")
        cosines = now.report.similarity.values()
        if cosines:
            facts.append(f"cosine with the encoder {sum(cosines) / len(cosines):.3f}")
        if now.state == "running":
            facts.append(f"about {now.report.remaining:.0f} s left")
        else:
            facts.append(f"{now.report.seconds:.0f} s")
    state = {
        "running": f"step {now.step} of {steps}" if now.report else "beginning",
        "done": f"trained, {steps} steps",
        "stopped": f"stopped at step {now.step} of {steps}, and saved",
    }[now.state]
    if now.state == "running" and now.stop_requested.is_set():
        state += ", stopping"
    bar = f'<progress max="{steps}" value="{now.step}" aria-label="steps of {name}" style="width: 100%"></progress>'
    after = "" if now.state == "running" else " The sidebar lists it."
    return f"<p><b>{name}</b>: {'; '.join([state, *facts])}.{after}</p>{bar if now.state == 'running' else ''}"


def _samples_table(now: Training, step: int, images: Any) -> str:
    """A row a seed, a column a class."""
    classes = images.unflatten(0, (len(SEEDS), -1))
    rows = {
        f"seed {seed}": {str(label): image for label, image in enumerate(part)}
        for seed, part in zip(SEEDS, classes, strict=True)
    }
    finish = "denoised" if now.config.flow.noise == "gaussian" else "rounded down to pixel values"
    caption = f"Samples of {now.name} after {step} steps, by class; no guidance, {finish}."
    return picture_table(rows, caption, what=f"sample, {now.name}")


# --- handlers ---------------------------------------------------------------------------------------------------------


def draw_form(view: TrainingView) -> tuple[Any, ...]:
    """The progress, and the runs that can be added now; the form itself needs no drawing."""
    return *progress_updates(), gr.Dropdown(choices=run_names())


def press_start(view: TrainingView) -> tuple[Any, ...]:
    """Begin, and show it as `refresh` does."""
    begin(view)
    return True, *progress_updates()


@show_errors
def press_stop() -> tuple[Any, ...]:
    """Request the end of the training."""
    if not server_settings.may_train:
        raise LabError(CLOSED)
    trainer.stop()
    return progress_updates()


def refresh(busy: bool) -> tuple[Any, ...]:
    """(training goes on, its progress, updates of the three pickers of runs, once it has ended).

    Args:
        busy: whether it went on at the last refresh of this page.
    """
    now = trainer.training
    if now is not None and trainer.busy:
        return True, *progress_updates(), gr.skip(), gr.skip(), gr.skip()
    if busy and now is not None and now.state == "failed":
        gr.Warning(escape(now.message), title=f"Training of {now.name} failed")
    return False, *progress_updates(), *refreshed_pickers(), gr.Dropdown(choices=run_names())


@show_errors
def pick() -> Any:
    """The trained run, for the sidebar."""
    if trainer.training is None:
        raise LabError("nothing was trained yet")
    return gr.Dropdown(choices=run_names(), value=trainer.training.name)
