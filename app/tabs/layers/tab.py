"""The features of every layer, and which layer is best aligned: heat maps and curves over blocks and layers."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import pandas as pd
from page.panels import Panel, Sidebar, Tab, Values
from server.downloads import keep_file
from server.handlers import show_errors, with_model_lock, without_folders
from server.runs import get_run, pair, stamp
from server.settings import PRIVATE
from server.shipped import MEASURED, SEEDS, SHIPPED_RUNS, TABLES, modelled, shipped, shipped_name
from tabs.layers.code import code
from tabs.layers.figures import compared_figures, known_figures, plots, shipped_figures, training_figures
from tabs.layers.notes import compared_note, known_note, scores_table
from tabs.layers.studies import (
    PARTS,
    SHIPPED_STUDY,
    STRATEGIES,
    UNSET,
    choose,
    chosen,
    read_study,
    rows_of,
    study_files,
    study_folder,
    study_names,
)
from tabs.layers.tables import DIRECTIONS, KINDS, METRICS, known_rows, measure_and_keep, unmeasured
from tabs.layers.view import CHOICES, PART_NAMES, TABLE, LayersView

from rrepa_lab.errors import LabError
from rrepa_lab.studies.alignment import unguided

NAME, TITLE = "layers", "Layers"
SOURCES = {SEEDS: "several training seeds", SHIPPED_RUNS: "the bundled runs", MEASURED: "measured here"}

# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_notes(view: LayersView) -> tuple[str, Any, str, str, Any]:
    """(note, its rows as CSV) of the table, and (note, scores, rows as CSV) of the settings A and B."""
    rows, remarks = known_rows(pair(view.run, view.other), view.metric, view.direction, view.source, view.strategies)
    remarks = [*_about_table(view), *remarks]
    note = known_note(rows, remarks, view.metric)
    download = _download(rows, f"layers-{view.metric}-{view.direction}-{view.source}.csv")
    try:
        study = read_study(view.study)
    except LabError as error:
        message = f"**This study cannot be shown:** {without_folders(error)}."
        return note, download, message, "", gr.DownloadButton(visible=False)
    settings = chosen(study, *view.choices)
    compared = rows_of(study.layers, settings)
    shown = unguided(compared, view.metric, view.direction) if len(compared) else compared
    return (
        note, download, compared_note(study, settings, view.metric, view.direction), scores_table(study, settings),
        _download(shown, f"alignment-{view.metric}-{view.direction}.csv"),
    )  # fmt: skip


def _about_table(view: LayersView) -> list[str]:
    """That another table is shown than the one that was chosen, or one without the run; nothing where both are right."""
    run = get_run(view.run)
    data, name = modelled(run), shipped_name(run, view.source)
    remarks = []
    if view.source != MEASURED and view.source not in TABLES.get(data, {}):
        shown = SHIPPED_RUNS if name else MEASURED
        remarks.append(f"There is no table of {SOURCES[view.source]} on {data}: this is “{SOURCES[shown]}”.")
    if name and run.name not in {*shipped(TABLES[data][SHIPPED_RUNS])["run"]}:
        remarks.append(f"**{view.run}** is not in this table: choose “{SOURCES[MEASURED]}”.")
    return remarks


def _download(rows: pd.DataFrame, name: str) -> Any:
    if rows.empty:
        return gr.DownloadButton(visible=False)
    return gr.DownloadButton(value=keep_file(name, rows.to_csv(index=False).encode()), visible=True)


def draw_known(view: LayersView) -> list[Any]:
    """Heat maps and curves of the table."""
    if (name := shipped_name(get_run(view.run), view.source)) is not None:
        return plots(shipped_figures(name, view.metric, view.direction, view.strategies), 2)
    rows, _ = known_rows(pair(view.run, view.other), view.metric, view.direction, view.source, view.strategies)
    return plots(known_figures(rows, view.metric), 2)


def draw_compared(view: LayersView) -> list[Any]:
    """Heat maps, curves over layers, and curves over training of A and B."""
    try:
        folder = study_folder(view.study)
        written = stamp(*study_files(folder))
        figures = compared_figures(folder, written, view.metric, view.direction, view.choices)
        return plots([*figures, *training_figures(folder, written, view.choices)], 5)
    except LabError:  # `draw_notes` reports it
        return plots([], 5)


def narrow(view: LayersView) -> list[Any]:
    """Updates of the choices of A and of B: the values there are for each part, given those before it."""
    try:
        settings = read_study(view.study).settings
    except LabError:
        return [gr.skip()] * len(CHOICES)
    updates: list[Any] = []
    for choice in view.choices:
        setting, choices = choose(settings, choice)
        for part, text, values in zip(PARTS, choice, choices, strict=True):
            shown = part != "rest" or len(set(settings["rest"])) > 1
            # a value that stays is not sent: it may have been changed again meanwhile
            value = {} if text == setting[part] else {"value": setting[part]}
            updates.append(gr.update(choices=[(one or UNSET, one) for one in values], visible=shown, **value))
    return updates


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(view: LayersView, progress: gr.Progress | None = None) -> Iterator[tuple[str, Any, int]]:
    """Measure the runs of the sidebar, one kind after the other; what is there already is kept.

    Yields: (status, source to show, measurements made)
    """
    runs, direction, made = pair(view.run, view.other), DIRECTIONS[view.direction], view.measurements
    missing = unmeasured(runs, view.direction)
    for place, (name, run, kind) in enumerate(missing):
        if progress is not None:
            progress((place, len(missing)), desc=f"{name}: {KINDS[kind]}", unit="measurements")
        yield f"Measuring **{name}** on {direction}: {KINDS[kind]} …", gr.skip(), made
        measure_and_keep(run, view.direction, kind)
        made += 1
    names = " and ".join(f"**{name}**" for name in runs)
    status = f"Measured on {direction}: {names}." if missing else f"Already measured on {direction}: {names}."
    yield status, gr.skip() if view.source == MEASURED else MEASURED, made


# --- the tab ----------------------------------------------------------------------------------------------------------


def build(sidebar: Sidebar) -> Tab:
    """The tab; it is drawn when it is opened."""
    default = LayersView()
    controls, known, notes, measuring = _build_table(default)
    study, compared, more_notes = _build_study(default)
    controls |= {**study, "measurements": gr.State(0)}
    tab = Tab(
        LayersView, sidebar, controls,
        [
            Panel([*notes, *more_notes], draw_notes),
            Panel(known, draw_known, TABLE, slow=True),
            Panel(compared, draw_compared, ("metric", "direction", "study", *CHOICES), slow=True),
        ],
        code,
    )  # fmt: skip
    _connect_measuring(tab, *measuring)
    choices = [controls[name] for name in CHOICES]
    quick: dict[str, Any] = {"queue": False, **PRIVATE}
    gr.on(
        [one.change for one in (controls["study"], *choices)], show_errors(tab.on_view(narrow)),
        {controls["study"], *choices}, choices, trigger_mode="always_last", **quick,
    )  # fmt: skip
    controls["study"].focus(lambda: gr.update(choices=study_names()), None, controls["study"], **quick)
    return tab


def _connect_measuring(tab: Tab, start: gr.Button, stop: gr.Button, status: gr.Markdown) -> None:
    @with_model_lock
    def measure_view(
        values: Values,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[tuple[str, Any, int]]:
        yield from measure(tab.view_of(values), progress)

    going = start.click(
        measure_view, tab.inputs, [status, tab.controls["source"], tab.controls["measurements"]],
        concurrency_id="measure", api_visibility="private", show_progress_on=status,
    )  # fmt: skip
    stopped = "Stopped. What was measured so far is kept."
    stop.click(lambda: stopped, None, status, cancels=going, queue=False, **PRIVATE)


def _build_table(default: LayersView) -> tuple[dict[str, Any], list[Any], list[Any], tuple[Any, Any, Any]]:
    """The upper part: controls, plots, notes, and (start, stop, status) of measuring."""
    gr.Markdown(
        "**What can be read from the features of every layer?** A probe predicts the class from the features of a layer; a "
        "similarity compares them with the teacher's, and spatial structure neighbouring tokens with distant ones."
    )
    with gr.Row(equal_height=False):
        metric = gr.Dropdown(_options(METRICS), value=default.metric, label="Measured by", elem_id="layers-metric")
        direction = gr.Radio(_options(DIRECTIONS), value=default.direction, label="Features of", elem_id="layers-read")
    with gr.Row(equal_height=False):
        source = gr.Radio(_options(SOURCES), value=default.source, label="Runs", elem_id="layers-source")
        strategies = gr.CheckboxGroup(
            STRATEGIES, value=list(default.strategies), label="Strategies", elem_id="layers-strategies"
        )
    with gr.Row(equal_height=False):
        known = [gr.Plot(show_label=False, elem_id=place, min_width=320) for place in ("layer-map", "layer-curves")]
    note = gr.Markdown(elem_id="layer-note")
    with gr.Row():
        download = gr.DownloadButton("These rows as CSV", size="sm", visible=False, elem_id="layer-csv")
        start = gr.Button("Measure the two runs of the sidebar", size="sm", elem_id="measure")
        stop = gr.Button("Stop", size="sm", variant="stop", elem_id="measure-stop")
    status = gr.Markdown(
        "For runs that are not in the shipped tables. Digits take about half a minute; of large sets a subset is read.",
        elem_id="measure-note",
    )
    controls = {"metric": metric, "direction": direction, "source": source, "strategies": strategies}
    return controls, known, [note, download], (start, stop, status)


def _build_study(default: LayersView) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """The lower part: the controls that choose A and B, plots, and notes."""
    gr.Markdown(
        "### Which layer is aligned, and how\nTwo settings of a study side by side, by the metric and the images chosen above."
    )
    study = gr.Dropdown(
        study_names(), value=default.study, label="Study", info="or your own: folders of `rrepa-lab batch` in `runs`",
        allow_custom_value=True, elem_id="layers-study",
    )  # fmt: skip
    settings = read_study(SHIPPED_STUDY).settings
    # choices follow each other: a value that is no longer among them is not refused, `choose` falls back
    controls: dict[str, Any] = {"study": study}
    with gr.Row(equal_height=False):
        for letter, choice in zip("ab", default.choices, strict=True):
            choices = choose(settings, choice)[1]
            with gr.Column(min_width=320), gr.Row():
                for part, value, values in zip(PART_NAMES, choice, choices, strict=True):
                    label = "Other settings of " if part == "rest" else f"{part.capitalize()} of "
                    controls[f"{letter}_{part}"] = gr.Dropdown(
                        [(text or UNSET, text) for text in values], value=value, label=label + letter.upper(), min_width=130,
                        allow_custom_value=True, visible=part != "rest", elem_id=f"{letter}-{part}",
                    )  # fmt: skip
    compared = [gr.Plot(show_label=False, elem_id="pair-map")]
    note = gr.Markdown(elem_id="pair-note")
    for places in (("pair-curves", "held-out"), ("near", "held-out-accuracy")):
        with gr.Row(equal_height=False):
            compared += [gr.Plot(show_label=False, elem_id=place, min_width=320) for place in places]
    scores = gr.Markdown(elem_id="pair-scores")
    download = gr.DownloadButton("These layers as CSV", size="sm", visible=False, elem_id="pair-csv")
    return controls, compared, [note, scores, download]


def _options(names: dict[str, str]) -> list[tuple[str, str]]:
    """Choices of a control, (label, value)."""
    return [(label, value) for value, label in names.items()]
