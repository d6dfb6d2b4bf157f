"""What every layer knows, and which layer is best aligned: heat maps and curves over blocks and layers."""

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import pandas as pd
from frame import Bar, Code, Panel, serve
from shell import HIDDEN, computes, get_run, keep_file, pair, stamp, told, without_folders

import rrepa_lab as rl
from rrepa_lab.errors import LabError
from rrepa_lab.flow.taps import Tap
from rrepa_lab.measurements.compare import settings_in
from rrepa_lab.paths import assets, runs_root
from rrepa_lab.studies.alignment import (
    ALIGNED,
    BUNDLED,
    MEASURES,
    curves_of,
    layers_in,
    load_study_tables,
    setting_name,
    study_settings,
    unguided,
)
from rrepa_lab.studies.reading import LAYERS, load_table
from rrepa_lab.viz.layers import layer_curves, layer_map
from rrepa_lab.viz.training import setting_curves

NAME, TITLE = "layers", "Layers"
METRICS = {
    "linear_accuracy": "accuracy of a linear probe", "knn_accuracy": "accuracy of k-NN", "cknna": "CKNNA with the teacher",
    "cka": "linear CKA with the teacher", "mutual_knn": "mutual k-NN with the teacher",
    "teacher_cosine": "cosine to the teacher, through the projector",
}  # fmt: skip
DIRECTIONS = {"forward": "real images", "reverse": "the generating pass"}
SEEDS, SHIPPED_RUNS, MEASURED = "seeds", "bundled", "measured"
SOURCES = {SEEDS: "several training seeds", SHIPPED_RUNS: "the bundled runs", MEASURED: "measured here"}
TABLES = {SEEDS: f"{LAYERS}-seeds", SHIPPED_RUNS: LAYERS}
STRATEGIES = ["none", "forward", "detach", "reverse"]
KINDS = {"linear": "linear probes", "knn": "k-NN probes", "similarity": "similarity to the teacher"}
MANY, ENOUGH = 5000, 2000  # of more training images than MANY, only the first ENOUGH are read
SHIPPED_STUDY = "the shipped study"
UNSET = "-"
PARTS = (*ALIGNED, "rest")  # what is picked one after the other
WORDS = ("strategy", "blocks", "layer", "rest")
START = (("reverse", "3,4", "2", ""), ("detach", "1,2,3,4", "2", ""))
SCORES = {
    "nats_per_dim": "nats/dim, held out (lower is better)", "gradient_accuracy": "accuracy of one gradient step",
    "bayes_accuracy": "accuracy of Bayes' rule", "frechet_distance": "Fréchet distance (lower is better)",
    "label_agreement": "samples that show the class asked for",
}  # fmt: skip


# --- tables -----------------------------------------------------------------------------------------------------------


def shipped(source: str) -> pd.DataFrame:
    """The shipped table of a source."""
    return _shipped(source, table_stamp(source))


def table_stamp(source: str) -> tuple[int, ...]:
    """When the shipped table of a source was written."""
    return stamp(assets() / "studies" / f"{TABLES[source]}.csv")


@lru_cache(maxsize=4)
def _shipped(source: str, _written: tuple[int, ...]) -> pd.DataFrame:
    return load_table(TABLES[source])


_measured: dict[tuple[rl.Run, str, str], pd.DataFrame] = {}  # by run, direction and kind; a run that changed is another run


def measured_rows(runs: dict[str, rl.Run], direction: str) -> pd.DataFrame:
    """All that was measured here of these runs, under the names they have in the sidebar."""
    found = [
        _measured[run, direction, kind].assign(run=name)
        for name, run in runs.items() for kind in KINDS if (run, direction, kind) in _measured
    ]  # fmt: skip
    return pd.concat(found, ignore_index=True) if found else shipped(SHIPPED_RUNS).iloc[:0]


def limit_for(run: rl.Run) -> int | None:
    """How many images of each split are read: all of a small set, ENOUGH of a large one, class-balanced."""
    return ENOUGH if len(run.images("train")) > MANY else None


def measure_kind(run: rl.Run, kind: str, direction: str) -> pd.DataFrame:
    """One kind of measurement at every layer, as `rl.probe` or `rl.similarity` gives it."""
    limit = limit_for(run)
    if kind == "similarity":
        return rl.similarity(run, direction=direction, limit=limit or 1000)
    return rl.probe(run, direction=direction, probes=[kind], limit=limit)


def known_rows(
    runs: dict[str, rl.Run], metric: str, direction: str, source: str, strategies: Sequence[str]
) -> tuple[pd.DataFrame, list[str]]:
    """The rows to show, in the order of the strategies or of the sidebar, and in words what is missing among them."""
    if source == MEASURED:
        table, asked = measured_rows(runs, direction), list(runs)
    else:
        table = shipped(source)
        asked = list(dict.fromkeys(table.loc[table["strategy"].isin(list(strategies)), "run"]))
        if not asked:
            return table.iloc[:0], ["Choose at least one strategy."]
    rows = unguided(table, metric, direction)
    rows = rows[rows["run"].isin(asked)]
    there = set(rows.loc[rows["layer"] > 0, "run"])
    missing = [run for run in asked if run not in there]
    if not missing:
        return rows, []
    names = " and ".join(f"**{run}**" for run in missing)
    if source == MEASURED and not set(missing) <= set(table["run"]):
        return rows, [f"{names}: not measured on {DIRECTIONS[direction]} yet. Press “Measure the two runs of the sidebar”."]
    if metric == "teacher_cosine":
        return rows, [f"{names}: no {METRICS[metric]}, because no layer was aligned. Other metrics need no projector."]
    return rows[rows["layer"] > 0], [f"{names}: {METRICS[metric]} was not measured on {DIRECTIONS[direction]}."]


# --- studies ----------------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """All that is known about the settings of a study."""

    settings: pd.DataFrame  # one row a setting: run (its name), the columns of PARTS, and whatever else differs
    scores: pd.DataFrame  # of `rl.compare`
    layers: pd.DataFrame | None
    curves: pd.DataFrame | None
    remarks: list[str]  # what is missing, and how to make it


def study_names() -> list[str]:
    """The shipped study, and folders of `rrepa-lab batch` among the local runs, by name."""
    root = runs_root()
    own = sorted(path.parent.name for path in root.glob(f"*/{MEASURES}")) if root.is_dir() else []
    return [SHIPPED_STUDY, *(name for name in own if name != SHIPPED_STUDY)]


def study_folder(name: str) -> Path | None:
    """The folder of a study on offer, None for the shipped one; LabError for any other name, a path among them."""
    if name not in study_names():
        raise LabError(f"no study {name!r}; known: {', '.join(study_names())}")
    return None if name == SHIPPED_STUDY else runs_root() / name


def read_study(name: str) -> Study:
    """A study on offer; LabError for one that is damaged."""
    folder = study_folder(name)
    return _read_study(folder, stamp(*_files(folder)))


def _files(folder: Path | None) -> list[Path]:
    """Measurements, layers and curves of a study."""
    if folder is None:
        return [assets() / "studies" / f"{BUNDLED}-{part}.csv" for part in ("runs", "layers", "curves")]
    return [folder / MEASURES, folder / "layers.csv", folder / "curves.csv"]


@lru_cache(maxsize=8)
def _read_study(folder: Path | None, _written: tuple[int, ...]) -> Study:
    scores = rl.compare(_files(folder)[0], apart=True)
    remarks: list[str] = []
    layers: pd.DataFrame | None = None
    curves: pd.DataFrame | None = None
    if folder is None:
        layers, curves = load_study_tables()
        settings = curves[["run", *ALIGNED]].drop_duplicates(ignore_index=True)
    else:
        try:
            layers = layers_in(folder)
            if layers is None:
                remarks.append(
                    "What the layers of this study know was not measured yet: "
                    f"`python -m rrepa_lab.studies.alignment runs/{folder.name}` makes it."
                )
        except LabError as error:
            remarks.append(f"{without_folders(error)}.")
        try:
            settings, curves = study_settings(folder), curves_of(folder)
        except LabError as error:
            remarks.append(f"No curves over training: {without_folders(error)}.")
            settings = _settings_from(scores)
    return Study(_with_rest(settings), scores, layers, curves, remarks)


def _settings_from(scores: pd.DataFrame) -> pd.DataFrame:
    """Settings of a study whose runs are not at hand."""
    keys = settings_in(scores)
    known = scores[keys].astype(str).drop_duplicates()
    known = known.assign(**{key: UNSET for key in ALIGNED if key not in keys})
    known = known[[*ALIGNED, *(key for key in keys if key not in ALIGNED)]]
    return known.assign(
        run=[setting_name({str(key): str(text) for key, text in row.items()}) for row in known.to_dict("records")]
    )


def _with_rest(settings: pd.DataFrame) -> pd.DataFrame:
    """The settings with what differs beside the alignment as one text."""
    others = [key for key in settings.columns if key not in ("run", *ALIGNED)]
    texts = [
        ", ".join(f"{key.rsplit('.', 1)[-1]} {row[key]}" for key in others if row[key] != UNSET)
        for row in settings.to_dict("records")
    ]
    return settings.assign(rest=texts)


def choose(settings: pd.DataFrame, wanted: Sequence[str]) -> tuple[dict[str, str], list[list[str]]]:
    """The setting nearest to what is wanted of each of PARTS, and the choices there are for each, given those before it."""
    left, choices = settings, []
    for part, text in zip(PARTS, wanted, strict=True):
        there = list(dict.fromkeys(left[part]))
        if part == ALIGNED[0]:
            there.sort(key=lambda strategy: STRATEGIES.index(strategy) if strategy in STRATEGIES else len(STRATEGIES))
        left = left[left[part] == (text if text in there else there[0])]
        choices.append(there)
    return {str(key): str(text) for key, text in left.iloc[0].items()}, choices


def chosen(study: Study, a: Sequence[str], b: Sequence[str]) -> dict[str, dict[str, str]]:
    """The settings to show by the names they get: A, B, and none beside them where it is neither."""
    first, second = choose(study.settings, a)[0], choose(study.settings, b)[0]
    shown = {f"A: {first['run']}": first}
    if second["run"] != first["run"]:
        shown[f"B: {second['run']}"] = second
    none = study.settings[study.settings[ALIGNED[0]] == "none"]
    if len(none) and "none" not in (first[ALIGNED[0]], second[ALIGNED[0]]):
        alike = none[none["rest"] == first["rest"]]
        row = (alike if len(alike) else none).iloc[0]
        shown[str(row["run"])] = {str(key): str(text) for key, text in row.items()}
    return shown


def rows_of(table: pd.DataFrame | None, settings: dict[str, dict[str, str]]) -> pd.DataFrame:
    """The rows of these settings, in their order and under the names they are shown by."""
    if table is None:
        return pd.DataFrame(columns=["run", "metric", "layer"])
    return pd.concat([table[table["run"] == one["run"]].assign(run=name) for name, one in settings.items()], ignore_index=True)


def aligned_taps(setting: dict[str, str]) -> list[Tap]:
    """Where a setting was aligned."""
    if UNSET in (setting[ALIGNED[1]], setting[ALIGNED[2]]):
        return []
    return [Tap(int(block), int(layer)) for block in setting[ALIGNED[1]].split(",") for layer in setting[ALIGNED[2]].split(",")]


def scores_of_setting(scores: pd.DataFrame, setting: dict[str, str]) -> pd.DataFrame:
    """The rows of a table of `rl.compare` that belong to a setting."""
    keys = settings_in(scores)
    mine = scores
    for key in keys:
        if key in setting:
            mine = mine[mine[key].astype(str) == setting[key]]
    return mine


# --- words ------------------------------------------------------------------------------------------------------------


def number(value: float, sd: float = float("nan")) -> str:
    """ "0.9120 ± 0.0112"."""
    return f"{value:.4f}" if pd.isna(sd) else f"{value:.4f} ± {sd:.4f}"


def best_lines(rows: pd.DataFrame, metric: str) -> dict[str, str]:
    """Where each run is best, with the exact path of the module."""
    if rows.empty or not (rows["layer"] > 0).any():
        return {}
    lines = {}
    for row in rl.best_layer(rows, metric).to_dict("records"):
        where = f"block {row['block']:.0f}, layer {row['layer']:.0f}, `{row['module_path']}`"
        lines[row["run"]] = f"{where}: {number(row['value'], row.get('sd', float('nan')))}"
    return lines


def known_note(rows: pd.DataFrame, remarks: list[str], metric: str) -> str:
    """The best layer of each run, and what is missing."""
    lines = [f"- **{run}** {text}" for run, text in best_lines(rows, metric).items()]
    parts = [f"Best layer by {METRICS[metric]} (★):\n\n" + "\n".join(lines)] if lines else []
    return "\n\n".join([*parts, *remarks])


def compared_note(study: Study, settings: dict[str, dict[str, str]], metric: str, direction: str) -> str:
    """Where A and B were aligned, where they are best, and what is missing."""
    rows = unguided(rows_of(study.layers, settings), metric, direction) if study.layers is not None else pd.DataFrame()
    best = best_lines(rows, metric)
    lines = []
    for name, setting in settings.items():
        paths = ", ".join(f"`{tap.module_path}`" for tap in aligned_taps(setting))
        said = [f"aligned at {paths}" if paths else "not aligned"]
        if name in best:
            said.append(f"best at {best[name]}")
        elif study.layers is not None:
            told = "no layer was aligned, so there is none" if metric == "teacher_cosine" and not paths else "not measured"
            said.append(f"{METRICS[metric]} on {DIRECTIONS[direction]}: {told}")
        lines.append(f"- **{name}**: {'; '.join(said)}")
    if not any(name.startswith("B: ") for name in settings):
        lines.append("- A and B are the same setting: choose another one for B.")
    return "\n\n".join(["\n".join(lines), *study.remarks])


def scores_table(study: Study, settings: dict[str, dict[str, str]]) -> str:
    """Final scores of A and B, one line a metric, with seeds and protocols below."""
    pinned = {name: setting for name, setting in settings.items() if name[:3] in ("A: ", "B: ")}
    cells: dict[str, dict[str, str]] = {}
    protocols, seeds = {}, dict[str, str]()
    for name, setting in pinned.items():
        mine = scores_of_setting(study.scores, setting).dropna(subset=["value"])
        extra = [key for key in settings_in(study.scores) if key not in setting and key != "source"]
        for row in mine.to_dict("records"):
            told = ", ".join(f"{key.rsplit('.', 1)[-1]} {row[key]}" for key in extra if row[key] != UNSET)
            words = SCORES.get(row["metric"], row["metric"]) + (f" ({told})" if told else "")
            cells.setdefault(words, {})[name] = number(row["value"], row["sd"])
            protocols[words] = f"n = {row['n']:.0f}; {row['protocol']}"
        counts = sorted(set(mine["seeds"]))
        seeds[name] = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))) if counts else "0"
    if not cells:
        return "Nothing was scored for these settings."
    lines = [f"| final score | {' | '.join(pinned)} |", f"|---|{'---|' * len(pinned)}"]
    lines += [f"| {words} | {' | '.join(values.get(name, UNSET) for name in pinned)} |" for words, values in cells.items()]
    lines.append(f"| training seeds (mean ± sd) | {' | '.join(seeds.values())} |")
    return "\n".join(lines) + "\n\n" + "  \n".join(f"<small>{words}: {text}</small>" for words, text in protocols.items())


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_words(
    run: str, other: str, _seed: int, metric: str, direction: str, source: str, strategies: list[str], study: str, *pins: Any
) -> tuple[str, Any, str, str, Any]:
    """What both parts say in words, and their tables to take away; `pins` are PARTS of A, PARTS of B, and a counter."""
    rows, remarks = known_rows(pair(run, other), metric, direction, source, strategies)
    note = known_note(rows, remarks, metric)
    download = _download(rows, f"layers-{metric}-{direction}-{source}.csv")
    try:
        read = read_study(study)
    except LabError as error:
        sorry = f"**This study cannot be shown:** {without_folders(error)}."
        return note, download, sorry, "", gr.DownloadButton(visible=False)
    settings = chosen(read, pins[:4], pins[4:8])
    compared = rows_of(read.layers, settings)
    shown = unguided(compared, metric, direction) if len(compared) else compared
    return (
        note, download, compared_note(read, settings, metric, direction), scores_table(read, settings),
        _download(shown, f"alignment-{metric}-{direction}.csv"),
    )  # fmt: skip


def _download(rows: pd.DataFrame, name: str) -> Any:
    if rows.empty:
        return gr.DownloadButton(visible=False)
    return gr.DownloadButton(value=keep_file(name, rows.to_csv(index=False).encode()), visible=True)


def draw_known(
    run: str, other: str, _seed: int, metric: str, direction: str, source: str, strategies: list[str], _counter: int
) -> list[Any]:
    """Heat maps and curves of part A."""
    if source != MEASURED:
        return _shown(_known_figures(source, metric, direction, tuple(strategies), table_stamp(source)), 2)
    rows, _ = known_rows(pair(run, other), metric, direction, source, strategies)
    return _shown(known_figures(rows, metric), 2)


@lru_cache(maxsize=48)
def _known_figures(
    source: str, metric: str, direction: str, strategies: tuple[str, ...], _written: tuple[int, ...]
) -> list[Any]:
    rows, _ = known_rows({}, metric, direction, source, strategies)
    return known_figures(rows, metric)


def known_figures(rows: pd.DataFrame, metric: str) -> list[Any]:
    """Heat maps and curves of the rows; none where no layer was measured."""
    if rows.empty or not (rows["layer"] > 0).any():
        return []
    readable = metric.endswith("_accuracy")
    return [
        layer_map(rows, metric, "Where is the class read best?" if readable else "Which layer is like the teacher?"),
        layer_curves(rows, metric, title="Do aligned flows know more?"),
    ]


def draw_compared(_run: str, _other: str, _seed: int, metric: str, direction: str, study: str, *pins: Any) -> list[Any]:
    """Heat maps, curves over layers, and curves over training of part B."""
    try:
        folder = study_folder(study)
        written = stamp(*_files(folder))
        figures = _compared_figures(folder, written, metric, direction, tuple(pins))
        return _shown([*figures, *_training_figures(folder, written, tuple(pins))], 5)
    except LabError:  # told by `draw_words`
        return _shown([], 5)


@lru_cache(maxsize=48)
def _compared_figures(
    folder: Path | None, written: tuple[int, ...], metric: str, direction: str, pins: tuple[str, ...]
) -> list[Any]:
    read = _read_study(folder, written)
    settings = chosen(read, pins[:4], pins[4:])
    rows = rows_of(read.layers, settings)
    rows = unguided(rows, metric, direction) if len(rows) else rows
    figures: list[Any] = [None] * 2
    if len(rows):
        pinned = rows[rows["run"].str.startswith(("A: ", "B: "))]
        outlined = {name: [(tap.block, int(tap.layer)) for tap in aligned_taps(one)] for name, one in settings.items()}
        if len(pinned):
            figures[0] = layer_map(pinned, metric, "Which layers came to know more?", outlined)
        figures[1] = layer_curves(rows, metric, title="Do the other layers learn too?")
    return figures


@lru_cache(maxsize=48)
def _training_figures(folder: Path | None, written: tuple[int, ...], pins: tuple[str, ...]) -> list[Any]:
    read = _read_study(folder, written)
    curves, figures = rows_of(read.curves, chosen(read, pins[:4], pins[4:])), list[Any]()
    for name in ("held_out_nats_per_dim", "similarity", "held_out_accuracy"):
        figures.append(setting_curves(curves, name) if name in set(curves["metric"]) else None)
    return figures


def _shown(figures: Sequence[Any], count: int) -> list[Any]:
    """Plots of these figures; those without one are hidden."""
    filled = [*figures, *[None] * (count - len(figures))]
    return [gr.Plot(visible=False) if figure is None else gr.Plot(figure, visible=True) for figure in filled]


# --- measuring --------------------------------------------------------------------------------------------------------


@computes
def measure(
    run: str, other: str, direction: str, source: str, counter: int,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
) -> Iterator[tuple[str, Any, int]]:  # fmt: skip
    """Measure the runs of the sidebar, one kind after the other; what is there already is kept."""
    todo = [
        (name, one, kind)
        for name, one in pair(run, other).items() for kind in KINDS
        if (one, direction, kind) not in _measured and (kind != "similarity" or one.config.encoder is not None)
    ]  # fmt: skip
    for place, (name, one, kind) in enumerate(todo):
        progress((place, len(todo)), desc=f"{name}: {KINDS[kind]}", unit="measurements")
        yield f"Measuring **{name}** on {DIRECTIONS[direction]}: {KINDS[kind]} …", gr.skip(), counter
        while len(_measured) >= 60:
            _measured.pop(next(iter(_measured)))
        _measured[one, direction, kind] = measure_kind(one, kind, direction)
        counter += 1
    names = " and ".join(f"**{name}**" for name in pair(run, other))
    said = (
        f"Measured on {DIRECTIONS[direction]}: {names}." if todo else f"Already measured on {DIRECTIONS[direction]}: {names}."
    )
    yield said, gr.skip() if source == MEASURED else MEASURED, counter


# --- as code ----------------------------------------------------------------------------------------------------------


def code(
    run: str, other: str, _seed: int, metric: str, direction: str, source: str, strategies: list[str], study: str, *pins: Any
) -> Code:
    """The rows shown, and what is known about A and B."""
    rows, _ = known_rows(pair(run, other), metric, direction, source, strategies)
    names = list(dict.fromkeys(rows["run"]))
    short = metric.removesuffix("_accuracy")
    imports = ["import rrepa_lab as rl", "from rrepa_lab.studies.alignment import load_study_tables, unguided"]
    lines: list[str] = []
    shell = ""
    if source == MEASURED:
        imports.insert(0, "import pandas as pd")
        lines += ["table = pd.concat(["]
        lines += [f"    {_measuring(name, short, direction)}," for name in pair(run, other)] + ["])"]
        names = names or list(pair(run, other))
    else:
        imports.append("from rrepa_lab.studies.reading import load_table")
        lines += [f'table = load_table("{TABLES[source]}")', f'table = table[table["strategy"].isin({list(strategies)})]']
    if source != SEEDS and names:
        limits = {limit_for(get_run(name)) for name in names} - {None}
        limit = f" --limit {limits.pop()}" if limits else ""
        shell = f"rrepa-lab probe {' '.join(names)} --metrics {short} --direction {direction}{limit}"
    lines += [f'rows = unguided(table, "{metric}", "{direction}")']
    if (rows["layer"] > 0).any():
        lines += [f'best = rl.best_layer(rows, "{metric}")']
    try:
        read = read_study(study)
    except LabError:
        return Code(shell, "\n".join([*imports, "", *lines, "print(rows)"]))
    imports.append("from rrepa_lab.paths import " + ("assets" if study == SHIPPED_STUDY else "runs_root"))
    folder = f'runs_root() / "{study}"'
    scores = f'assets() / "studies" / "{BUNDLED}-runs.csv"' if study == SHIPPED_STUDY else f'{folder} / "{MEASURES}"'
    settings = [one["run"] for one in chosen(read, pins[:4], pins[4:8]).values()]
    lines += ["", f"settings = {settings}"]
    if read.curves is not None:
        lines += [f"layers, curves = load_study_tables({'' if study == SHIPPED_STUDY else folder})"]
        if read.layers is not None:
            lines += [f'compared = unguided(layers[layers["run"].isin(settings)], "{metric}", "{direction}")']
        lines += ['curves = curves[curves["run"].isin(settings)]']
    lines += [f"scores = rl.compare({scores}, apart=True)", "print(rows, scores)"]
    return Code(shell, "\n".join([*sorted(imports, key=lambda line: (line.startswith("from"), line)), "", *lines]))


def _measuring(name: str, short: str, direction: str) -> str:
    """The call that measures one run by one metric."""
    limit = limit_for(get_run(name))
    more = f", limit={limit}" if limit else ""
    call = f'rl.probe(rl.load("{name}"), probes=["{short}"], direction="{direction}"{more})'
    if short not in KINDS:
        metrics = "" if short == "teacher_cosine" else f', metrics=["{short}"]'
        call = f'rl.similarity(rl.load("{name}"){metrics}, direction="{direction}"{more})'
    return f'{call}.assign(run="{name}")'


# --- the tab ----------------------------------------------------------------------------------------------------------


def narrow(study: str, *pins: str) -> list[Any]:
    """The choices that there are for A and for B, each after those before it."""
    try:
        settings = read_study(study).settings
    except LabError:
        return [gr.skip()] * len(pins)
    updates: list[Any] = []
    for wanted in (pins[:4], pins[4:]):
        setting, choices = choose(settings, wanted)
        for part, text, there in zip(PARTS, wanted, choices, strict=True):
            shown = part != "rest" or len(set(settings["rest"])) > 1
            # a value that stays is not sent: it may have been changed again meanwhile
            value = {} if text == setting[part] else {"value": setting[part]}
            updates.append(gr.update(choices=[(one or UNSET, one) for one in there], visible=shown, **value))
    return updates


def build(bar: Bar) -> list[Panel]:
    """The tab; it is drawn when it is opened."""
    gr.Markdown(
        "**What does every layer know?** A probe reads the class off the features of each block and layer; a similarity "
        "compares them with the teacher's."
    )
    with gr.Row(equal_height=False):
        metric = gr.Dropdown(
            [(words, key) for key, words in METRICS.items()],
            value="linear_accuracy",
            label="Measured by",
            elem_id="layers-metric",
        )
        direction = gr.Radio(
            [(words, key) for key, words in DIRECTIONS.items()], value="forward", label="Read on", elem_id="layers-read"
        )
    with gr.Row(equal_height=False):
        source = gr.Radio([(words, key) for key, words in SOURCES.items()], value=SEEDS, label="Of", elem_id="layers-source")
        strategies = gr.CheckboxGroup(STRATEGIES, value=STRATEGIES, label="Strategies", elem_id="layers-strategies")
    with gr.Row(equal_height=False):
        known = [
            gr.Plot(show_label=False, elem_id="layer-map", min_width=320),
            gr.Plot(show_label=False, elem_id="layer-curves", min_width=320),
        ]
    note = gr.Markdown(elem_id="layer-note")
    with gr.Row():
        download = gr.DownloadButton("These rows as CSV", size="sm", visible=False, elem_id="layer-csv")
        start = gr.Button("Measure the two runs of the sidebar", size="sm", elem_id="measure")
        stop = gr.Button("Stop", size="sm", variant="stop", elem_id="measure-stop")
    said = gr.Markdown(
        "For runs that the shipped tables do not know. Digits take about half a minute; of large sets a part is read.",
        elem_id="measure-note",
    )
    counter = gr.State(0)

    gr.Markdown(
        "### Which layer is aligned, and how\nTwo settings of a study side by side, by the metric and the images chosen above."
    )
    study = gr.Dropdown(
        study_names(), value=SHIPPED_STUDY, label="Study", info="or your own: folders of `rrepa-lab batch` in `runs`",
        allow_custom_value=True, elem_id="layers-study",
    )  # fmt: skip
    settings = read_study(SHIPPED_STUDY).settings
    # choices follow each other: a value that is no longer among them is not refused, `choose` falls back
    pins: dict[str, gr.Dropdown] = {}
    with gr.Row(equal_height=False):
        for letter, values in zip("AB", START, strict=True):
            choices = choose(settings, values)[1]
            with gr.Column(min_width=320), gr.Row():
                for part, word, value, there in zip(PARTS, WORDS, values, choices, strict=True):
                    label = "Other settings of " if part == "rest" else f"{word.capitalize()} of "
                    pins[f"{letter.lower()}-{word}"] = gr.Dropdown(
                        [(text or UNSET, text) for text in there], value=value, label=label + letter, min_width=130,
                        allow_custom_value=True, visible=part != "rest", elem_id=f"{letter.lower()}-{word}",
                    )  # fmt: skip
    pair_map = gr.Plot(show_label=False, elem_id="pair-map")
    compared_words = gr.Markdown(elem_id="pair-note")
    with gr.Row(equal_height=False):
        pair_curves, held_out = (gr.Plot(show_label=False, elem_id=name, min_width=320) for name in ("pair-curves", "held-out"))
    with gr.Row(equal_height=False):
        near, accuracy = (gr.Plot(show_label=False, elem_id=name, min_width=320) for name in ("near", "held-out-accuracy"))
    scores = gr.Markdown(elem_id="pair-scores")
    compared_download = gr.DownloadButton("These layers as CSV", size="sm", visible=False, elem_id="pair-csv")

    measuring = start.click(
        measure, [bar.run, bar.other, direction, source, counter], [said, source, counter], concurrency_id="measure",
        api_visibility="private", show_progress_on=said,
    )  # fmt: skip
    stop.click(lambda: "Stopped. What was measured so far is kept.", None, said, cancels=measuring, queue=False, **HIDDEN)
    boxes = list(pins.values())
    quick: dict[str, Any] = {"queue": False, **HIDDEN}
    turned = [study.change, *(box.change for box in boxes)]
    gr.on(turned, told(narrow), [study, *boxes], boxes, trigger_mode="always_last", **quick)
    study.focus(lambda: gr.update(choices=study_names()), None, study, **quick)

    controls = {"metric": metric, "read": direction, "source": source, "strategies": strategies, "study": study, **pins}
    words = [note, download, compared_words, scores, compared_download]
    return [
        Panel(controls, words, draw_words, code, uses=[counter]),
        Panel({}, known, draw_known, uses=[metric, direction, source, strategies, counter], slow=True),
        Panel(
            {},
            [pair_map, pair_curves, held_out, near, accuracy],
            draw_compared,
            uses=[metric, direction, study, *boxes],
            slow=True,
        ),
    ]


if __name__ == "__main__":
    serve([sys.modules[__name__]])
