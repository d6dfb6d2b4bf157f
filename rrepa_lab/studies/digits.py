"""The digits studies: how the bundled settings were found, and how the strategies compare under them.

    python -m rrepa_lab.studies.digits search --out runs/search     settings, on a validation split
    python -m rrepa_lab.studies.digits study  --out runs/digits     four strategies x three seeds, on the test split
    python -m rrepa_lab.studies.digits bundle --out runs/digits     seed 0 becomes assets/runs; tables to assets/studies
    python -m rrepa_lab.studies.digits accuracy --out runs/again    seed 0 of the study retrained where its accuracy while it
                                                                    learns was not recorded: digits-accuracy-curves.csv
    python -m rrepa_lab.studies.digits evaluator                    the judge of samples, assets/evaluators/digits

The encoder they all align with comes from `rrepa-lab encoder train`.
Searches and studies can be interrupted and started again: finished runs are recognised, the others go on from their checkpoint.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rrepa_lab.align.strategies import Strategy
from rrepa_lab.analysis.evaluate import evaluate
from rrepa_lab.analysis.evaluator import EvaluatorConfig, accuracy, load_evaluator, train_evaluator
from rrepa_lab.data.datasets import DataConfig
from rrepa_lab.files import sha256, write_text
from rrepa_lab.places import assets
from rrepa_lab.presets import ALIGNED, digits
from rrepa_lab.runs import RunConfig, load
from rrepa_lab.training.card import save_scores
from rrepa_lab.training.loop import train
from rrepa_lab.training.records import Records

SEEDS = (0, 1, 2)
ACCURACY = "digits-accuracy-curves"

# one change at a time against the centre of the search; a change of the flow itself is tried without alignment too
CENTRE: dict[str, Any] = {
    "train.steps": 1000, "train.batch": 64, "train.lr": 6e-3, "data.holdout": 0.2, "flow.noise_std": 0.2,
    "align.weight": 0.5, "align.blocks": [3, 4], "align.layers": [2],
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], Sequence[Strategy]]] = {
    "centre": ({}, ("none", "reverse")),
    "sigma-0.1": ({"flow.noise_std": 0.1}, ("none", "reverse")),
    "sigma-0.3": ({"flow.noise_std": 0.3}, ("none", "reverse")),
    "lr-1e-3": ({"train.lr": 1e-3}, ("none",)),
    "lambda-0.1": ({"align.weight": 0.1}, ("reverse",)),
    "lambda-2": ({"align.weight": 2.0}, ("reverse",)),
    "layer-3": ({"align.layers": [3]}, ("reverse",)),
    "block-4": ({"align.blocks": [4]}, ("reverse",)),
}


def run_one(config: RunConfig, directory: Path, split: str) -> pd.DataFrame:
    """Train (or finish) and score one run with one thread; a run that has scores is only read."""
    scores = directory / "scores.csv"
    if not scores.exists():
        torch.set_num_threads(1)
        done = directory / "train_state.pt"
        for _ in train(config, directory, resume=done.exists(), device="cpu"):
            pass
        run = load(directory)
        save_scores(run, evaluate(run, split))
    return pd.read_csv(scores)


def run_all(jobs: Iterable[tuple[RunConfig, Path]], split: str, workers: int) -> pd.DataFrame:
    """All jobs through joblib, a line each as they end; one tidy table."""
    from joblib import Parallel, delayed

    jobs = list(jobs)
    tables = []
    calls = (delayed(run_one)(config, directory, split) for config, directory in jobs)
    for table in Parallel(n_jobs=workers, return_as="generator_unordered")(calls):
        tables.append(table)
        scores = ", ".join(f"{row.metric} {row.value:.4f}" for row in table.itertuples())
        print(f"[{len(tables)}/{len(jobs)}] {table.run[0]} seed {table.train_seed[0]}: {scores}", file=sys.stderr, flush=True)
    return pd.concat(tables, ignore_index=True)


def search(out: Path, workers: int) -> pd.DataFrame:
    """Each variant with two seeds, scored on the validation part of the training split."""
    jobs = []
    for seed, (name, (change, strategies)) in product((0, 1), VARIANTS.items()):
        for strategy in strategies:
            settings = CENTRE | change | {"train.seed": seed, "name": f"{name}.{strategy}"}
            jobs.append((digits(strategy).override(settings), out / f"{name}.{strategy}-{seed}"))
    return run_all(jobs, "val", workers)


def study(out: Path, workers: int) -> pd.DataFrame:
    """The presets with three seeds each, scored on the test split."""
    jobs = [
        (digits(strategy).override({"train.seed": seed}), out / f"digits-{strategy}-{seed}")
        for seed, strategy in product(SEEDS, ALIGNED)
    ]
    return run_all(jobs, "test", workers)


def accuracy_curves(out: Path, workers: int) -> pd.DataFrame:
    """Held-out accuracy of one gradient step, and nats/dim, against steps for the presets with seed 0, to assets/studies.

    The runs are trained anew (or found finished in `out`): under the settings and the seed of the bundled ones, but on other
    machines rounding leads to other weights.
    """
    jobs = [
        (digits(strategy).override({"train.seed": SEEDS[0]}), out / f"digits-{strategy}-{SEEDS[0]}") for strategy in ALIGNED
    ]
    run_all(jobs, "test", workers)
    columns = ["step", "held_out_nats_per_dim", "held_out_accuracy"]
    tables = [Records(folder).table()[columns].dropna().assign(run=config.name) for config, folder in jobs]
    table = pd.concat(tables, ignore_index=True)[["run", *columns]]
    write_text(assets() / "studies" / f"{ACCURACY}.csv", table.to_csv(index=False, float_format="%.5g"))
    write_sums()
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds, one row a run name, one column a metric."""
    cells = table.groupby(["run", "metric"], sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    cells["shown"] = [f"{row['mean']:.4f} ± {row['std']:.4f}" for _, row in cells.iterrows()]
    wide = cells.pivot(index="run", columns="metric", values="shown")
    wide = wide.loc[table["run"].drop_duplicates(), table["metric"].drop_duplicates()]
    wide.insert(0, "seeds", cells.groupby("run")["count"].first())
    return wide.reset_index()


def bundle(out: Path) -> list[Path]:
    """Write seed 0 of each strategy to assets/runs in bfloat16, scored again as stored, and every finished table to
    assets/studies; returns the folders of the runs.
    """
    folders = []
    for strategy in ALIGNED:
        source, target = out / f"digits-{strategy}-{SEEDS[0]}", assets() / "runs" / f"digits-{strategy}"
        load(source).save(target, torch.bfloat16)
        write_text(target / "metrics.jsonl", (source / "metrics.jsonl").read_text(encoding="utf-8"))
        run = load(target)
        save_scores(run, evaluate(run))
        folders.append(target)
    for table in (out, out.parent / "search"):
        if (table / "scores.csv").exists():
            text = (table / "scores.csv").read_text(encoding="utf-8")
            write_text(assets() / "studies" / f"digits-{'search' if table.name == 'search' else 'strategies'}.csv", text)
    write_sums()
    return folders


def write_sums() -> None:
    """assets/SHA256SUMS, which `rrepa-lab doctor` checks."""
    root = assets()
    files = sorted(
        path for path in root.rglob("*") if path.is_file() and path.name != "SHA256SUMS" and "pictures" not in path.parts
    )
    write_text(root / "SHA256SUMS", "".join(f"{sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in files))


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "study", "bundle", "accuracy", "evaluator"))
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    given = parser.parse_args()
    if given.what == "evaluator":
        for _ in train_evaluator(EvaluatorConfig(), assets() / "evaluators" / "digits"):
            pass
        write_sums()
        print(f"accuracy on the test split: {accuracy(load_evaluator(DataConfig()), DataConfig()):.4f}")
        return
    if given.what == "accuracy":
        print(accuracy_curves(given.out, given.workers).groupby("run").tail(1).to_markdown(index=False))
        return
    if given.what == "bundle":
        print("\n".join(str(folder) for folder in bundle(given.out)))
        return
    table = search(given.out, given.workers) if given.what == "search" else study(given.out, given.workers)
    write_text(given.out / "scores.csv", table.to_csv(index=False))
    print(summary(table).to_markdown(index=False))


if __name__ == "__main__":
    main()
