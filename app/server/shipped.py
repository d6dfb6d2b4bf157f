"""The tables of layers that come with the kit, read once."""

from functools import lru_cache

import pandas as pd
from server.runs import stamp

import rrepa_lab as rl
from rrepa_lab.paths import assets
from rrepa_lab.studies.reading import LATENTS, LAYERS, PIXELS, load_table

SEEDS, SHIPPED_RUNS, MEASURED = "seeds", "bundled", "measured"
# what flows model -> source -> the shipped table of such flows
TABLES = {
    "digits": {SEEDS: f"{LAYERS}-seeds", SHIPPED_RUNS: LAYERS},
    "cifar10": {SHIPPED_RUNS: PIXELS},
    "latents of cifar10": {SHIPPED_RUNS: LATENTS},
}
OVER_SEEDS = {tables[SEEDS] for tables in TABLES.values() if SEEDS in tables}


def modelled(run: rl.Run) -> str:
    """What a flow models, as TABLES has it: two flows are in one table if it is the same."""
    return ("" if run.config.space.is_pixels else "latents of ") + run.config.data.name


def shipped_name(run: rl.Run, source: str) -> str | None:
    """The shipped table for a run like this: of the source, or that of the bundled runs where there is no other.

    None: what is measured here is shown, as there is no table of such runs or none was chosen.
    """
    tables = TABLES.get(modelled(run), {})
    return None if source == MEASURED else tables.get(source, tables.get(SHIPPED_RUNS))


def shipped(name: str) -> pd.DataFrame:
    """A shipped table by its name."""
    return _shipped(name, table_stamp(name))


def table_stamp(name: str) -> tuple[int, ...]:
    """When a shipped table was written."""
    return stamp(assets() / "studies" / f"{name}.csv")


@lru_cache(maxsize=4)
def _shipped(name: str, _written: tuple[int, ...]) -> pd.DataFrame:
    return load_table(name)
