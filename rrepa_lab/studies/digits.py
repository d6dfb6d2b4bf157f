"""The digits studies: how the bundled settings were found, and how the strategies compare under them.

    python -m rrepa_lab.studies.digits search --out runs/search     settings, on a validation split
    python -m rrepa_lab.studies.digits shifts --out runs/shifts     random shifts of the training images, on a validation split
    python -m rrepa_lab.studies.digits study  --out runs/digits     four strategies x five seeds, on the train and test splits
    python -m rrepa_lab.studies.digits bundle --out runs/digits     seed 0 becomes assets/runs; tables to assets/studies
    python -m rrepa_lab.studies.digits evaluator                    the evaluator of samples, assets/evaluators/digits

The encoder they all align with comes from `rrepa-lab encoder train`. Searches and studies can be interrupted and started
again: finished runs are recognised, the others go on from their checkpoint. The settings of the presets were chosen on
validation images alone: `search` with version 0.1, `shifts` for the augmentation and the stopping rule.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from joblib import Parallel, delayed

from rrepa_lab.data.config import DataConfig
from rrepa_lab.evaluation.evaluate import evaluate
from rrepa_lab.evaluation.evaluator import EvaluatorConfig, accuracy, load_evaluator, train_evaluator
from rrepa_lab.evaluation.train import train
from rrepa_lab.files import sha256, write_text
from rrepa_lab.measurements.claims import Claim, Contrast, verdict_table, verdicts
from rrepa_lab.measurements.compare import Finding
from rrepa_lab.measurements.spread import mean_and_spread, spread_text
from rrepa_lab.paths import assets
from rrepa_lab.runs.card import save_scores
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.names import METRICS
from rrepa_lab.runs.presets import ALIGNED, digits
from rrepa_lab.runs.records import Records
from rrepa_lab.runs.run import Run
from rrepa_lab.runs.store import load

SEEDS = (0, 1, 2, 3, 4)
DRAWS = 16  # of the noise, for the likelihoods of a study
CLAIMED: dict[str, Literal["higher", "lower"]] = {
    "nats_per_dim": "lower", "gradient_accuracy": "higher", "bayes_accuracy": "higher", "FD[digits]": "lower",
}  # fmt: skip

# one change at a time against the centre of the search; a change of the flow itself is tried without alignment too
CENTRE: dict[str, Any] = {
    "train.steps": 1000, "train.batch": 64, "train.lr": 6e-3, "data.holdout": 0.2, "flow.noise_std": 0.2,
    "align.weight": 0.5, "align.blocks": [3, 4], "align.layers": [2],
    "data.shift": 0, "train.keep": "last", "train.patience": 0,
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    "centre": ({}, ("none", "reverse")),
    "sigma-0.1": ({"flow.noise_std": 0.1}, ("none", "reverse")),
    "sigma-0.3": ({"flow.noise_std": 0.3}, ("none", "reverse")),
    "lr-1e-3": ({"train.lr": 1e-3}, ("none",)),
    "lambda-0.1": ({"align.weight": 0.1}, ("reverse",)),
    "lambda-2": ({"align.weight": 2.0}, ("reverse",)),
    "layer-3": ({"align.layers": [3]}, ("reverse",)),
    "block-4": ({"align.blocks": [4]}, ("reverse",)),
}
# part of the training images that is shifted by up to one pixel; an 8x8 digit fills its image, so a shift cuts it off
SHIFTS = (0.0, 0.25, 0.5)
CURVES = ("train_nats_per_dim", "held_out_nats_per_dim", "train_accuracy", "held_out_accuracy")


def train_one(config: RunConfig, directory: Path) -> Path:
    """Train a run with one thread, or finish it; a finished one is left alone. Returns its folder."""
    torch.set_num_threads(1)
    for _ in train(config, directory, resume="auto", device="cpu"):
        pass
    return directory


def run_one(config: RunConfig, directory: Path, splits: Sequence[str], draws: int) -> pd.DataFrame:
    """Train (or finish) and score one run with one thread; a run that has scores is only read."""
    scores = directory / "scores.csv"
    if not scores.exists():
        run = load(train_one(config, directory))
        save_scores(run, evaluate(run, splits, n_noise_samples=draws))
    return pd.read_csv(scores).assign(run=config.name)  # the runs of all seeds


def run_all(jobs: Iterable[tuple[RunConfig, Path]], splits: Sequence[str], workers: int, draws: int = 4) -> pd.DataFrame:
    """All jobs through joblib, a line each as they end; one tidy table in the order of the jobs."""
    jobs = list(jobs)
    tables: list[pd.DataFrame] = []
    calls = (delayed(run_one)(config, directory, splits, draws) for config, directory in jobs)
    done: Iterable[pd.DataFrame] = Parallel(n_jobs=workers, return_as="generator_unordered")(calls)
    for table in done:
        tables.append(table)
        scores = ", ".join(f"{row.split} {row.metric} {row.value:.4f}" for row in table.itertuples())
        print(f"[{len(tables)}/{len(jobs)}] {table.run[0]} seed {table.train_seed[0]}: {scores}", file=sys.stderr, flush=True)
    order = {(config.name, config.train.seed): place for place, (config, _) in enumerate(jobs)}
    tables.sort(key=lambda table: order[table.run[0], table.train_seed[0]])
    return pd.concat(tables, ignore_index=True)


def search(out: Path, workers: int) -> pd.DataFrame:
    """Each variant with two seeds, scored on the validation part of the training split."""
    jobs = []
    for seed, (name, (change, strategies)) in product((0, 1), VARIANTS.items()):
        for strategy in strategies:
            settings = CENTRE | change | {"train.seed": seed, "name": f"{name}.{strategy}"}
            jobs.append((digits(strategy).override(settings), out / f"{name}.{strategy}-{seed}"))
    return run_all(jobs, ["val"], workers)


def shifts(out: Path, workers: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each augmentation without alignment and with reverse, seed 0, trained to the last step.

    Returns: scores of the best checkpoint on the validation split; and training and validation curves, with the columns
        shift_probability, run, step, and those of CURVES.
    """
    jobs = [
        (
            digits(strategy).override(_shifted(part) | {"name": f"shift-{part:g}.{strategy}"}),
            out / f"shift-{part:g}.{strategy}-0",
        )
        for part in SHIFTS
        for strategy in ("none", "reverse")
    ]
    scores = run_all(jobs, ["val"], workers, DRAWS)
    curves = []
    for config, folder in jobs:
        rows = Records(folder).table()[["step", *CURVES]].dropna()
        curves.append(rows.assign(shift_probability=config.data.shift_probability, run=config.name))
    return scores, pd.concat(curves, ignore_index=True)[["shift_probability", "run", "step", *CURVES]]


def _shifted(part: float) -> dict[str, Any]:
    return {"data.shift": int(part > 0), "data.shift_probability": part, "train.patience": 0}


def study(out: Path, workers: int) -> pd.DataFrame:
    """The presets with five seeds each, scored on the train and test splits."""
    jobs = [
        (digits(strategy).override({"train.seed": seed}), out / f"digits-{strategy}-{seed}")
        for seed, strategy in product(SEEDS, ALIGNED)
    ]
    return run_all(jobs, ["train", "test"], workers, DRAWS)


def strategy_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Whether each strategy is ahead of no alignment on the test split, paired by training seed; see `measurements.claims`."""
    test = table[table["split"] == "test"]
    columns = ["run", "train_seed", "metric", "value", "unit", "n", "protocol"]
    found = [
        Finding(name, {"align.strategy": strategy}, *rest)
        for strategy, name, *rest in test[["strategy", *columns]].itertuples(index=False)
    ]
    claims = [
        Claim(
            claim=f"{strategy} has a {ahead} {metric} than no alignment",
            metric=metric,
            ahead=ahead,
            contrasts=[Contrast(better={"align.strategy": strategy}, than={"align.strategy": "none"})],
        )
        for metric, ahead in CLAIMED.items()
        for strategy in ALIGNED
        if strategy != "none"
    ]
    return verdicts(found, claims)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds, one row a run name and split, one column a metric."""
    cells = mean_and_spread(table, ["run", "split", "metric"]).reset_index()
    cells["shown"] = [spread_text(value, sd) for value, sd in zip(cells["value"], cells["sd"], strict=True)]
    wide = cells.pivot(index=["run", "split"], columns="metric", values="shown").fillna("")
    wide = wide.loc[list(dict.fromkeys(zip(table["run"], table["split"], strict=True))), table["metric"].drop_duplicates()]
    wide.insert(0, "seeds", cells.groupby(["run", "split"])["seeds"].first())
    return wide.reset_index()


def bundle(out: Path) -> list[Path]:
    """Write seed 0 of each strategy to assets/runs in bfloat16, scored again as stored; returns the folders of the runs."""
    folders = []
    for strategy in ALIGNED:
        target = assets() / "runs" / f"digits-{strategy}"
        run = store(out / f"digits-{strategy}-{SEEDS[0]}", target)
        save_scores(run, evaluate(run, ["train", "test"], n_noise_samples=DRAWS))
        folders.append(target)
    return folders


def store(source: Path, target: Path) -> Run:
    """Write a trained run to another folder in bfloat16, with the records of its training; returns it as stored."""
    load(source).save(target, torch.bfloat16)
    write_text(target / METRICS, (source / METRICS).read_text(encoding="utf-8"))
    return load(target)


def keep_table(name: str, table: pd.DataFrame) -> None:
    """Write a table to assets/studies."""
    write_text(assets() / "studies" / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
    write_sums()


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
    parser.add_argument("what", choices=("search", "shifts", "study", "bundle", "evaluator"))
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    given = parser.parse_args()
    if given.what == "evaluator":
        for _ in train_evaluator(EvaluatorConfig(), assets() / "evaluators" / "digits"):
            pass
        write_sums()
        print(f"accuracy on the test split: {accuracy(load_evaluator(DataConfig()), DataConfig()):.4f}")
    elif given.what == "bundle":
        print("\n".join(str(folder) for folder in bundle(given.out)))
        write_sums()
    elif given.what == "search":
        table = search(given.out, given.workers)
        keep_table("digits-search", table)
        print(summary(table).to_markdown(index=False))
    elif given.what == "shifts":
        table, curves = shifts(given.out, given.workers)
        keep_table("digits-shifts", table)
        keep_table("digits-shifts-curves", curves)
        print(summary(table).to_markdown(index=False))
    else:
        table = study(given.out, given.workers)
        keep_table("digits-strategies", table)
        found = strategy_verdicts(table)
        keep_table("digits-strategies-verdicts", found)
        print(summary(table).to_markdown(index=False))
        print(verdict_table(found).to_markdown(index=False))


if __name__ == "__main__":
    main()
