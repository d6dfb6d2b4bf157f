"""The tables of the tab "Layers": those that are shipped, and what was measured on the page."""

from collections.abc import Sequence

import pandas as pd
from server.runs import missing_data
from server.shipped import shipped, shipped_name

import rrepa_lab as rl
from rrepa_lab.analysis.spatial import SPATIAL_METRICS
from rrepa_lab.measurements.metrics import metric_of
from rrepa_lab.studies.alignment import unguided
from rrepa_lab.studies.reading import LAYERS, PHOTOGRAPHS_LIMIT

METRICS = (
    {name: metric_of(name).label for name in ("linear_accuracy", "knn_accuracy")}
    | {name: f"{metric_of(name).label} with the teacher" for name in ("cknna", "cka", "mutual_knn")}
    | {"teacher_cosine": f"{metric_of('teacher_cosine').label}, through the projector"}
    | {name: metric_of(name).label for name in SPATIAL_METRICS}
)
DIRECTIONS = {"forward": "real images", "reverse": "the generating pass"}
KINDS = {
    "linear": "linear probes",
    "knn": "k-NN probes",
    "similarity": "similarity to the teacher",
    "spatial": "spatial structure",
}
SMALLEST_GRID = 4  # tokens along an edge, for the spatial structure
MAX_ALL_IMAGES, N_SUBSET = (
    5000,
    PHOTOGRAPHS_LIMIT,
)  # of more training images than the first, only a subset of the second size is read
MAX_MEASURED = 60  # tables that are kept


_measured: dict[tuple[rl.Run, str, str], pd.DataFrame] = {}  # by run, direction and kind; a run that changed is another run


def measured_rows(runs: dict[str, rl.Run], direction: str) -> pd.DataFrame:
    """All that was measured on the page of these runs, under the names they have in the sidebar."""
    found = [
        _measured[run, direction, kind].assign(run=name)
        for name, run in runs.items() for kind in KINDS if (run, direction, kind) in _measured
    ]  # fmt: skip
    return pd.concat(found, ignore_index=True) if found else shipped(LAYERS).iloc[:0]


def limit_for(run: rl.Run) -> int | None:
    """How many images of each split are read: all of a small set, N_SUBSET of one that is large or not here, class-balanced."""
    return N_SUBSET if missing_data(run) or len(run.images("train")) > MAX_ALL_IMAGES else None


def measure_kind(run: rl.Run, kind: str, direction: str) -> pd.DataFrame:
    """One kind of measurement at every layer, as `rl.probe`, `rl.similarity` or `rl.spatial_structure` gives it."""
    limit = limit_for(run)
    if kind in ("similarity", "spatial"):
        instrument = rl.similarity if kind == "similarity" else rl.spatial_structure
        return instrument(run, protocol=rl.FeatureProtocol(direction), images=rl.Images(limit=limit or 1000))
    return rl.probe(run, protocol=rl.FeatureProtocol(direction), probes=[kind], limit=limit)


def unmeasured(runs: dict[str, rl.Run], direction: str) -> list[tuple[str, rl.Run, str]]:
    """(name, run, kind) of the measurements that are missing and possible: similarities need an encoder, spatial structure
    4x4 tokens.
    """
    return [
        (name, run, kind)
        for name, run in runs.items() for kind in KINDS
        if (run, direction, kind) not in _measured
        and (kind != "similarity" or run.config.teachers)
        and (kind != "spatial" or run.flow.config.side >= SMALLEST_GRID)
    ]  # fmt: skip


def measure_and_keep(run: rl.Run, direction: str, kind: str) -> None:
    """Measure one kind at every layer, and keep the table for `measured_rows`."""
    while len(_measured) >= MAX_MEASURED:
        _measured.pop(next(iter(_measured)))
    _measured[run, direction, kind] = measure_kind(run, kind, direction)


def known_rows(
    runs: dict[str, rl.Run], metric: str, direction: str, source: str, strategies: Sequence[str]
) -> tuple[pd.DataFrame, list[str]]:
    """The rows to show, in the order of the table or of the sidebar, and sentences about what is missing."""
    name = shipped_name(next(iter(runs.values())), source)
    if name is not None:
        return shipped_rows(name, metric, direction, strategies)
    table = measured_rows(runs, direction)
    rows, missing = _rows_of(table, list(runs), metric, direction)
    if missing and not set(missing) <= set(table["run"]):
        names = _bold(missing)
        return rows, [f"{names}: not measured on {DIRECTIONS[direction]} yet. Press “Measure the two runs of the sidebar”."]
    return _with_remark(rows, missing, metric, direction)


def shipped_rows(name: str, metric: str, direction: str, strategies: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The rows of a shipped table with these strategies, and sentences about what is missing."""
    table = shipped(name)
    wanted = list(dict.fromkeys(table.loc[table["strategy"].isin(list(strategies)), "run"]))
    if not wanted:
        return table.iloc[:0], ["Choose at least one strategy."]
    return _with_remark(*_rows_of(table, wanted, metric, direction), metric, direction)


def _rows_of(table: pd.DataFrame, wanted: list[str], metric: str, direction: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows of these runs, and the runs of which no layer is among them."""
    rows = unguided(table, metric, direction)
    rows = rows[rows["run"].isin(wanted)]
    present = set(rows.loc[rows["layer"] > 0, "run"])
    return rows, [run for run in wanted if run not in present]


def _with_remark(rows: pd.DataFrame, missing: list[str], metric: str, direction: str) -> tuple[pd.DataFrame, list[str]]:
    if not missing:
        return rows, []
    if metric == "teacher_cosine":
        reason = f"no {METRICS[metric]}, because no layer was aligned. Other metrics need no projector."
        return rows, [f"{_bold(missing)}: {reason}"]
    return rows[rows["layer"] > 0], [f"{_bold(missing)}: {METRICS[metric]} was not measured on {DIRECTIONS[direction]}."]


def _bold(names: Sequence[str]) -> str:
    return " and ".join(f"**{name}**" for name in names)
