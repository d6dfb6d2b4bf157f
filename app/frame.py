"""The frame around the tabs: the sidebar, the link that brings a view back, the view as code, and serving it all.

A tab is a module with NAME, TITLE and `build(bar) -> Panel`. The frame draws the tab that is open whenever the runs, the
seed or one of its controls change, and keeps the code and the link of the view beside it. Each tab has a state of its own,
its turn; a new value there draws the tab, so that a change makes requests for the tab that is open and for no other.
"""

import argparse
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast
from urllib.parse import urlencode

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import pandas as pd
import torch
from gradio.components import Component
from guard import guards, trusted_hosts
from shell import (
    FIRST,
    HIDDEN,
    LARGEST_SEED,
    NOTHING,
    QUIET,
    SECOND,
    computes,
    desk,
    get_run,
    parameters,
    run_names,
    scores_of,
    told,
    without_folders,
)

from rrepa_lab.errors import LabError
from rrepa_lab.runs.store import pick_device
from rrepa_lab.signals import ending_signals

INTRODUCTION = (
    "# R-REPA lab\nNormalizing flows map images to noise exactly, and back. These small ones were trained on scikit-learn's "
    "8x8 digits, with and without aligning their features to a frozen vision encoder."
)
NO_OTHER = "nothing"
# the link of the view that is open, into the clipboard where the browser allows it, and always into the field beside it
COPY = """(query) => {
    const link = location.origin + location.pathname + query;
    if (navigator.clipboard) navigator.clipboard.writeText(link).catch(() => {});
    history.replaceState(null, '', query);
    return link;
}"""
# on a phone the sidebar lies over the page: it begins closed there
CLOSE_SIDEBAR = "() => { if (innerWidth < 768) document.querySelector('.sidebar.open .toggle-button')?.click(); }"
# the first computation imports much; it begins once the picture is there, else it would slow down the loading of the page
WHEN_PAINTED = """(...values) => new Promise(done => {
    const began = Date.now();
    const look = () => document.querySelector('#way img') || Date.now() - began > 1000
        ? setTimeout(() => done(values), 200) : setTimeout(look, 50);
    look();
})"""
# gradio mounts what a tab or a fold holds when it is first opened, and then fills it with what it knew before: a value that
# arrives meanwhile is lost. So nothing is drawn there before its elements are in the document and filled. PLACES has, by the
# element that opens, the elements to wait for; the first value, if any, becomes the key of the one that is open.
WHEN_MOUNTED = """(...values) => new Promise(done => {
    const places = PLACES, began = Date.now();
    const shown = element => element && getComputedStyle(element).display != 'none';
    const look = () => {
        const open = Object.keys(places).find(place => shown(document.querySelector(place)));
        const there = open && places[open].every(place => document.querySelector(place));
        there || Date.now() - began > 3000 ? wait(2, open) : setTimeout(look, 20);
    };
    const answer = open => done(values.map((value, k) => k ? value : open ?? ''));
    const wait = (frames, open) => frames
        ? requestAnimationFrame(() => wait(frames - 1, open)) : setTimeout(answer, 20, open);
    look();
})"""
OPEN_CODE = """() => {
    const fold = document.querySelector('#code');
    const head = fold.querySelector('button');
    if (!head.classList.contains('open')) head.click();
    fold.scrollIntoView({block: 'center'});
}"""


DRAWN = (gr.HTML, gr.Markdown, gr.Plot, gr.Image, gr.Gallery, gr.Dataframe)  # components that only show something


class Code(NamedTuple):
    """A view as code that gives the same numbers."""

    shell: str  # of the command line; "" if it has no such command
    python: str


@dataclass(frozen=True)
class Bar:
    """The sidebar, whose values every tab is drawn with."""

    run: gr.Dropdown
    other: gr.Dropdown
    seed: gr.Number


@dataclass(frozen=True)
class Panel:
    """A part of a tab that is drawn by itself.

    controls: what the drawing depends on beside the sidebar; their names stand in links. outputs: what is drawn.
    draw: (run, other, seed, *controls, *uses) -> one value for each of `outputs`, or a generator of such. A generator never
    gives gr.skip() for what it gave before: gradio's page turns a value into the next one in place, before it is drawn.
    code: with the same arguments -> Code; the first of a tab is shown. fit: (run, *controls) -> updates, by name,
    of controls whose range depends on the run. uses: what else the drawing depends on, and links leave out.
    stop: a button that ends a long drawing. locked: whether the drawing computes with a model, and so waits for its turn.
    slow: whether it may take more than a second; the status line then shows how long (which itself takes a tenth of one).
    """

    controls: Mapping[str, Component]
    outputs: Sequence[Component]
    draw: Callable[..., Any]
    code: Callable[..., Code] | None = None
    fit: Callable[..., Mapping[str, Any]] | None = None
    uses: Sequence[Component] = ()
    stop: gr.Button | None = None
    locked: bool = True
    slow: bool = False

    @property
    def inputs(self) -> list[Component]:
        """Everything the drawing depends on beside the sidebar."""
        return [*self.controls.values(), *self.uses]


def build_demo(tabs: Sequence[ModuleType], more: Callable[[], None] | None = None) -> gr.Blocks:
    """A page of these tabs, not launched; `more` may add what nobody sees."""
    with gr.Blocks(title="R-REPA lab", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        active, settled = gr.State(tabs[0].NAME), gr.State("")
        turns = {tab.NAME: gr.State(0) for tab in tabs}
        query = gr.Textbox(label="Query", elem_classes="unseen")
        opened = gr.Textbox(label="What opened", elem_classes="unseen")
        with gr.Sidebar(width=300):
            bar, about = _sidebar()
            status = gr.Markdown(status_line(), elem_id="status")
            copy = gr.Button("Copy link", size="sm")
            link = gr.Textbox(label="Link to this view", interactive=False, buttons=["copy"], visible=False, elem_id="link")
            as_code = gr.Button("Show as code", size="sm")
        gr.Markdown(INTRODUCTION)
        panels: dict[str, list[Panel]] = {}
        opening = []
        with gr.Tabs(selected=tabs[0].NAME) as row:
            for tab in tabs:
                with gr.Tab(tab.TITLE, id=tab.NAME, elem_id=f"tab-{tab.NAME}") as one:
                    built = tab.build(bar)
                panels[tab.NAME] = [built] if isinstance(built, Panel) else list(built)
                opening.append(one.select)
        gr.on(
            opening, _opening(active, turns), [opened, active], [active, *turns.values()], js=_when_mounted(panels),
            trigger_mode="always_last", **HIDDEN,
        )  # fmt: skip
        coding = gr.State(False)
        with gr.Accordion("This view as code", open=False, elem_id="code") as fold:
            gr.Markdown("Gives the numbers of the tab that is open. Runs by name: bundled, or a folder in `runs`.")
            codes = [
                gr.Code(language="shell", label="Command line", interactive=False, show_line_numbers=False, lines=1),
                gr.Code(language="python", label="Python", interactive=False, show_line_numbers=False, lines=1),
            ]
        if more:
            more()
        as_code.click(None, js=OPEN_CODE)
        fold.expand(_answer(True), None, coding, js=_mounting({"#code": ["#code .cm-content"]}), **HIDDEN)
        fold.collapse(_answer(False), None, coding, **HIDDEN)
        copy.click(None, query, link, js=COPY).then(lambda: gr.Textbox(visible=True), None, link, queue=False, **HIDDEN)
        sides = [bar.run, bar.other, bar.seed]
        busy = {"show_progress": "minimal", "show_progress_on": status}
        gr.on(
            [bar.other.change, bar.seed.change], lambda open_tab: {turns[open_tab]: _turn()}, active, list(turns.values()),
            trigger_mode="always_last", **HIDDEN,
        )  # fmt: skip
        for name, parts in panels.items():
            for panel in parts:
                drawn = gr.on(
                    [turns[name].change, *(_changed(component) for component in panel.inputs)],
                    _drawing(name, panel), [active, *sides, *panel.inputs], panel.outputs, trigger_mode="always_last",
                    **(QUIET | (busy if panel.slow else {})),
                )  # fmt: skip
                if panel.stop:
                    panel.stop.click(None, cancels=drawn)
            inputs = [component for panel in parts for component in panel.inputs]
            gr.on(
                [turns[name].change, coding.change, *map(_changed, dict.fromkeys(inputs))],
                _describing(name, parts), [active, coding, *sides, *inputs], [*codes, query],
                trigger_mode="always_last", concurrency_id="describe", concurrency_limit=8, **HIDDEN,
            )  # fmt: skip
        fitted = [panel for parts in panels.values() for panel in parts if panel.fit]
        fits = [control for panel in fitted for control in panel.controls.values()]
        bar.run.change(
            _fitting(fitted, turns, settled, about),
            [active, settled, bar.run, *fits],
            [*turns.values(), settled, about, *fits],
            **QUIET,
        )
        everything = [control for parts in panels.values() for panel in parts for control in panel.controls.values()]
        demo.load(None, js=CLOSE_SIDEBAR)
        demo.load(
            _restoring(panels, turns, bar, row, settled, about), active,
            [*sides, row, *turns.values(), settled, about, *everything], js=WHEN_PAINTED, **QUIET,
        )  # fmt: skip
    return demo


def _answer(value: Any) -> Callable[[], Any]:
    return lambda: value


def _turn() -> int:
    """A value that no turn has had."""
    return time.monotonic_ns()


def _opening(active: gr.State, turns: Mapping[str, gr.State]) -> Callable[[str, str], Any]:
    """Draw the tab that has been opened, unless it was the open one already."""

    def opening(opened: str, was_open: str) -> Any:
        name = opened.removeprefix("#tab-")
        return {active: name, turns[name]: _turn()} if name in turns and name != was_open else gr.skip()

    return opening


def _mounting(places: Mapping[str, Sequence[str]]) -> str:
    return WHEN_MOUNTED.replace("PLACES", json.dumps(places))


def _when_mounted(panels: Mapping[str, Sequence[Panel]]) -> str:
    """Wait for what is drawn in the tab that opens."""
    return _mounting({
        f"#tab-{name}": [f"#{output.elem_id}" for panel in parts for output in panel.outputs if output.elem_id]
        for name, parts in panels.items()
    })  # fmt: skip


def _changed(component: Component) -> Any:
    return cast(Any, component).change


def _sidebar() -> tuple[Bar, gr.Markdown]:
    run = gr.Dropdown(run_names(), value=FIRST, label="Run")
    about = gr.Markdown(about_run(FIRST), elem_id="about")
    other = gr.Dropdown(other_choices(), value=SECOND, label="Compare with", info="on the same seed")
    with gr.Row():
        seed = gr.Number(0, precision=0, label="Seed", min_width=120)  # its bounds are told once, by `checked_seed`
        roll = gr.Button("Roll", min_width=60, size="sm", elem_id="roll")
    roll.click(None, None, seed, js="() => Math.floor(Math.random() * 10000)")
    return Bar(run, other, seed), about


def status_line() -> str:
    """What computes here; while it is at work the page shows seconds, and its place in the queue, in this line."""
    if desk.device != "cpu":
        return f"Ready. GPU: {torch.cuda.get_device_name(torch.device(desk.device))}"
    return f"Ready. CPU, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}"


def about_run(name: str) -> str:
    """What a run is, in a few lines: strategy, data, step, scores, device."""
    run = get_run(name)
    config = run.config
    align = config.align
    how = "not aligned" if align.strategy == "none" else f"**{align.strategy}** {align.place}"
    lines = [
        f"{how}  ",
        f"{config.data.name}, {config.flow.blocks} blocks x {config.flow.layers} layers, {parameters(run)}  ",
        f"step {run.step:,} of {config.train.steps:,}, {'GPU' if run.device.type == 'cuda' else 'CPU'}",
    ]
    scores = scores_of(name)
    if scores is not None:
        lines[-1] += "  "
        lines += [f"{line}  " for line in score_words(scores)]
    return "\n".join(lines)


def score_words(scores: pd.DataFrame) -> list[str]:
    """A line for each metric that is shown beside a run: "nats/dim: test 0.209, train 0.170"."""
    shown = {"nats_per_dim": "nats/dim", "gradient_accuracy": "one-step accuracy", "frechet_distance": "Fréchet distance"}
    lines = []
    for metric, words in shown.items():
        rows = scores[scores["metric"] == metric].drop_duplicates("split").set_index("split")["value"]
        if len(rows):
            order = sorted(rows.index, key=lambda split: split != "test")
            lines.append(f"{words}: " + ", ".join(f"{split} {rows[split]:.3g}" for split in order))
    return lines


def other_choices() -> list[Any]:
    """What a run can be compared with."""
    return [(NO_OTHER, NOTHING), *run_names()]


def refreshed() -> tuple[Any, Any]:
    """The pickers of the sidebar with all runs there are now."""
    return gr.Dropdown(choices=run_names()), gr.Dropdown(choices=other_choices())


def _drawing(name: str, panel: Panel) -> Callable[..., Any]:
    """Draw a panel if its tab is the one that is open; after an error nothing of an earlier view stays in it."""

    def draw(active: str, run: str, other: str, seed: int | None, *values: Any) -> Any:
        if active != name:
            return gr.skip()
        try:
            return panel.draw(run, other or NOTHING, checked_seed(seed), *values)
        except LabError as error:
            return cleared(panel, error)

    def stream(active: str, run: str, other: str, seed: int | None, *values: Any) -> Any:
        if active != name:
            return
        try:
            yield from panel.draw(run, other or NOTHING, checked_seed(seed), *values)
        except LabError as error:
            yield cleared(panel, error)

    drawing = stream if inspect.isgeneratorfunction(panel.draw) else draw
    return computes(drawing) if panel.locked else told(drawing)


def cleared(panel: Panel, error: LabError) -> Any:
    """Show the error as a notice; updates that empty what the panel has drawn."""
    gr.Warning(without_folders(error), title="That did not work")
    updates = [gr.update(value=None) if isinstance(output, DRAWN) else gr.skip() for output in panel.outputs]
    return updates[0] if len(updates) == 1 else tuple(updates)


def _describing(name: str, panels: Sequence[Panel]) -> Callable[..., Any]:
    """The query of the view's link and, where the fold is open, the view as code."""
    place, shown = next(((k, panel) for k, panel in enumerate(panels) if panel.code), (0, panels[0]))
    skipped = sum(len(panel.inputs) for panel in panels[:place])

    @told
    def describe(active: str, coding: bool, run: str, other: str, seed: int | None, *values: Any) -> Any:
        if active != name or seed is None:
            return gr.skip()
        facts = {"tab": name, "run": run, "compare": other or NO_OTHER, "seed": int(seed)}
        rest = list(values)
        for panel in panels:
            facts |= {key: _to_text(value) for key, value in zip(panel.controls, rest, strict=False)}
            rest = rest[len(panel.inputs) :]
        link = f"?{urlencode(facts)}"
        if not coding:
            return gr.skip(), gr.skip(), link
        mine = values[skipped : skipped + len(shown.inputs)]
        made = shown.code(run, other or NOTHING, int(seed), *mine) if shown.code else Code("", "")
        return made.shell or "# there is no command for this view: see Python", made.python, link

    return describe


def checked_seed(seed: float | None) -> int:
    """The seed of the sidebar; LabError if its field is empty or out of range."""
    if seed is None:
        raise LabError("the seed is empty: give a whole number from 0 on")
    if not 0 <= seed <= LARGEST_SEED:
        raise LabError(f"the seed must be a whole number from 0 to {LARGEST_SEED}, not {seed:g}")
    return int(seed)


def _to_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "|".join(map(str, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _fitting(
    panels: Sequence[Panel], turns: Mapping[str, gr.State], settled: gr.State, about: gr.Markdown
) -> Callable[..., Any]:
    """Tell about a new run, bring controls into its range, and then draw the tab that is open."""

    @computes
    def fit(open_tab: str, before: str, name: str, *values: Any) -> dict[Any, Any]:
        run, rest = get_run(name), list(values)
        updates: dict[Any, Any] = {settled: name, about: about_run(name)}
        if name != before:  # the run of a link has been drawn already
            updates[turns[open_tab]] = _turn()
        for panel in panels:
            mine, rest = rest[: len(panel.controls)], rest[len(panel.controls) :]
            made = panel.fit(run, *mine) if panel.fit else {}
            updates |= {panel.controls[key]: update for key, update in made.items()}
        return updates

    return fit


def _restoring(
    panels: Mapping[str, Sequence[Panel]],
    turns: Mapping[str, gr.State],
    bar: Bar,
    row: gr.Tabs,
    settled: gr.State,
    about: gr.Markdown,
) -> Callable[..., Any]:
    """Fill the page from the address it was opened with; what does not fit there is told, and left at its default."""

    @computes
    def restore(open_tab: str, request: gr.Request) -> dict[Any, Any]:
        query, names, wrong = dict(request.query_params), run_names(), []
        name, second = query.get("run", FIRST), query.get("compare", SECOND)
        try:
            loaded = get_run(name)
        except LabError as error:
            wrong.append(without_folders(error))
            name, loaded = FIRST, get_run(FIRST)
        # without a link the values are those of the page, or what a quick visitor has chosen meanwhile
        linked = bool({"run", "compare"} & set(query))
        updates: dict[Any, Any] = {
            bar.run: gr.Dropdown(choices=names, value=name) if linked else gr.Dropdown(choices=names),
            about: about_run(name) if linked else gr.skip(),
            settled: name,
        }
        second = NOTHING if second == NO_OTHER else second
        known = second in (NOTHING, *names)
        if not known:
            wrong.append(f"no run {second!r}")
        choices = other_choices()
        updates[bar.other] = gr.Dropdown(choices=choices, value=second) if linked and known else gr.Dropdown(choices=choices)
        tab, controls = query.get("tab", ""), dict[str, Component]({"seed": bar.seed})
        if tab in panels and tab != open_tab:
            updates[row] = gr.Tabs(selected=tab)  # drawn once it has opened
        else:
            updates[turns[open_tab]] = _turn()
        if tab in panels:
            controls |= {key: control for panel in panels[tab] for key, control in panel.controls.items()}
        elif tab:
            wrong.append(f"no tab {tab!r}")
        fitted = [panel for parts in panels.values() for panel in parts if panel.fit]
        # controls whose range depends on the run; a link is held against the range of all others as it stands
        ranged = [
            panel.controls[key]
            for panel in fitted
            if panel.fit
            for key in panel.fit(loaded, *(control.value for control in panel.controls.values()))
        ]
        asked = {}
        for key, control in controls.items():
            if key in query:
                try:
                    value = _from_text(control, query[key], control not in ranged)
                    asked[control] = checked_seed(value) if control is bar.seed else value
                except (ValueError, gr.Error):
                    wrong.append(f"{key} cannot be {query[key]!r}")
        for panel in fitted:  # in the range of this run
            values = {key: asked.get(control, control.value) for key, control in panel.controls.items()}
            made = panel.fit(loaded, *values.values()) if panel.fit else {}
            updates |= {panel.controls[key]: update for key, update in (values | dict(made)).items()}
        updates |= {control: value for control, value in asked.items() if control not in ranged}
        if wrong:
            gr.Warning(f"The link asks for what is not there: {'; '.join(wrong)}.", title="Part of the link was left out")
        return updates

    return restore


def _from_text(control: Component, text: str, check: bool = True) -> Any:
    """The value of a control from a link, checked as if a visitor had set it; ValueError or gr.Error where it cannot be."""
    value: Any = text
    if isinstance(control, gr.Checkbox):
        if text not in ("yes", "no"):
            raise ValueError(text)
        value = text == "yes"
    elif isinstance(control, gr.Slider | gr.Number):
        value = float(text)
        if value.is_integer():
            value = int(value)
    elif isinstance(control, gr.CheckboxGroup) or getattr(control, "multiselect", False):
        value = text.split("|") if text else []
    if check:
        control.preprocess(value)
    return value


# --- serving ----------------------------------------------------------------------------------------------------------


def launch(demo: gr.Blocks, host: str, port: int | None, hosts: Sequence[str] = (), **more: Any) -> Any:
    """Serve the page with its look and its limits, under `trusted_hosts`; `more` goes to `gr.Blocks.launch`."""
    return demo.queue(max_size=64, default_concurrency_limit=8).launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Soft(
            primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
        css_paths=Path(__file__).parent / "page.css",
        footer_links=["api"],
        run_history=False,
        max_file_size="10mb",
        show_error=True,
        ssr_mode=False,
        app_kwargs=guards(trusted_hosts(host, bool(more.get("share")), hosts)),
        **more,
    )


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def serve(tabs: Sequence[ModuleType], more: Callable[[], None] | None = None) -> None:
    """Command line of a page: read the flags, open these tabs, and stay."""
    parser = argparse.ArgumentParser(
        description="Open the page of rrepa_lab.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than this machine's can then reach the page"
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="another host name the page may be called by"
    )
    parser.add_argument("--share", action="store_true", help="open a public tunnel to this page")
    parser.add_argument("--run-dir", type=Path, help="folder whose runs are offered beside the bundled ones (default: runs)")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for these; also from $RREPA_AUTH")
    parser.add_argument("--mcp", action="store_true", help="offer the endpoints to MCP clients too (needs gradio[mcp])")
    given = parser.parse_args()
    auth = given.auth or os.environ.get("RREPA_AUTH")
    if auth and ":" not in auth:
        parser.error("--auth takes USER:PASSWORD")
    if given.run_dir is not None:
        if not given.run_dir.is_dir():
            parser.error(f"--run-dir {given.run_dir} is no folder")
        os.environ["RREPA_RUNS"] = str(given.run_dir.resolve())
    try:
        desk.device = str(pick_device(given.device))
    except LabError as error:
        parser.error(str(error))
    if given.mcp:
        try:
            import_module("mcp")
        except ImportError:
            parser.error('--mcp needs one more package: pip install "gradio[mcp]"')
    open_to_others = given.share or given.host not in ("127.0.0.1", "localhost", "::1")
    desk.may_train = not open_to_others or bool(auth)
    if open_to_others:
        print(
            "This page can be reached by others: they can draw samples and classify pictures with every run it lists"
            + (", and train, once they gave the password." if auth else "; training is off without --auth.")
        )
    for number in ending_signals():  # all end the page like Ctrl-C, so that a training is saved
        signal.signal(number, _interrupt)
    try:
        launch(
            build_demo(tabs, more), given.host, given.port, given.allow_host, share=given.share, mcp_server=given.mcp,
            auth=tuple(auth.split(":", 1)) if auth else None,
        )  # fmt: skip
    except OSError as error:
        sys.exit(f"error: {error}; another page may be open there: choose another --port")
