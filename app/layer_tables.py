"""The tables of the tab "Layers": those that are shipped, and what was measured on the page."""

from collections.abc import Sequence
from functools import lru_cache

import pandas as pd
from shell import stamp

import rrepa_lab as rl
from rrepa_lab.analysis.spatial import SPATIAL_METRICS
from rrepa_lab.measurements.metrics import metric_of
from rrepa_lab.paths import assets
from rrepa_lab.studies.alignment import unguided
from rrepa_lab.studies.reading import LAYERS, load_table

METRICS = (
    {name: metric_of(name).label for name in ("linear_accuracy", "knn_accuracy")}
    | {name: f"{metric_of(name).label} with the teacher" for name in ("cknna", "cka", "mutual_knn")}
    | {"teacher_cosine": f"{metric_of('teacher_cosine').label}, through the projector"}
    | {name: metric_of(name).label for name in SPATIAL_METRICS}
)
DIRECTIONS = {"forward": "real images", "reverse": "the generating pass"}
SEEDS, SHIPPED_RUNS, MEASURED = "seeds", "bundled", "measured"
TABLES = {SEEDS: f"{LAYERS}-seeds", SHIPPED_RUNS: LAYERS}
KINDS = {
    "linear": "linear probes",
    "knn": "k-NN probes",
    "similarity": "similarity to the teacher",
    "spatial": "spatial structure",
}
SMALLEST_GRID = 4  # tokens along an edge, for the spatial structure
MAX_ALL_IMAGES, N_SUBSET = 5000, 2000  # of more training images than the first, only a subset of the second size is read
MAX_MEASURED = 60  # tables that are kept


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
    """All that was measured on the page of these runs, under the names they have in the sidebar."""
    found = [
        _measured[run, direction, kind].assign(run=name)
        for name, run in runs.items() for kind in KINDS if (run, direction, kind) in _measured
    ]  # fmt: skip
    return pd.concat(found, ignore_index=True) if found else shipped(SHIPPED_RUNS).iloc[:0]


def limit_for(run: rl.Run) -> int | None:
    """How many images of each split are read: all of a small set, N_SUBSET of a large one, class-balanced."""
    return N_SUBSET if len(run.images("train")) > MAX_ALL_IMAGES else None


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
    """The rows to show, in the order of the strategies or of the sidebar, and sentences about what is missing."""
    if source == MEASURED:
        table, wanted = measured_rows(runs, direction), list(runs)
    else:
        table = shipped(source)
        wanted = list(dict.fromkeys(table.loc[table["strategy"].isin(list(strategies)), "run"]))
        if not wanted:
            return table.iloc[:0], ["Choose at least one strategy."]
    rows = unguided(table, metric, direction)
    rows = rows[rows["run"].isin(wanted)]
    present = set(rows.loc[rows["layer"] > 0, "run"])
    missing = [run for run in wanted if run not in present]
    if not missing:
        return rows, []
    names = " and ".join(f"**{run}**" for run in missing)
    if source == MEASURED and not set(missing) <= set(table["run"]):
        return rows, [f"{names}: not measured on {DIRECTIONS[direction]} yet. Press “Measure the two runs of the sidebar”."]
    if metric == "teacher_cosine":
        return rows, [f"{names}: no {METRICS[metric]}, because no layer was aligned. Other metrics need no projector."]
    return rows[rows["layer"] > 0], [f"{names}: {METRICS[metric]} was not measured on {DIRECTIONS[direction]}."]
