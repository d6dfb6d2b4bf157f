"""How runs learned, which parameters each strategy teaches, and a small run trained from the page."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from html import escape
from typing import Any
from weakref import WeakKeyDictionary

import gradio as gr
import pandas as pd
import plotly.graph_objects as go
from frame import Bar, Code, Panel, checked_seed, refreshed, serve
from shell import FIRST, HIDDEN, MODEL, NOTHING, SECOND, computes, desk, get_run, run_folder, run_names, told
from trainer import SEEDS, Training, trainer

import rrepa_lab as rl
from rrepa_lab.errors import LabError
from rrepa_lab.flow.taps import Tap
from rrepa_lab.measurements.compare import as_text, settings_of
from rrepa_lab.paths import assets, runs_root
from rrepa_lab.runs.presets import ALIGNED, config_file
from rrepa_lab.runs.records import Records
from rrepa_lab.viz.html import picture_table
from rrepa_lab.viz.routing import atlas
from rrepa_lab.viz.training import accuracy_curves, loss_curves, loss_parts, similarity_curves

NAME, TITLE = "training", "Training"
ACCURATE = "held_out_accuracy"
# what can be shown: the figure, and the column of metrics.jsonl (or how one begins) that it needs
SHOWN: dict[str, tuple[Callable[..., go.Figure], str]] = {
    "nats/dim": (partial(loss_curves, unit="nats/dim"), "held_out_nats_per_dim"),
    "bits/dim": (partial(loss_curves, unit="bits/dim"), "held_out_nats_per_dim"),
    "loss parts": (loss_parts, "loss"),
    "similarity": (similarity_curves, "similarity."),
    "accuracy": (accuracy_curves, ACCURATE),
}
ALONG = {"steps": "step", "images": "images", "seconds": "seconds"}
PRESETS = [f"digits-{strategy}" for strategy in ALIGNED]
UNALIGNED = "digits-none"
CALLED = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}"
SUGGESTED = "my-run"
OFTEN = 50  # steps between checkpoints, and between looks at held-out images
REPORT = 5  # steps between reports, during which nobody else can compute
PACE = 2.0  # seconds between two looks at the training that goes on
HOW_TO_READ = (
    "A filled cell is a part of the flow that the alignment loss of this strategy changes, the more the brighter: `forward` "
    "teaches the aligned block up to its layer and all blocks before it (towards the image), `detach` the former alone, "
    "`reverse` the whole block and all after it (towards the noise), through which an image is generated."
)
CLOSED = (
    "Training is off: this page can be reached by others and asks for no password. Start it with `--auth USER:PASSWORD`, or "
    "on this machine only."
)


# --- curves -----------------------------------------------------------------------------------------------------------


def chosen(run: str, other: str, more: list[str]) -> list[str]:
    """The runs to show: those of the sidebar, then those that were added."""
    return [name for name in dict.fromkeys((run, other, *more)) if name != NOTHING]


def config_of(name: str) -> rl.RunConfig:
    """The configuration of a run on offer, without its weights."""
    return config_file(run_folder(name) / "config.json")


def metrics_of(name: str) -> pd.DataFrame:
    """metrics.jsonl of a run with a column `images`, and with seconds that go on where it was resumed."""
    table = Records(run_folder(name)).table()
    if table.empty:
        return table
    seconds = table["seconds"]
    before = seconds.shift(fill_value=0.0).where(seconds.diff() < 0, 0.0).cumsum()
    return table.assign(images=table["step"] * config_of(name).train.batch, seconds=seconds + before)


def differences(names: list[str]) -> pd.DataFrame:
    """The settings that those runs that have them have in several values: a row each, a column a run; the seed among them."""
    settings = {}
    for name in names:
        config = config_of(name)
        settings[name] = {key: str(as_text(value)) for key, value in settings_of(config).items()}
        settings[name]["train.seed"] = str(config.train.seed)
    rows = []
    for key in dict.fromkeys(key for one in settings.values() for key in one):
        values = {name: one.get(key, "-") for name, one in settings.items()}
        if len(set(values.values()) - {"-"}) > 1:
            rows.append({"setting": key, **values})
    return pd.DataFrame(rows, columns=["setting", *names])


def draw_curves(run: str, other: str, seed: int, more: list[str], show: str, axis: str) -> tuple[go.Figure, str, pd.DataFrame]:
    """The curves, what is missing from them, and the settings in which the runs differ."""
    names = chosen(run, other, more)
    tables, configs = {name: metrics_of(name) for name in names}, {name: config_of(name) for name in names}
    make, column = SHOWN[show]
    figure = make(tables, _caption(configs), x=ALONG[axis])
    table = differences(names)
    lines = [_explained(configs, show)]
    lacking = [name for name in names if not _has(tables[name], column)]
    if lacking:
        lines.append(f"Not recorded for {', '.join(f'`{name}`' for name in lacking)}: {_why(show)}.")
    lines.append(_told_differences(names, table))
    return figure, "\n\n".join(lines), table


def _has(table: pd.DataFrame, column: str) -> bool:
    return any(name.startswith(column) and table[name].notna().any() for name in table.columns)


def _why(show: str) -> str:
    if show == "accuracy":
        return "it was trained before this was measured, or without classes, or nobody looked at held-out images yet"
    return "it is not aligned" if show == "similarity" else "there is no `metrics.jsonl`, or nothing in it yet"


def _explained(configs: dict[str, rl.RunConfig], show: str) -> str:
    """What the curves are, in a sentence."""
    looked = "Thin: training images; thick with marks: up to 512 held-out images, averaged weights."
    text = {
        "nats/dim": f"Negative log-likelihood of noised images. {looked}",
        "bits/dim": f"Nats/dim divided by ln 2, of noised images: no code length of clean ones. {looked}",
        "loss parts": "Total = L_nf + lambda * L_align. L_nf is nats/dim less its constant, L_align minus the mean cosine.",
        "similarity": "Mean cosine over the patches of training images, through the projector.",
        "accuracy": "Classes read off by one gradient step: up to 512 clean held-out images, averaged weights.",
    }[show]
    aligned = {name: config.align.weight for name, config in configs.items() if config.align.taps}
    if show == "loss parts" and aligned:
        text += f" Lambda: {', '.join(f'{weight:g} (`{name}`)' for name, weight in aligned.items())}."
    if show not in ("similarity", "accuracy") and len({_noise(config) for config in configs.values()}) > 1:
        text += " **These runs were trained with different noise: their likelihoods do not compare.**"
    return text


def _caption(configs: dict[str, rl.RunConfig]) -> str:
    """What the runs share in a line, for the figure."""
    noises, seeds = (list(dict.fromkeys(values)) for values in (map(_noise, configs.values()), map(_seed, configs.values())))
    return f"training noise {', '.join(noises)}; training seed {', '.join(seeds)}"


def _seed(config: rl.RunConfig) -> str:
    return str(config.train.seed)


def _noise(config: rl.RunConfig) -> str:
    flow = config.flow
    return f"sigma {flow.noise_std:g}" if flow.noise == "gaussian" else "uniform"


def _told_differences(names: list[str], table: pd.DataFrame) -> str:
    if len(names) < 2:
        return "One run alone: compare it with another one, or add more."
    return (
        "Settings in which these runs differ (- where a run has none):" if len(table) else "These runs have the same settings."
    )


# --- the gradient atlas -----------------------------------------------------------------------------------------------

_tables: "WeakKeyDictionary[rl.Run, dict[str, pd.DataFrame]]" = WeakKeyDictionary()


def tap_choices(run: rl.Run) -> list[tuple[str, str]]:
    """Every layer of the flow, (words, tap); the aligned ones say so."""
    config = run.flow.config
    taps = [Tap(block, layer) for block in range(1, config.blocks + 1) for layer in range(1, config.layers + 1)]
    aligned = run.config.align.taps
    return [(f"block {t.block}, layer {t.layer}{' (aligned)' if t.name in aligned else ''}", t.name) for t in taps]


def tap_in(run: rl.Run, tap: str) -> str:
    """The tap, if the flow has it, else the first aligned one, or a middle layer of the last block but one."""
    taps = [name for _, name in tap_choices(run)]
    if tap in taps:
        return tap
    config = run.flow.config
    return next(iter(run.config.align.taps), Tap(max(1, config.blocks - 1), (config.layers + 1) // 2).name)


def reached(run: rl.Run, tap: str) -> pd.DataFrame:
    """The rows of `rl.routing` for one tap, computed once for a run."""
    kept = _tables.setdefault(run, {})
    if tap not in kept:
        kept[tap] = rl.routing(run, taps=tap)
    return kept[tap]


def draw_atlas(run: str, other: str, seed: int, tap: str) -> tuple[Any, str]:
    """The atlas, if it was computed before."""
    one = get_run(run)
    tap = tap_in(one, tap)
    if tap in _tables.get(one, {}):
        return show_atlas(run, tap)
    note = f"Not computed yet for `{tap}` of this run: real gradients of every strategy, in double precision; a few seconds."
    return gr.Plot(visible=False), note


def show_atlas(run: str, tap: str) -> tuple[Any, str]:
    """The atlas of a run at a tap, computed if need be."""
    one = get_run(run)
    tap = tap_in(one, tap)
    return gr.Plot(atlas(reached(one, tap), tap), visible=True), HOW_TO_READ


# --- training a run ---------------------------------------------------------------------------------------------------


def settings(name: str, preset: str, blocks: list[str], layer: float, weight: float, steps: float, seed: int) -> dict[str, Any]:
    """What the form says, as settings of the preset."""
    given: dict[str, Any] = {"name": name}
    if preset != UNALIGNED:
        given |= {"align.blocks": sorted(map(int, blocks)), "align.layers": [int(layer)], "align.weight": float(weight)}
    often = {"train.report_every": REPORT, "train.look_every": OFTEN, "train.save_every": OFTEN}
    return given | {"train.steps": int(steps)} | often | {"train.seed": seed}


def checked_name(name: str) -> str:
    """The name of a new run; LabError if it cannot be called so, or if there is one."""
    if not re.fullmatch(CALLED, name):
        raise LabError(
            "the name of a run is made of letters A to Z, digits, - _ and . (60 at most), and begins with a letter or a digit"
        )
    if any((root / name).exists() for root in (assets() / "runs", runs_root())):
        raise LabError(f"there is a run {name!r} already: choose another name")
    return name


def begin(seed: float | None, name: str, preset: str, blocks: list[str], layer: float, weight: float, steps: float) -> Training:
    """Begin to train what the form says, in the background."""
    if not desk.may_train:
        raise LabError(CLOSED)
    name = checked_name(name)
    config = rl.preset(preset).override(settings(name, preset, blocks, layer, weight, steps, checked_seed(seed)))
    return trainer.start(config, runs_root() / name, desk.device)


def code(
    run: str, other: str, seed: int, name: str, preset: str, blocks: list[str], layer: float, weight: float, steps: float
) -> Code:
    """The training that the form describes; a name that cannot be taken is replaced."""
    called = name if re.fullmatch(CALLED, name) else SUGGESTED
    given = settings(called, preset, blocks, layer, weight, steps, seed)
    lines = [f"rrepa-lab train {preset} --out runs/{called} --seed {seed} --device {desk.device}"]
    for key, value in given.items():
        if key != "train.seed":
            lines.append("--set " + shlex.quote(f"{key}={json.dumps(value, separators=(',', ':'))}"))
    pairs = "".join(f"    {json.dumps(key)}: {json.dumps(value)},\n" for key, value in given.items())
    python = (
        f"import rrepa_lab as rl\n\nsettings = {{\n{pairs}}}\n"
        f'for report in rl.train("{preset}", "runs/{called}", settings=settings, device="{desk.device}"):\n'
        "    print(report.step, report.nats_per_dim, report.similarity)"
    )
    return Code(" \\\n  ".join(lines), python)


def view() -> tuple[Any, ...]:
    """The training that goes on, or the last one: words, curves, samples, and which buttons can be pressed."""
    now = trainer.training
    if now is None:
        return "", gr.Plot(visible=False), gr.HTML(visible=False), *_buttons(False, False)
    table = Records(now.folder).table()
    figure = gr.Plot(visible=False)
    if len(table) > 1:
        figure = gr.Plot(loss_curves({now.name: table}, f"training seed {now.config.train.seed}"), visible=True)
    samples = gr.HTML(visible=False)
    if now.samples is not None:
        samples = gr.HTML(_samples(now, *now.samples), visible=True)
    return _words(now), figure, samples, *_buttons(trainer.busy, now.report is not None)


def _buttons(busy: bool, there: bool) -> tuple[Any, Any, Any, Any]:
    """Start, stop, pick, and the clock that looks again."""
    start = gr.Button(interactive=desk.may_train and not busy)
    stop = gr.Button(interactive=desk.may_train and busy)
    return start, stop, gr.Button(visible=there and not busy), gr.Timer(active=busy)


def _words(now: Training) -> str:
    name, steps = escape(now.name), now.config.train.steps
    if now.state == "failed":
        return f"<p><b>{name}</b>: training failed. {escape(now.message)}</p>"
    facts = []
    if now.report:
        facts.append(f"{now.report.nats_per_dim:.3f} nats/dim under the training noise")
        near = now.report.similarity.values()
        if near:
            facts.append(f"cosine with the encoder {sum(near) / len(near):.3f}")
        if now.state == "running":
            facts.append(f"about {now.report.remaining:.0f} s left")
        else:
            facts.append(f"{now.report.seconds:.0f} s")
    what = {
        "running": f"step {now.step} of {steps}" if now.report else "beginning",
        "done": f"trained, {steps} steps",
        "stopped": f"stopped at step {now.step} of {steps}, and saved",
    }[now.state]
    if now.state == "running" and now.halt.is_set():
        what += ", stopping"
    bar = f'<progress max="{steps}" value="{now.step}" aria-label="steps of {name}" style="width: 100%"></progress>'
    after = "" if now.state == "running" else " It stands among the runs of the sidebar."
    return f"<p><b>{name}</b>: {'; '.join([what, *facts])}.{after}</p>{bar if now.state == 'running' else ''}"


def _samples(now: Training, step: int, images: Any) -> str:
    """A row a seed, a column a class."""
    classes = images.unflatten(0, (len(SEEDS), -1))
    rows = {
        f"seed {seed}": {str(label): image for label, image in enumerate(part)}
        for seed, part in zip(SEEDS, classes, strict=True)
    }
    finish = "denoised" if now.config.flow.noise == "gaussian" else "rounded down to pixel values"
    caption = f"Samples of {now.name} after {step} steps, by class; no guidance, {finish}."
    return picture_table(rows, caption, what=f"sample, {now.name}")


def draw_form(run: str, other: str, seed: int, *_form: Any) -> tuple[Any, ...]:
    """Where the training stands, and the runs that can be added now; the form itself needs no drawing."""
    return *view(), gr.Dropdown(choices=run_names())


@told
def press_start(seed: float | None, *form: Any) -> tuple[Any, ...]:
    """Begin, and show it as `look` does."""
    begin(seed, *form)
    return True, *view()


@told
def press_stop() -> tuple[Any, ...]:
    """Ask the training to end."""
    if not desk.may_train:
        raise LabError(CLOSED)
    trainer.stop()
    return view()


def look(busy: bool) -> tuple[Any, ...]:
    """Where the training stands, `busy` if it went on when this page looked last; else the runs there are for all pickers."""
    now = trainer.training
    if now is not None and trainer.busy:
        return True, *view(), gr.skip(), gr.skip(), gr.skip()
    if busy and now is not None and now.state == "failed":
        gr.Warning(escape(now.message), title=f"Training of {now.name} failed")
    return False, *view(), *refreshed(), gr.Dropdown(choices=run_names())


@told
def pick() -> Any:
    """The trained run, for the sidebar."""
    if trainer.training is None:
        raise LabError("nothing was trained yet")
    return gr.Dropdown(choices=run_names(), value=trainer.training.name)


# --- the tab ----------------------------------------------------------------------------------------------------------


def build(bar: Bar) -> list[Panel]:
    """The tab."""
    run = get_run(FIRST)
    gr.Markdown("**How do runs learn, with and without alignment, and which parameters does each strategy teach?**")
    with gr.Row():
        more = gr.Dropdown(
            run_names(), value=[], multiselect=True, allow_custom_value=True, label="More runs", elem_id="more-runs",
            info="beside those of the sidebar", min_width=280,
        )  # fmt: skip
        show = gr.Dropdown(list(SHOWN), value="nats/dim", label="Show")
        axis = gr.Dropdown(list(ALONG), value="steps", label="Against")
    curves = gr.Plot(show_label=False, elem_id="curves")
    told_curves = gr.Markdown(elem_id="curves-note")
    settings_table = gr.Dataframe(
        differences([FIRST, SECOND]), interactive=False, wrap=True, show_label=False, elem_id="differences"
    )
    gr.Markdown("### Which parameters does each strategy teach?")
    with gr.Row(equal_height=False):
        tap = gr.Dropdown(
            tap_choices(run), value=tap_in(run, ""), label="Features of", info="of the sidebar's run", elem_id="tap"
        )
        compute = gr.Button("Compute the atlas", size="sm", scale=0, min_width=200, elem_id="compute-atlas")
    reach = gr.Plot(visible=False, show_label=False, elem_id="atlas")
    told_atlas = gr.Markdown(elem_id="atlas-note")
    compute.click(computes(show_atlas), [bar.run, tap], [reach, told_atlas], concurrency_id=MODEL, api_visibility="private")
    gr.Markdown("### Train a small run")
    may = desk.may_train
    if not may:
        gr.Markdown(CLOSED, elem_id="closed")
    gr.Markdown(
        f"On the digits, with the seed of the sidebar, into the folder of local runs; saved every {OFTEN} steps, so the other "
        "tabs can look at it while it learns. It goes on when this page is closed."
    )
    align = run.config.align
    with gr.Row():
        name = gr.Textbox(
            SUGGESTED, label="Name", info="letters, digits, - _ .", max_length=60, min_width=240, interactive=may,
            elem_id="train-name",
        )  # fmt: skip
        preset = gr.Dropdown(
            PRESETS, value=FIRST, label="Preset", info="digits-none aligns nothing", min_width=240, interactive=may
        )
        steps = gr.Slider(50, 2000, 200, step=50, label="Steps", info="of 64 images", interactive=may, elem_id="train-steps")
    with gr.Row():
        blocks = gr.CheckboxGroup(
            [str(number) for number in range(1, run.flow.config.blocks + 1)], value=[str(number) for number in align.blocks],
            label="Aligned blocks", info="1 makes the image", interactive=may,
        )  # fmt: skip
        layer = gr.Slider(
            1, run.flow.config.layers, align.layers[0], step=1, label="Layer", info="of those blocks", interactive=may
        )
        weight = gr.Slider(0, 2, align.weight, step=0.05, label="Lambda", info="weight of alignment", interactive=may)
    with gr.Row():
        start = gr.Button(
            "Start", variant="primary", size="sm", scale=0, min_width=120, interactive=may, elem_id="start-training"
        )
        stop = gr.Button("Stop", size="sm", scale=0, min_width=120, interactive=False, elem_id="stop-training")
        use = gr.Button("Pick it as the run", size="sm", scale=0, min_width=180, visible=False, elem_id="pick-trained")
    progress = gr.HTML(elem_id="training-progress")
    live = gr.Plot(visible=False, show_label=False, elem_id="live")
    samples = gr.HTML(visible=False, elem_id="training-samples")
    busy, clock = gr.State(False), gr.Timer(PACE)  # looks once when a page is opened, and again while a run is trained
    seen = [progress, live, samples, start, stop, use, clock]
    form = {"name": name, "preset": preset, "blocks": blocks, "layer": layer, "lambda": weight, "steps": steps}
    watching: dict[str, Any] = {"concurrency_id": "training", "concurrency_limit": 8, **HIDDEN}
    start.click(press_start, [bar.seed, *form.values()], [busy, *seen], **watching)
    stop.click(press_stop, None, seen, **watching)
    clock.tick(look, busy, [busy, *seen, bar.run, bar.other, more], **watching)
    use.click(pick, None, bar.run, **watching)
    return [
        Panel(form, [*seen, more], draw_form, code, locked=False),
        Panel({"more": more, "show": show, "along": axis}, [curves, told_curves, settings_table], draw_curves, locked=False),
        Panel({"tap": tap}, [reach, told_atlas], draw_atlas, fit=fit),
    ]


def fit(run: rl.Run, tap: str) -> dict[str, Any]:
    """The layers of another run."""
    return {"tap": gr.Dropdown(choices=tap_choices(run), value=tap_in(run, tap))}


if __name__ == "__main__":
    serve([sys.modules[__name__]])
