"""Runs and results side by side: mean, spread and number over training seeds, and never two protocols in one column."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from rrepa_lab.errors import LabError
from rrepa_lab.measurements.schema import COLUMNS
from rrepa_lab.measurements.spread import mean_and_spread, spread_text
from rrepa_lab.runs.config import RunConfig

UNSET = "-"  # in a column of settings: the source has no such setting
# settings of a configuration that say who a run is, not what it is
_NAMES = (
    "name", "train.seed", "data.path", "train.log_every", "train.eval_every", "train.save_every", "train.num_workers",
    "space.weights", "space.cache",
)  # fmt: skip


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


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Dotted settings that make a difference: of an unaligned run, none about alignment but its strategy."""
    flat = {
        key: value
        for key, value in config.flat().items()
        if key not in _NAMES and not key.startswith(("space.stored", "data.bounds"))
    }
    if config.align.strategy != "none":
        return flat
    return {key: value for key, value in flat.items() if key == "align.strategy" or not key.startswith(("align.", "encoder"))}


def tabulate(found: Sequence[Finding], over_seeds: bool = True, apart: bool = False) -> pd.DataFrame:
    """The table of `compare` from what `gather` found."""
    metrics = _metrics(found, apart)
    keys = [key for key in dict.fromkeys(key for one in found for key in one.settings) if _differs(found, key)]
    rows = []
    for one, metric in zip(found, metrics, strict=True):
        settings = {key: as_text(one.settings.get(key, UNSET)) for key in keys}
        row = {**settings, "source": one.source, "train_seed": one.seed, "metric": metric, "value": one.value}
        rows.append(row | {"unit": one.unit, "n": one.n, "protocol": one.protocol})
    table = pd.DataFrame(rows)
    if not over_seeds:
        return table
    if table.duplicated([*keys, "metric", "train_seed"]).any():
        keys = ["source", *keys]
    cells = table.groupby([*keys, "metric"], sort=False, dropna=False)
    first = cells[["unit", "n", "protocol"]].first()
    return pd.concat([mean_and_spread(table, [*keys, "metric"]), first], axis=1).reset_index()


def _metrics(found: Sequence[Finding], apart: bool) -> list[str]:
    """What each number is called in the table; LabError where protocols would mix."""
    protocols: dict[str, dict[tuple[str, int | None], list[str]]] = {}
    for one in found:
        protocols.setdefault(one.metric, {}).setdefault((one.protocol, one.n), []).append(one.source)
    for metric, under in protocols.items():
        if len(under) > 1 and not apart:
            listed = "; ".join(f"({place}) {_few(sources)}" for place, sources in enumerate(under.values(), start=1))
            found_under = f"{metric} was measured under {len(under)} protocols, which do not share a column"
            differ = "; ".join(differences(list(under)))
            raise LabError(f"{found_under}: {listed}. They differ in {differ}. A column for each: --apart, or apart=True")
    number = {metric: {how: place for place, how in enumerate(under, start=1)} for metric, under in protocols.items()}
    return [
        one.metric if len(number[one.metric]) == 1 else f"{one.metric} [{number[one.metric][one.protocol, one.n]}]"
        for one in found
    ]


def differences(protocols: Sequence[tuple[str, int | None]]) -> list[str]:
    """In which fields protocols differ: "n: 360 and 2000", "guidance: 0.0 and 1.0".

    Args:
        protocols: each as text and n. Parts of a text are separated by semicolons; one that begins with the name of a column
            is that field, and the others are "words".

    Example:
        >>> differences([("2000 samples; guidance 0.0; resize none", 2000), ("2000 samples; guidance 1.0; resize none", 2000)])
        ['guidance: 0.0 and 1.0']
    """
    fields: list[dict[str, str]] = []
    for text, n in protocols:
        found = {"n": str(n)}
        for part in text.split("; "):
            name, _, value = part.partition(" ")
            known = value and name in COLUMNS and name not in found
            key, shown = (name, value) if known else ("words", part)
            found[key] = f"{found[key]}; {shown}" if key in found else shown
        fields.append(found)
    listed = []
    for name in dict.fromkeys(name for found in fields for name in found):
        values = list(dict.fromkeys(found.get(name, UNSET) for found in fields))
        if len(values) > 1:
            listed.append(f"{name}: {' and '.join(values[:3])}{' and others' if len(values) > 3 else ''}")
    return listed


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
    return pd.DataFrame(rows.values()).fillna(UNSET).rename(columns=_short(keys))


def markdown(table: pd.DataFrame) -> str:
    """`wide` as a Markdown table, with the protocol of every column below it."""
    return f"{wide(table).to_markdown(index=False, disable_numparse=True)}\n\n{protocols(table)}\n"


def protocols(table: pd.DataFrame) -> str:
    """A line for each metric: unit, n and protocol."""
    rows = table.drop_duplicates("metric").to_dict("records")
    return "\n".join(
        f"- {row['metric']}: {row['unit'] + ', ' if row['unit'] else ''}n = {_count(row['n'])}; {row['protocol']}"
        for row in rows
    )


def _count(n: float | None) -> str:
    return "unknown" if n is None or pd.isna(n) else f"{n:.0f}"


def _short(keys: Sequence[str]) -> dict[str, str]:
    """align.strategy -> strategy, where no other column ends the same; data.name alone would read as the name of the run."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: end for key, end in zip(keys, last, strict=True) if last.count(end) == 1 and end not in ("name", "kind")}


def _shown(value: float, sd: float) -> str:
    if pd.isna(value):
        return UNSET
    return spread_text(value, sd, ".4f" if abs(value) < 100 else ".5g")
