"""What the layers of the digits runs know, and how near they are to the encoder: all blocks and layers, both directions.

    python -m rrepa_lab.studies.layers bundled                       the four bundled runs -> assets/studies/digits-layers.csv
    python -m rrepa_lab.studies.layers seeds --runs runs/digits      the runs of `studies.digits study`, mean and standard
                                                                     deviation over their seeds -> digits-layers-seeds.csv
    python -m rrepa_lab.studies.layers read                          what the two tables say

Every row carries its protocol. Probes are fitted on the training split (1,437 images) and scored on the test split (360),
or on 1,000 generated images; similarities are taken over the test split, or over 1,000 generated images.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch

from rrepa_lab.analysis.probe import best_layer, probe
from rrepa_lab.analysis.similarity import similarity
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_text
from rrepa_lab.places import assets
from rrepa_lab.presets import ALIGNED
from rrepa_lab.runs import load
from rrepa_lab.studies.digits import SEEDS, write_sums

BUNDLED, OVER_SEEDS = "digits-layers.csv", "digits-layers-seeds.csv"
CLASSIFIERS = ("gradient", "iterated", "bayes")


def read_run(source: str | Path) -> pd.DataFrame:
    """All tables of one run, with one thread."""
    torch.set_num_threads(1)
    run = load(source)
    tables = [
        probe(run, classifiers=CLASSIFIERS),
        probe(run, direction="reverse"),
        probe(run, direction="reverse", guidance=2.0),
        similarity(run),
        similarity(run, direction="reverse"),
        similarity(run, direction="reverse", feed_label=True),
    ]
    print(f"read {source}", file=sys.stderr, flush=True)
    return pd.concat(tables, ignore_index=True).drop(columns="device")


def read_runs(sources: list[str | Path], workers: int) -> pd.DataFrame:
    """The tables of all runs put together."""
    from joblib import Parallel, delayed

    return pd.concat(Parallel(n_jobs=workers)(delayed(read_run)(source) for source in sources), ignore_index=True)


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation and number of seeds of every cell."""
    keys = [name for name in table.columns if name not in ("train_seed", "value", "standard_error")]
    cells = table.groupby(keys, sort=False, dropna=False)["value"].agg(["mean", "std", "count"]).reset_index()
    return cells.rename(columns={"mean": "value", "std": "sd", "count": "train_seeds"})


def load_table(name: str = BUNDLED) -> pd.DataFrame:
    """A shipped table; empty texts stay texts."""
    path = assets() / "studies" / name
    if not path.is_file():
        raise LabError(f"no table at {path}: make it by python -m rrepa_lab.studies.layers")
    table = pd.read_csv(path)
    texts = table.columns.intersection(["tap", "module_path", "other", "other_tap", "probe"])
    return table.assign(**{name: table[name].fillna("") for name in texts})


def levels(table: pd.DataFrame) -> pd.DataFrame:
    """For each run: the best layer of a linear probe beside what needs no training, on real images."""
    real = table[table["direction"] == "forward"]
    if "train_seed" not in real:
        real = real.assign(train_seed="mean")
    best = best_layer(real).set_index(["run", "train_seed"])
    shown = pd.DataFrame({"best layer": best["tap"], "its linear probe": best["value"]})
    for tap in ("pixels", "encoder"):
        rows = real[(real["tap"] == tap) & (real["metric"] == "linear_accuracy")]
        shown[f"linear, {tap}"] = rows.set_index(["run", "train_seed"])["value"]
    for name in CLASSIFIERS:
        rows = real[real["metric"] == f"{name}_accuracy"].set_index(["run", "train_seed"])
        shown[name] = rows["value"]
        if "sd" in rows:
            shown[f"{name} sd"] = rows["sd"]
    return shown.reset_index()


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bundled", "seeds", "read"))
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"), help="folder of `studies.digits study`")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    given = parser.parse_args()
    folder = assets() / "studies"
    if given.what == "bundled":
        table = read_runs([f"digits-{strategy}" for strategy in ALIGNED], given.workers)
        write_text(folder / BUNDLED, table.to_csv(index=False, float_format="%.5g"))
        write_sums()
    elif given.what == "seeds":
        sources: list[str | Path] = [given.runs / f"digits-{strategy}-{seed}" for strategy in ALIGNED for seed in SEEDS]
        table = over_seeds(read_runs(sources, given.workers))
        write_text(folder / OVER_SEEDS, table.to_csv(index=False, float_format="%.5g"))
        write_sums()
    for name in (BUNDLED, OVER_SEEDS):
        print(f"{name}\n{levels(load_table(name)).to_markdown(index=False, floatfmt='.4f')}\n")


if __name__ == "__main__":
    main()
