"""Restoring a view from the address that the page was opened with."""

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from page.panels import Page, Tab
from page.sidebar import about_run, other_choices
from page.views import NO_OTHER, check, checked_seed, from_text, make_view
from server.handlers import with_model_lock, without_folders
from server.runs import DEFAULT_OTHER, DEFAULT_RUN, NO_RUN, get_run, run_names

import rrepa_lab as rl
from rrepa_lab.errors import LabError

Updates = dict[Any, Any]  # by component


def restoring(page: Page, new_redraw: Callable[[], Any]) -> Callable[..., Updates]:
    """The handler that fills the page from its address; what does not exist is reported, and left at its default."""

    @with_model_lock
    def restore(open_tab: str, request: gr.Request) -> Updates:
        query, problems = dict(request.query_params), list[str]()
        run, updates = _restored_sidebar(page, query, problems)
        name = query.get("tab", "")
        if name and name not in page.tabs:
            problems.append(f"no tab {name!r}")
        if name in page.tabs and name != open_tab:
            updates[page.tab_bar] = gr.Tabs(selected=name)  # drawn once it has opened
        else:
            updates[page.redraw[open_tab]] = new_redraw()
        if "seed" in query:
            try:
                updates[page.sidebar.seed] = checked_seed(from_text(page.sidebar.seed, query["seed"]))
            except (ValueError, LabError):
                problems.append(f"seed cannot be {query['seed']!r}")
        for key, tab in page.tabs.items():
            updates |= _restored_controls(tab, query if key == name else {}, run, problems)
        if problems:
            gr.Warning(f"Not in this page: {'; '.join(problems)}.", title="Part of the link was ignored")
        return updates

    return restore


def _restored_sidebar(page: Page, query: Mapping[str, str], problems: list[str]) -> tuple[rl.Run, Updates]:
    """The run, and updates of the pickers and of the lines about the run; appends to `problems`.

    Without a link the values are those of the page, or what a quick visitor has chosen meanwhile.
    """
    name, other = query.get("run", DEFAULT_RUN), query.get("compare", DEFAULT_OTHER)
    try:
        run = get_run(name)
    except LabError as error:
        problems.append(without_folders(error))
        name, run = DEFAULT_RUN, get_run(DEFAULT_RUN)
    other = NO_RUN if other == NO_OTHER else other
    names, choices = run_names(), other_choices()
    known = other in (NO_RUN, *names)
    if not known:
        problems.append(f"no run {other!r}")
    linked = bool({"run", "compare"} & set(query))
    return run, {
        page.sidebar.run: gr.Dropdown(choices=names, value=name) if linked else gr.Dropdown(choices=names),
        page.sidebar.other: gr.Dropdown(choices=choices, value=other) if linked and known else gr.Dropdown(choices=choices),
        page.about: about_run(name) if linked else gr.skip(),
        page.fitted_run: name,
    }


def _restored_controls(tab: Tab, query: Mapping[str, str], run: rl.Run, problems: list[str]) -> Updates:
    """Updates of the controls of a tab: what the link has, and what must be brought into the range of the run.

    A control whose range depends on the run is brought into it by `Tab.fit`; the others are checked as they are.
    """
    given: dict[str, Any] = {}
    names = {control: name for name, control in tab.controls.items()}
    for parameter, control in tab.linked.items():
        if parameter in query:
            try:
                given[names[control]] = from_text(control, query[parameter])
            except ValueError:
                problems.append(f"{parameter} cannot be {query[parameter]!r}")
    present = {name: getattr(control, "value", None) for name, control in tab.controls.items()}
    fitted = dict(tab.fit(run, make_view(tab.view, present | given))) if tab.fit else {}
    updates: Updates = {tab.controls[name]: update for name, update in fitted.items()}
    for parameter, control in tab.linked.items():
        name = names[control]
        if name in given and name not in fitted:
            try:
                check(control, given[name])
                updates[control] = given[name]
            except (ValueError, gr.Error):
                problems.append(f"{parameter} cannot be {query[parameter]!r}")
    return updates
