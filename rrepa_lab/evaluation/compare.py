"""Runs and results side by side: everything measured in them is gathered into one table."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.evaluate import evaluate
from rrepa_lab.evaluation.paper import paper_findings
from rrepa_lab.measurements.compare import UNSET, Finding, settings_of, tabulate
from rrepa_lab.measurements.metrics import present_metric
from rrepa_lab.measurements.results import NAME, Measurement, measurements, present_protocol, read_result
from rrepa_lab.readers import MIB, MissingFileError, read_json, read_table
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.run import Run
from rrepa_lab.runs.store import load


def compare(
    sources: Run | Path | str | Iterable[Run | Path | str],
    *,
    over_seeds: bool = True,
    apart: bool = False,
    samples: int = 2000,
    limit: int | None = None,
    device: str = "cpu",
    beside: str | Sequence[str] = (),
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
        beside: published tables to lay beside the measurements: "paper-table-1", or another of `assets/paper`; their metrics
            are called FID[paper] and so on.

    Returns: the settings in which the sources differ, by their dotted names, then metric, the columns above, unit, n and
        protocol. Where the same settings and seed come from two sources, `source` is one of the settings.

    Raises: LabError for a folder without results, a damaged result, and, unless `apart`, for a metric that was
        measured under different protocols: such numbers do not belong in one column.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.compare([rl.load("digits-none"), rl.load("digits-reverse")], samples=0, limit=20)
        >>> table.columns[0], len(table)
        ('align.strategy', 6)
    """
    found = gather(sources, samples, limit, device)
    return tabulate([*found, *published(beside)], over_seeds, apart)


def published(names: str | Sequence[str]) -> list[Finding]:
    """The numbers of published tables, see `evaluation.paper`; LabError for an unknown one."""
    return [one for name in ([names] if isinstance(names, str) else names) for one in paper_findings(name)]


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
    protocol = f"{data.words} {side}x{side}; {row.protocol}"
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
            settings = {key: row[key] for key in keys if row[key] != UNSET}
            seed, n = (int(float(row[name])) if row[name] else None for name in ("train_seed", "n"))
            value = float(row["value"] or "nan")
            found.append(
                Finding(
                    row["source"],
                    settings,
                    seed,
                    present_metric(row["metric"]),
                    value,
                    row["unit"],
                    n,
                    present_protocol(row["protocol"]),
                )
            )
    except LabError as error:
        raise LabError(f"no table of measurements: {error}") from None
    except (ValueError, OverflowError) as error:
        raise LabError(f"{path} is no table of measurements: {error}") from None
    return found
