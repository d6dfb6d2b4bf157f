"""Runs and results side by side: mean, spread and number over training seeds, and never two protocols in one column."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rrepa_lab.analysis.evaluate import evaluate
from rrepa_lab.errors import LabError
from rrepa_lab.readers import MIB, MissingFileError, read_json, read_table
from rrepa_lab.results import NAME, Measurement, measurements, read_result
from rrepa_lab.runs import Run, RunConfig, load

_UNSET = "-"
# settings of a configuration that say who a run is, not what it is
_NAMES = ("name", "train.seed", "data.path", "train.report_every", "train.look_every", "train.save_every", "train.workers")


class Finding(NamedTuple):
    """One measured number, as `compare` sees it."""

    source: str
    settings: dict[str, Any]  # dotted settings of the run and what was varied beside it
    seed: int | None  # of the training
    metric: str
    value: float
    unit: str
    n: int | None
    protocol: str


def compare(
    sources: Run | Path | str | Iterable[Run | Path | str],
    *,
    over_seeds: bool = True,
    apart: bool = False,
    samples: int = 2000,
    limit: int | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Gather runs and results into one tidy table.

    Args:
        sources: runs, names or directories of runs (which are evaluated, `rl.evaluate`), folders that are searched for
            result.json, such as those of `rrepa-lab batch` (cells that are not done are left out), and the
            measurements.csv that a batch ends with.
        over_seeds: one row for each setting and metric, with `value` (mean), `sd` (standard deviation) and `seeds` (how
            many) over training seeds; else one row a measurement, with the columns source, train_seed and value.
        apart: measurements of one metric under several protocols get names of their own, "nats_per_dim [1]".
        samples, limit: of `rl.evaluate`, for the runs among the sources.
        device: where runs that are named are put: cpu, cuda or auto.

    Returns: the settings in which the sources differ, by their dotted names, then metric, the columns above, unit, n and
        protocol. Where the same settings and seed come from two sources, `source` is one of the settings.

    Raises: LabError for a folder without results, a damaged result, and, unless `apart`, for a metric that was
        measured under different protocols: such numbers do not belong in one column.
    """
    return tabulate(gather(sources, samples, limit, device), over_seeds, apart)


def gather(
    sources: Run | Path | str | Iterable[Run | Path | str],
    samples: int = 2000,
    limit: int | None = None,
    device: str = "cpu",
) -> list[Finding]:
    """Everything measured in these sources, in their order; see `compare`."""
    listed = [sources] if isinstance(sources, Run | Path | str) else list(sources)
    found = [finding for source in listed for finding in _read(source, samples, limit, device)]
    if not found:
        raise LabError("nothing to compare: the sources hold no measurement")
    return found


def _read(source: Run | Path | str, samples: int, limit: int | None, device: str) -> list[Finding]:
    if isinstance(source, Run):
        return _of_run(source, source.name, samples, limit)
    path = Path(source)
    if path.is_file():
        return _of_table(path) if path.suffix == ".csv" else _of_result(path)
    if path.is_dir() and not (path / "config.json").is_file():
        files = [file for file in sorted(path.rglob(NAME)) if _done(file)]
        if not files:
            raise LabError(f"{path} holds no {NAME}: it is neither a run directory nor a folder with finished results")
        return [finding for file in files for finding in _of_result(file)]
    return _of_run(load(source, device), str(source), samples, limit)


def _done(result: Path) -> bool:
    """False for a result inside a cell of a batch that has not ended well."""
    try:
        return bool(read_json(result.parent / "cell.json", MIB).get("state") == "done")
    except MissingFileError:
        return True
    except LabError:
        return False


def _of_run(run: Run, source: str, samples: int, limit: int | None) -> list[Finding]:
    return [_finding(source, row, run.config) for row in measurements(evaluate(run, samples=samples, limit=limit))]


def _of_result(path: Path) -> list[Finding]:
    result, place = read_result(path), path.parent.name
    return [_finding(f"{place}/{row.run}" if row.run else place, row, result.runs.get(row.run)) for row in result.measurements]


def _finding(source: str, row: Measurement, config: RunConfig | None) -> Finding:
    """A measurement; its data set belongs to the protocol, the other settings of its run tell rows apart."""
    value = math.nan if row.value is None else row.value
    if config is None:
        return Finding(source, row.settings, None, row.metric, value, row.unit, row.n, row.protocol)
    data, side = config.data, config.data.image_size
    protocol = f"{data.name} {side}x{side}; {row.protocol}"
    settings = settings_of(config) | row.settings
    return Finding(source, settings, config.train.seed, row.metric, value, row.unit, row.n, protocol)


def _of_table(path: Path) -> list[Finding]:
    """Rows of a table of single measurements, written by a batch or by `compare(over_seeds=False)`."""
    columns = ["source", "train_seed", "metric", "value", "unit", "n", "protocol"]
    found = []
    try:
        table = read_table(path, columns, dtype=str, keep_default_na=False)
        keys = list(table.columns[: table.columns.get_loc("source")])
        for row in table.to_dict("records"):
            settings = {key: row[key] for key in keys if row[key] != _UNSET}
            seed, n = (int(float(row[name])) if row[name] else None for name in ("train_seed", "n"))
            value = float(row["value"] or "nan")
            found.append(Finding(row["source"], settings, seed, row["metric"], value, row["unit"], n, row["protocol"]))
    except LabError as error:
        raise LabError(f"no table of measurements: {error}") from None
    except (ValueError, OverflowError) as error:
        raise LabError(f"{path} is no table of measurements: {error}") from None
    return found


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Dotted settings that make a difference: of an unaligned run, none about alignment but its strategy."""
    flat = {key: value for key, value in config.flat().items() if key not in _NAMES}
    if config.align.strategy != "none":
        return flat
    return {key: value for key, value in flat.items() if key == "align.strategy" or not key.startswith(("align.", "encoder"))}


def tabulate(found: Sequence[Finding], over_seeds: bool = True, apart: bool = False) -> pd.DataFrame:
    """The table of `compare` from what `gather` found."""
    metrics = _metrics(found, apart)
    keys = [key for key in dict.fromkeys(key for one in found for key in one.settings) if _differs(found, key)]
    rows = []
    for one, metric in zip(found, metrics, strict=True):
        settings = {key: as_text(one.settings.get(key, _UNSET)) for key in keys}
        row = {**settings, "source": one.source, "train_seed": one.seed, "metric": metric, "value": one.value}
        rows.append(row | {"unit": one.unit, "n": one.n, "protocol": one.protocol})
    table = pd.DataFrame(rows)
    if not over_seeds:
        return table
    if table.duplicated([*keys, "metric", "train_seed"]).any():
        keys = ["source", *keys]
    cells = table.groupby([*keys, "metric"], sort=False, dropna=False)
    first = cells[["unit", "n", "protocol"]].first()
    spread = cells["value"].agg(value="mean", sd="std", seeds="size")
    return pd.concat([spread, first], axis=1).reset_index()


def _metrics(found: Sequence[Finding], apart: bool) -> list[str]:
    """What each number is called in the table; LabError where protocols would mix."""
    protocols: dict[str, dict[tuple[str, int | None], list[str]]] = {}
    for one in found:
        protocols.setdefault(one.metric, {}).setdefault((one.protocol, one.n), []).append(one.source)
    for metric, under in protocols.items():
        if len(under) > 1 and not apart:
            told = "; ".join(f"({place}) {protocol}, n = {n}: {_few(sources)}" for place, ((protocol, n), sources) in
                             enumerate(under.items(), start=1))  # fmt: skip
            raise LabError(f"{metric} was measured under {len(under)} protocols, which do not share a column: {told}")
    number = {metric: {how: place for place, how in enumerate(under, start=1)} for metric, under in protocols.items()}
    return [
        one.metric if len(number[one.metric]) == 1 else f"{one.metric} [{number[one.metric][one.protocol, one.n]}]"
        for one in found
    ]


def _few(sources: Sequence[str]) -> str:
    names = list(dict.fromkeys(sources))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _differs(found: Sequence[Finding], key: str) -> bool:
    """Whether those that have this setting have it in several values."""
    return len({as_text(one.settings[key]) for one in found if key in one.settings}) > 1


def as_text(value: Any) -> Any:
    """A setting in a table: lists as "3,4" and nothing as "none", so that a table can be grouped by them."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else value


def settings_in(table: pd.DataFrame) -> list[str]:
    """The columns of a table of `compare` that tell its rows apart."""
    return list(table.columns[: table.columns.get_loc("metric")])


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """One row a setting and one column a metric, "mean ± sd" over seeds: the shape of R-REPA's Table 1."""
    keys = settings_in(table)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in table.to_dict("records"):
        place = tuple(cell[key] for key in keys)
        row = rows.setdefault(place, dict(zip(keys, place, strict=True)) | {"seeds": 0})
        row["seeds"] = max(row["seeds"], cell["seeds"])
        row[cell["metric"]] = _shown(cell["value"], cell["sd"])
    return pd.DataFrame(rows.values()).fillna(_UNSET).rename(columns=_short(keys))


def markdown(table: pd.DataFrame) -> str:
    """`wide` as a Markdown table, with the protocol of every column below it."""
    return f"{wide(table).to_markdown(index=False, disable_numparse=True)}\n\n{protocols(table)}\n"


def protocols(table: pd.DataFrame) -> str:
    """A line for each metric: unit, n and protocol."""
    rows = table.drop_duplicates("metric").to_dict("records")
    return "\n".join(
        f"- {row['metric']}: {row['unit'] + ', ' if row['unit'] else ''}n = {row['n']}; {row['protocol']}" for row in rows
    )


def _short(keys: Sequence[str]) -> dict[str, str]:
    """align.strategy -> strategy, where no other column ends the same."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: end for key, end in zip(keys, last, strict=True) if last.count(end) == 1}


def _shown(value: float, sd: float) -> str:
    if pd.isna(value):
        return _UNSET
    form = ".4f" if abs(value) < 100 else ".5g"
    return f"{value:{form}}" if pd.isna(sd) else f"{value:{form}} ± {sd:{form}}"
