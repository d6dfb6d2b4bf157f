"""Controls where a person sits, still figures where papermill runs: the same call shows either."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import plotly.graph_objects as go

from rrepa_lab.errors import LabError

T = TypeVar("T")
SWITCH = "RREPA_WIDGETS"  # "on" or "off" overrules what is found out


def live() -> bool:
    """Whether somebody can move a control: a kernel of JupyterLab, Notebook, VS Code or Colab, not of papermill."""
    if os.environ.get(SWITCH) in ("on", "off"):
        return os.environ[SWITCH] == "on"
    return "JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ or "google.colab" in sys.modules


def explore(draw: Callable[..., Any], start: Mapping[str, Any] | None = None, **choices: Iterable[Any]) -> None:
    """Show what `draw` makes of the values chosen, below a control for each of them; without a person, of the first ones.

    Numbers get a slider, names a list; both know the arrow keys.

    Args:
        draw: called with a value for each name in `choices`; returns a plotly figure, or anything that can be displayed.
        start: the values to begin with, where these are not the first.
        choices: name of a control -> what can be chosen there.
    """
    from IPython.display import display

    options = {name: list(values) for name, values in choices.items()}
    first = {name: values[0] for name, values in options.items()} | dict(start or {})
    if not live():
        shown = draw(**first)
        if shown is not None:
            _show(shown)
        return
    import ipywidgets

    controls = {name: _control(name, values, first[name]) for name, values in options.items()}
    stage = ipywidgets.VBox([_widget(draw, first)])

    def change(_change: Any) -> None:
        stage.children = [_widget(draw, {name: control.value for name, control in controls.items()})]

    for control in controls.values():
        control.observe(change, names="value")
    display(ipywidgets.VBox([ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"}), stage]))


def watch(reports: Iterable[T], draw: Callable[[], go.Figure], every: float = 1.0, still: bool = True) -> Iterator[T]:
    """Pass `reports` on one by one; where a person sits, the figure is drawn again as they come, at most once in `every` s.

    At the end the figure stands below the cell in either case, drawn from all of them, unless `still` is False and nobody sits.
    """
    from IPython.display import display

    handle: Any = None
    last = time.monotonic()
    for report in reports:
        yield report
        if live() and time.monotonic() - last >= every:
            last = time.monotonic()
            if handle is None:
                handle = display(draw(), display_id=True)
            else:
                handle.update(draw())
    if handle is not None:
        handle.update(draw())
    elif still:
        draw().show()


def _control(name: str, values: list[Any], first: Any) -> Any:
    import ipywidgets

    look = {"options": values, "value": first, "description": name.replace("_", " "), "style": {"description_width": "initial"}}
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return ipywidgets.SelectionSlider(continuous_update=False, **look)
    return ipywidgets.Dropdown(**look)


def _widget(draw: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """What `draw` made, as a widget; a mistake in the values is shown in its place."""
    import ipywidgets

    try:
        shown = draw(**values)
    except LabError as error:
        return ipywidgets.Label(str(error))
    if isinstance(shown, go.Figure):
        return go.FigureWidget(shown)
    out = ipywidgets.Output()
    with out:
        _show(shown)
    return out


def _show(shown: Any) -> None:
    from IPython.display import display

    if isinstance(shown, go.Figure):
        shown.show()
    else:
        display(shown)
