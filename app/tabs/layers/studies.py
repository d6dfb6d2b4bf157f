"""The studies of the tab "Layers": their settings, scores, layers and curves, and the choice of two settings."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from server.handlers import without_folders
from server.runs import stamp

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
)

SHIPPED_STUDY = "the shipped study"
STRATEGIES = ["none", "forward", "detach", "reverse"]
UNSET = "-"
PARTS = (*ALIGNED, "rest")  # columns of the settings of a study, chosen one after the other
Choice = tuple[str, ...]  # a value for each of PARTS


class Study(NamedTuple):
    """The tables of a study."""

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
    return study_in(folder, stamp(*study_files(folder)))


def study_files(folder: Path | None) -> list[Path]:
    """Measurements, layers and curves of a study."""
    if folder is None:
        return [assets() / "studies" / f"{BUNDLED}-{part}.csv" for part in ("runs", "layers", "curves")]
    return [folder / MEASURES, folder / "layers.csv", folder / "curves.csv"]


@lru_cache(maxsize=8)
def study_in(folder: Path | None, _written: tuple[int, ...]) -> Study:
    """The study of a folder, None for the shipped one; read again when a file has changed."""
    scores = rl.compare(study_files(folder)[0], apart=True)
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
                    "The layers of this study were not measured yet: "
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
    settings = scores[keys].astype(str).drop_duplicates()
    settings = settings.assign(**{key: UNSET for key in ALIGNED if key not in keys})
    settings = settings[[*ALIGNED, *(key for key in keys if key not in ALIGNED)]]
    return settings.assign(
        run=[setting_name({str(key): str(text) for key, text in row.items()}) for row in settings.to_dict("records")]
    )


def _with_rest(settings: pd.DataFrame) -> pd.DataFrame:
    """The settings, with a column `rest`: what differs apart from the alignment, as one text."""
    others = [key for key in settings.columns if key not in ("run", *ALIGNED)]
    texts = [
        ", ".join(f"{key.rsplit('.', 1)[-1]} {row[key]}" for key in others if row[key] != UNSET)
        for row in settings.to_dict("records")
    ]
    return settings.assign(rest=texts)


def choose(settings: pd.DataFrame, wanted: Choice) -> tuple[dict[str, str], list[list[str]]]:
    """The setting nearest to a choice, and the values there are for each of PARTS, given those before it."""
    rows, choices = settings, []
    for part, text in zip(PARTS, wanted, strict=True):
        values = list(dict.fromkeys(rows[part]))
        if part == ALIGNED[0]:
            values.sort(key=lambda strategy: STRATEGIES.index(strategy) if strategy in STRATEGIES else len(STRATEGIES))
        rows = rows[rows[part] == (text if text in values else values[0])]
        choices.append(values)
    return {str(key): str(text) for key, text in rows.iloc[0].items()}, choices


def chosen(study: Study, a: Choice, b: Choice) -> dict[str, dict[str, str]]:
    """The settings to show, by the names they get: A, B, and the one without alignment, unless it is A or B."""
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
