"""What a tab is made of, and the handlers that draw its panels and describe its view as a link and as code."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component
from page.views import SeedError, View, link_parameters, make_view, own_fields, query_of
from server.handlers import report_error, show_errors, with_model_lock

import rrepa_lab as rl
from rrepa_lab.errors import LabError

DISPLAYS = (gr.HTML, gr.Markdown, gr.Plot, gr.Image, gr.Gallery, gr.Dataframe)  # components that only show something
Values = Mapping[Component, Any]  # what gradio hands to a handler whose inputs are a set


class Code(NamedTuple):
    """A view as code that gives the same numbers."""

    shell: str  # of the command line; "" if it has no such command
    python: str


@dataclass(frozen=True)
class Sidebar:
    """The controls that all tabs share; the names are those of the fields of `View`."""

    run: gr.Dropdown
    other: gr.Dropdown
    seed: gr.Number

    @property
    def components(self) -> dict[str, Component]:
        """The controls by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(frozen=True)
class Panel:
    """A part of a tab that is drawn by itself.

    outputs: the components that are drawn.
    draw: view -> one value for each of `outputs`, or a generator of such. A generator never gives gr.skip() for what it
    gave before: gradio's page turns a value into the next one in place, before it is drawn.
    redraw_on: names of the controls whose changes draw it; None for all of the tab. A change in the sidebar always does.
    stop: a button that ends a long drawing.
    locked: whether the drawing computes with a model, and so holds the model lock.
    slow: whether it may take more than a second; the status line then shows how long (which itself takes a tenth of one).
    """

    outputs: Sequence[Component]
    draw: Callable[[Any], Any]
    redraw_on: Sequence[str] | None = None
    stop: gr.Button | None = None
    locked: bool = True
    slow: bool = False


@dataclass(frozen=True)
class Tab:
    """A tab as `build` returns it: its view, the control of each field, and what is drawn from the view.

    view: the dataclass of its view. controls: a component for each field that it adds to `View`, by name.
    code: view -> the view as code. fit: (run, view) -> updates, by name, of controls whose range depends on the run.

    Raises: ValueError if the names of the controls are not those of the fields.
    """

    view: type[View]
    sidebar: Sidebar
    controls: Mapping[str, Component]
    panels: Sequence[Panel]
    code: Callable[[Any], Code]
    fit: Callable[[rl.Run, Any], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        named = {name for panel in self.panels for name in panel.redraw_on or ()}
        if list(self.controls) != list(own_fields(self.view)) or not named <= set(self.controls):
            raise ValueError(f"{self.view.__name__}: controls {list(self.controls)}, redraw_on {sorted(named)}")

    @property
    def components(self) -> dict[str, Component]:
        """The component of each field of the view."""
        return {**self.sidebar.components, **self.controls}

    @property
    def inputs(self) -> set[Block]:
        """The inputs of an event whose handler takes the view."""
        return set(self.components.values())

    @property
    def linked(self) -> dict[str, Component]:
        """The controls that links restore, by the name of their parameter."""
        return {parameter: self.controls[name] for parameter, name in link_parameters(self.view).items()}

    def redraws(self, panel: Panel) -> list[Component]:
        """The controls whose changes draw a panel."""
        return [self.controls[name] for name in (self.controls if panel.redraw_on is None else panel.redraw_on)]

    def view_of(self, values: Values) -> Any:
        """The view that these values of components make; LabError for a seed out of range."""
        return make_view(self.view, {name: values[one] for name, one in self.components.items() if one in values})

    def on_view(self, handler: Callable[[Any], Any]) -> Callable[[Values], Any]:
        """A handler of `inputs` that calls `handler` with the view."""

        def handle(values: Values) -> Any:
            return handler(self.view_of(values))

        def stream(values: Values) -> Any:
            yield from handler(self.view_of(values))

        return stream if inspect.isgeneratorfunction(handler) else handle


@dataclass(frozen=True)
class Page:
    """The tabs by name, and the components that the events of the page share."""

    tabs: Mapping[str, Tab]
    sidebar: Sidebar
    about: gr.Markdown
    status: gr.Markdown
    tab_bar: gr.Tabs
    active: gr.State  # name of the open tab
    redraw: Mapping[str, gr.State]  # by tab: a new value draws the tab and describes its view
    fitted_run: gr.State  # the run whose ranges the controls have, "" before the first

    @property
    def controls(self) -> list[Component]:
        """The controls of all tabs that links and runs change.

        States are not among them: a state that is an output of an event counts as changed by it in any case.
        """
        controls = [control for tab in self.tabs.values() for control in tab.controls.values()]
        return [control for control in controls if not isinstance(control, gr.State)]


# --- handlers ---------------------------------------------------------------------------------------------------------


def drawing(tab: Tab, panel: Panel, is_open: Callable[[Values], bool]) -> Callable[..., Any]:
    """The handler that draws a panel while its tab is open; after an error nothing of an earlier view stays in it."""

    def draw(values: Values) -> Any:
        if not is_open(values):
            return gr.skip()
        try:
            return panel.draw(tab.view_of(values))
        except LabError as error:
            return cleared(panel, error)

    def stream(values: Values) -> Any:
        if not is_open(values):
            return
        try:
            yield from panel.draw(tab.view_of(values))
        except LabError as error:
            yield cleared(panel, error)

    handler = stream if inspect.isgeneratorfunction(panel.draw) else draw
    return with_model_lock(handler) if panel.locked else show_errors(handler)


def cleared(panel: Panel, error: LabError) -> Any:
    """Updates that empty what a panel has drawn; reports the error, except one of the seed, which all panels share."""
    if not isinstance(error, SeedError):
        report_error(error)
    updates = [gr.update(value=None) if isinstance(output, DISPLAYS) else gr.skip() for output in panel.outputs]
    return updates[0] if len(updates) == 1 else tuple(updates)


def describing(
    name: str, tab: Tab, is_open: Callable[[Values], bool], code_shown: Callable[[Values], bool]
) -> Callable[[Values], Any]:
    """The handler that gives (command line, Python, query of the link) of the open tab.

    It runs once for each change, so it is the place where a seed out of range is reported.
    """

    @show_errors
    def describe(values: Values) -> Any:
        if not is_open(values):
            return gr.skip()
        try:
            view = tab.view_of(values)
        except SeedError as error:
            report_error(error)
            return gr.skip()
        query = query_of(name, view)
        if not code_shown(values):
            return gr.skip(), gr.skip(), query
        code = tab.code(view)
        return code.shell or "# there is no command for this view: see Python", code.python, query

    return describe
