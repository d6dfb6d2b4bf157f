"""The page around the tabs: its parts, and the events that connect them.

A tab is a module with NAME, TITLE and `build(sidebar) -> Tab`. Three rules connect the tabs (`panels`) with the page:

- A change of the sidebar, or opening a tab, gives the redraw trigger of the open tab a new value. Its panels are drawn
  when this trigger changes, so that only the open tab makes requests.
- A change of a control draws the panels that name it in `redraw_on`.
- Each of these also describes the view once, as a link and, if the accordion is open, as code.
"""

import os
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from gradio.components import Component
from page.links import restoring
from page.panels import Page, Sidebar, Tab, Values, describing, drawing
from page.scripts import script, when_mounted
from page.sidebar import about_run, build_sidebar, status_line
from server.handlers import with_model_lock
from server.runs import get_run
from server.settings import PRIVATE, PRIVATE_MODEL

INTRODUCTION = (
    "# R-REPA lab\nNormalizing flows map images to noise exactly, and back. The bundled ones are small and were trained on "
    "scikit-learn's 8x8 digits and on CIFAR-10's 32x32 photographs, with and without aligning their features to a frozen "
    "vision encoder."
)


class Description(NamedTuple):
    """The components that show the open view as a link and as code."""

    copy: gr.Button
    link: gr.Textbox
    as_code: gr.Button
    query: gr.Textbox  # hidden; the query of the link
    accordion: gr.Accordion
    code_shown: gr.State  # whether the accordion is open
    codes: list[gr.Code]  # command line, Python


def build_demo(tabs: Sequence[ModuleType], more: Callable[[], None] | None = None) -> gr.Blocks:
    """A page of these tabs, not launched; `more` may add hidden components."""
    with gr.Blocks(title="R-REPA lab", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        active, fitted_run = gr.State(tabs[0].NAME), gr.State("")
        redraw = {tab.NAME: gr.State(0) for tab in tabs}
        query = gr.Textbox(label="Query", elem_classes="unseen")
        opened = gr.Textbox(label="What opened", elem_classes="unseen")
        with gr.Sidebar(width=300):
            sidebar, about = build_sidebar()
            status = gr.Markdown(status_line(), elem_id="status")
            copy = gr.Button("Copy link", size="sm")
            link = gr.Textbox(label="Link to this view", interactive=False, buttons=["copy"], visible=False, elem_id="link")
            as_code = gr.Button("Show as code", size="sm")
        gr.Markdown(INTRODUCTION)
        tab_bar, built = _build_tabs(tabs, sidebar)
        page = Page(built, sidebar, about, status, tab_bar, active, redraw, fitted_run)
        # no tab changes when the page is loaded, as the select of the first one would say: `restoring` draws that one
        tab_bar.change(
            _opening(page), [opened, active], [active, *redraw.values()], js=_when_tab_mounted(built),
            trigger_mode="always_last", **PRIVATE,
        )  # fmt: skip
        description = Description(copy, link, as_code, query, *_build_code())
        if more:
            more()
        _connect_description(description)
        for name in built:
            _connect_tab(page, name, description)
        _connect_sidebar(page)
        demo.load(None, js=script("close_sidebar"))
        outputs = [*sidebar.components.values(), tab_bar, *redraw.values(), fitted_run, about, *page.controls]
        demo.load(restoring(page, _new_redraw), active, outputs, js=script("when_painted"), **PRIVATE_MODEL)
    return demo


# --- parts ------------------------------------------------------------------------------------------------------------


def _build_tabs(tabs: Sequence[ModuleType], sidebar: Sidebar) -> tuple[gr.Tabs, dict[str, Tab]]:
    """The tabs, and what they are made of by name."""
    built: dict[str, Tab] = {}
    with gr.Tabs(selected=tabs[0].NAME) as tab_bar:
        for tab in tabs:
            with gr.Tab(tab.TITLE, id=tab.NAME, elem_id=f"tab-{tab.NAME}"):
                built[tab.NAME] = tab.build(sidebar)
    return tab_bar, built


def _build_code() -> tuple[gr.Accordion, gr.State, list[gr.Code]]:
    """The accordion with the view as code, whether it is open, and its fields."""
    code_shown = gr.State(False)
    with gr.Accordion("This view as code", open=False, elem_id="code") as accordion:
        gr.Markdown("Computes the numbers of the open tab. Runs by name: bundled, or a folder in `runs`.")
        codes = [
            gr.Code(language="shell", label="Command line", interactive=False, show_line_numbers=False, lines=1),
            gr.Code(language="python", label="Python", interactive=False, show_line_numbers=False, lines=1),
        ]
    return accordion, code_shown, codes


# --- events -----------------------------------------------------------------------------------------------------------


def _connect_description(description: Description) -> None:
    """The buttons that copy the link and open the code."""
    link = description.link
    description.as_code.click(None, js=script("open_code"))
    description.copy.click(None, description.query, link, js=script("copy_link")).then(
        lambda: gr.Textbox(visible=True), None, link, queue=False, **PRIVATE
    )
    mounted = when_mounted({"#code": ["#code .cm-content"]})
    description.accordion.expand(lambda: True, None, description.code_shown, js=mounted, **PRIVATE)
    description.accordion.collapse(lambda: False, None, description.code_shown, **PRIVATE)


def _connect_tab(page: Page, name: str, description: Description) -> None:
    """Draw the panels of a tab, and describe its view, when its values change."""
    tab, redraw = page.tabs[name], page.redraw[name].change
    inputs = {page.active, *tab.inputs}

    def is_open(values: Values) -> bool:
        return bool(values[page.active] == name)

    def code_shown(values: Values) -> bool:
        return bool(values[description.code_shown])

    timed: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": page.status}
    for panel in tab.panels:
        drawn = gr.on(
            [redraw, *map(_changed, tab.redraws(panel))], drawing(tab, panel, is_open), inputs, panel.outputs,
            trigger_mode="always_last", **(PRIVATE_MODEL | (timed if panel.slow else {})),
        )  # fmt: skip
        if panel.stop:
            panel.stop.click(None, cancels=drawn)
    gr.on(
        [redraw, description.code_shown.change, *map(_changed, tab.controls.values())],
        describing(name, tab, is_open, code_shown), inputs | {description.code_shown}, [*description.codes, description.query],
        trigger_mode="always_last", concurrency_id="describe", concurrency_limit=8, **PRIVATE,
    )  # fmt: skip


def _connect_sidebar(page: Page) -> None:
    """Draw the open tab when the sidebar changes; for another run, first bring the controls of all tabs into its range."""
    redraws = list(page.redraw.values())
    gr.on(
        [page.sidebar.other.change, page.sidebar.seed.change],
        lambda open_tab: {page.redraw[open_tab]: _new_redraw()}, page.active, redraws,
        trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    page.sidebar.run.change(
        _fitting(page), {page.active, page.fitted_run, page.sidebar.run, *page.controls},
        [*redraws, page.fitted_run, page.about, *page.controls], **PRIVATE_MODEL,
    )  # fmt: skip


def _new_redraw() -> int:
    """A value that no redraw trigger has had."""
    return time.monotonic_ns()


def _changed(component: Component) -> Any:
    return cast(Any, component).change


def _opening(page: Page) -> Callable[[str, str], Any]:
    """Draw the tab that has been opened, unless it was the open one already."""

    def open_tab(opened: str, active: str) -> Any:
        name = opened.removeprefix("#tab-")
        if name not in page.tabs or name == active:
            return gr.skip()
        return {page.active: name, page.redraw[name]: _new_redraw()}

    return open_tab


def _when_tab_mounted(tabs: dict[str, Tab]) -> str:
    """Wait for the outputs of the tab that opens."""
    return when_mounted({
        f"#tab-{name}": [f"#{output.elem_id}" for panel in tab.panels for output in panel.outputs if output.elem_id]
        for name, tab in tabs.items()
    })  # fmt: skip


def _fitting(page: Page) -> Callable[[Values], dict[Any, Any]]:
    """Describe a new run, bring controls into its range, and then draw the open tab."""

    @with_model_lock
    def fit(values: Values) -> dict[Any, Any]:
        name = values[page.sidebar.run]
        run = get_run(name)
        updates: dict[Any, Any] = {page.fitted_run: name, page.about: about_run(name)}
        if name != values[page.fitted_run]:  # the run of a link has been drawn already
            updates[page.redraw[values[page.active]]] = _new_redraw()
        for tab in page.tabs.values():
            if tab.fit:
                fitted = tab.fit(run, tab.view_of(values))
                updates |= {tab.controls[key]: update for key, update in fitted.items()}
        return updates

    return fit
