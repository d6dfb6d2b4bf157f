"""How runs learned, which parameters each strategy teaches, and a small run trained from the page."""

from typing import Any
from weakref import WeakKeyDictionary

import gradio as gr
import pandas as pd
import plotly.graph_objects as go
from page.panels import Panel, Sidebar, Tab
from server.handlers import show_errors, with_model_lock
from server.runs import DEFAULT_OTHER, DEFAULT_RUN, NO_RUN, get_run, run_names
from server.settings import MODEL_QUEUE, PRIVATE, server_settings
from tabs.training.curves import AXES, SHOWN, curves_of, differences
from tabs.training.form import CLOSED, SAVE_EVERY, code, draw_form, pick, press_start, press_stop, refresh
from tabs.training.view import CURVES, FORM, TrainingView

import rrepa_lab as rl
from rrepa_lab.flow.taps import Tap
from rrepa_lab.runs.presets import ALIGNED
from rrepa_lab.viz.routing import atlas

NAME, TITLE = "training", "Training"
PRESETS = [f"digits-{strategy}" for strategy in ALIGNED]
POLL_SECONDS = 2.0  # between two refreshes during a training
HOW_TO_READ = (
    "A filled cell is a part of the flow that the alignment loss of this strategy changes, the more the brighter: `forward` "
    "teaches the aligned block up to its layer and all blocks before it (towards the image), `detach` the former alone, "
    "`reverse` the whole block and all after it (towards the noise), through which an image is generated."
)


# --- curves -----------------------------------------------------------------------------------------------------------


def draw_curves(view: TrainingView) -> tuple[go.Figure, str, Any]:
    """The curves of the sidebar's runs and of those that were added, a note, and the settings in which they differ."""
    names = [name for name in dict.fromkeys((view.run, view.other, *view.more)) if name != NO_RUN]
    figure, note, table = curves_of(names, view.show, view.axis)
    return figure, note, gr.update(value=table, visible=len(table) > 0)


# --- the gradient atlas -----------------------------------------------------------------------------------------------

_tables: "WeakKeyDictionary[rl.Run, dict[str, pd.DataFrame]]" = WeakKeyDictionary()


def tap_choices(run: rl.Run) -> list[tuple[str, str]]:
    """Every layer of the flow, (label, tap); the aligned ones are marked."""
    config = run.flow.config
    taps = [Tap(block, layer) for block, depth in enumerate(config.depths, start=1) for layer in range(1, depth + 1)]
    aligned = run.config.align.taps
    return [(f"block {t.block}, layer {t.layer}{' (aligned)' if t.name in aligned else ''}", t.name) for t in taps]


def tap_in(run: rl.Run, tap: str) -> str:
    """The tap, if the flow has it, else the first aligned one, or a middle layer of the last block but one."""
    taps = [name for _, name in tap_choices(run)]
    if tap in taps:
        return tap
    block = max(1, run.flow.config.blocks - 1)
    return next(iter(run.config.align.taps), Tap(block, (run.flow.config.layers_of(block) + 1) // 2).name)


def routing_of(run: rl.Run, tap: str) -> pd.DataFrame:
    """The rows of `rl.routing` for one tap, computed once for a run."""
    kept = _tables.setdefault(run, {})
    if tap not in kept:
        kept[tap] = rl.routing(run, taps=tap)
    return kept[tap]


def draw_atlas(view: TrainingView) -> tuple[Any, str]:
    """The atlas, if it was computed before."""
    run = get_run(view.run)
    tap = tap_in(run, view.tap)
    if tap in _tables.get(run, {}):
        return compute_atlas(view)
    note = f"Not computed yet for `{tap}` of this run: real gradients of every strategy, in double precision; a few seconds."
    return gr.Plot(visible=False), note


def compute_atlas(view: TrainingView) -> tuple[Any, str]:
    """The atlas of a run at a tap, computed if need be."""
    run = get_run(view.run)
    tap = tap_in(run, view.tap)
    return gr.Plot(atlas(routing_of(run, tap), tap), visible=True), HOW_TO_READ


def fit(run: rl.Run, view: TrainingView) -> dict[str, Any]:
    """The layers of another run."""
    return {"tap": gr.Dropdown(choices=tap_choices(run), value=tap_in(run, view.tap))}


# --- the tab ----------------------------------------------------------------------------------------------------------


def build(sidebar: Sidebar) -> Tab:
    """The tab."""
    default = TrainingView()
    gr.Markdown("**How do runs learn, with and without alignment, and which parameters does each strategy teach?**")
    curve_controls, curves = _build_curves(default)
    tap, compute, routes = _build_atlas(default)
    form = _build_form(default)
    progress = _build_progress()
    controls = {**form, **curve_controls, "tap": tap}
    more = controls["more"]
    tab = Tab(
        TrainingView, sidebar, controls,
        [
            Panel([*progress, more], draw_form, FORM, locked=False),
            Panel(curves, draw_curves, CURVES, locked=False),
            Panel(routes, draw_atlas, ("tap",)),
        ],
        code, fit,
    )  # fmt: skip
    compute.click(
        with_model_lock(tab.on_view(compute_atlas)),
        {sidebar.run, tap},
        routes,
        concurrency_id=MODEL_QUEUE,
        api_visibility="private",
    )
    _connect_progress(tab, progress)
    return tab


def _build_curves(default: TrainingView) -> tuple[dict[str, Any], list[Any]]:
    """The controls of the curves, and the figure, its note and the table of differences."""
    with gr.Row():
        more = gr.Dropdown(
            run_names(), value=list(default.more), multiselect=True, allow_custom_value=True, label="More runs",
            elem_id="more-runs", info="in addition to those of the sidebar", min_width=280,
        )  # fmt: skip
        show = gr.Dropdown(list(SHOWN), value=default.show, label="Show")
        axis = gr.Dropdown(list(AXES), value=default.axis, label="Against")
    curves = gr.Plot(show_label=False, elem_id="curves")
    note = gr.Markdown(elem_id="curves-note")
    table = gr.Dataframe(
        differences([DEFAULT_RUN, DEFAULT_OTHER]), interactive=False, wrap=True, show_label=False, elem_id="differences"
    )
    return {"more": more, "show": show, "axis": axis}, [curves, note, table]


def _build_atlas(default: TrainingView) -> tuple[gr.Dropdown, gr.Button, list[Any]]:
    """The layer, the button that computes, and the atlas with its note."""
    run = get_run(DEFAULT_RUN)
    gr.Markdown("### Which parameters does each strategy teach?")
    with gr.Row(equal_height=False):
        tap = gr.Dropdown(
            tap_choices(run), value=tap_in(run, default.tap), label="Features of", info="of the sidebar's run", elem_id="tap"
        )
        compute = gr.Button("Compute the atlas", size="sm", scale=0, min_width=200, elem_id="compute-atlas")
    return tap, compute, [gr.Plot(visible=False, show_label=False, elem_id="atlas"), gr.Markdown(elem_id="atlas-note")]


def _build_form(default: TrainingView) -> dict[str, Any]:
    """The controls of a new run."""
    config, may = get_run(DEFAULT_RUN).flow.config, server_settings.may_train
    gr.Markdown("### Train a small run")
    if not may:
        gr.Markdown(CLOSED, elem_id="closed")
    gr.Markdown(
        f"On the digits, with the seed of the sidebar, into the folder of local runs; saved every {SAVE_EVERY} steps, so that "
        "the other tabs can show it while it learns. It goes on when this page is closed."
    )
    with gr.Row():
        name = gr.Textbox(
            default.name, label="Name", info="letters, digits, - _ .", max_length=60, min_width=240, interactive=may,
            elem_id="train-name",
        )  # fmt: skip
        preset = gr.Dropdown(
            PRESETS, value=default.preset, label="Preset", info="digits-none aligns nothing", min_width=240, interactive=may
        )
        steps = gr.Slider(
            50, 2000, default.steps, step=50, label="Steps", info="of 64 images", interactive=may, elem_id="train-steps"
        )
    with gr.Row():
        blocks = gr.CheckboxGroup(
            [str(number) for number in range(1, config.blocks + 1)], value=list(default.blocks),
            label="Aligned blocks", info="1 makes the image", interactive=may,
        )  # fmt: skip
        layer = gr.Slider(1, max(config.depths), default.layer, step=1, label="Layer", info="of those blocks", interactive=may)
        weight = gr.Slider(0, 2, default.weight, step=0.05, label="Lambda", info="weight of alignment", interactive=may)
    return {"name": name, "preset": preset, "blocks": blocks, "layer": layer, "weight": weight, "steps": steps}


def _build_progress() -> list[Any]:
    """The outputs of `form.progress_updates`: text, curves, samples, start, stop, pick and the timer."""
    may = server_settings.may_train
    with gr.Row():
        start = gr.Button(
            "Start", variant="primary", size="sm", scale=0, min_width=120, interactive=may, elem_id="start-training"
        )
        stop = gr.Button("Stop", size="sm", scale=0, min_width=120, interactive=False, elem_id="stop-training")
        use = gr.Button("Pick it as the run", size="sm", scale=0, min_width=180, visible=False, elem_id="pick-trained")
    text = gr.HTML(elem_id="training-progress")
    curves = gr.Plot(visible=False, show_label=False, elem_id="live")
    samples = gr.HTML(visible=False, elem_id="training-samples")
    # `draw_form` starts the timer when the tab opens during a training, `press_start` with a new one
    return [text, curves, samples, start, stop, use, gr.Timer(POLL_SECONDS, active=False)]


def _connect_progress(tab: Tab, progress: list[Any]) -> None:
    """The buttons of the form, and the timer."""
    *_, start, stop, use, timer = progress
    sidebar, form = tab.sidebar, {tab.controls[name] for name in FORM}
    busy = gr.State(False)
    background: dict[str, Any] = {"concurrency_id": "training", "concurrency_limit": 8, **PRIVATE}
    start.click(show_errors(tab.on_view(press_start)), {sidebar.seed, *form}, [busy, *progress], **background)
    stop.click(press_stop, None, progress, **background)
    timer.tick(refresh, busy, [busy, *progress, sidebar.run, sidebar.other, tab.controls["more"]], **background)
    use.click(pick, None, sidebar.run, **background)
