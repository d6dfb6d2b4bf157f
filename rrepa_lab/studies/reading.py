"""Measurements of the bundled runs: every block and layer in both directions, and classification without a classifier.

    python -m rrepa_lab.studies.reading bundled                      the four bundled runs of digits
    python -m rrepa_lab.studies.reading seeds --runs runs/digits     the runs of `studies.digits study`: mean and standard
                                                                     deviation over their seeds
    python -m rrepa_lab.studies.reading gap                          why one step is worse than Bayes' rule on new images
    python -m rrepa_lab.studies.reading photographs                  the layers of the bundled runs of CIFAR-10 ($RREPA_DATA)
    python -m rrepa_lab.studies.reading show                         what the shipped tables say

The tables go to assets/studies: digits-layers.csv and digits-classification.csv, and the same with -seeds; `seeds` also writes
digits-layers-verdicts.csv, what they say of the paper's claims, paired by seed; `gap` writes digits-step-gap.csv and
digits-step-gap-effects.csv, of the bundled runs or of those in --runs; `photographs` writes cifar10-layers.csv
and cifar10-latent-layers.csv. Every row carries its protocol.
Probes are fitted on the training split and scored on the test split (360 images) or on 1,000 generated images; similarities
are taken over the test split, or over 1,000 generated images; classifications are of the test split. Of CIFAR-10 2,000 images
of each split are read, class-balanced.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch

from rrepa_lab.analysis.features import POOLS, FeatureProtocol, Images
from rrepa_lab.analysis.probe import best_layer, probe
from rrepa_lab.analysis.report import classification_report
from rrepa_lab.analysis.similarity import similarity
from rrepa_lab.analysis.spatial import spatial_structure
from rrepa_lab.analysis.step_gap import StepGap, step_gap
from rrepa_lab.analysis.trace import DIRECTIONS
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_text
from rrepa_lab.measurements.claims import Claim, Contrast, verdict_table, verdicts
from rrepa_lab.measurements.compare import Finding
from rrepa_lab.measurements.spread import mean_and_spread
from rrepa_lab.paths import assets
from rrepa_lab.readers import read_table
from rrepa_lab.runs.presets import ALIGNED
from rrepa_lab.runs.store import load
from rrepa_lab.studies.digits import SEEDS, write_sums

LAYERS, CLASSES, GAP = "digits-layers", "digits-classification", "digits-step-gap"
PIXELS, LATENTS = PHOTOGRAPHS = "cifar10-layers", "cifar10-latent-layers"  # tables of the bundled runs of CIFAR-10, by space
PHOTOGRAPHS_LIMIT = 2000  # images of a split that are read of these
Found = TypeVar("Found")
CLASSIFIERS = ("gradient", "iterated", "bayes")
READINGS = {"gradient": "one step", "iterated": "twenty steps", "bayes": "Bayes' rule"}
BEST, BEST_OF_ALL, ALIGNED_LAYER = "best layer (mean of tokens)", "best layer (all tokens)", "block.3.layer.2"
_TEXTS = dict.fromkeys(
    (
        "tap",
        "module_path",
        "other",
        "other_tap",
        "floor_of",
        "pool",
        "probe",
        "blocks",
        "align.strategy",
        "align.blocks",
        "align.layers",
    ),
    str,
)  # fmt: skip


def read_layers(source: str | Path) -> pd.DataFrame:
    """Probes and similarities of one run, with one thread."""
    torch.set_num_threads(1)
    run = load(source)
    tables = [
        probe(run, protocol=[FeatureProtocol(pool=pool) for pool in POOLS], classifiers=CLASSIFIERS),
        probe(run, protocol=FeatureProtocol("reverse")),
        probe(run, protocol=FeatureProtocol("reverse", guidance=2.0)),
        similarity(run),
        similarity(run, protocol=FeatureProtocol("reverse")),
        similarity(run, protocol=FeatureProtocol("reverse", feed_label=True)),
    ]
    print(f"layers of {source}", file=sys.stderr, flush=True)
    return pd.concat(tables, ignore_index=True).drop(columns="device").assign(run=run.config.name)  # the same for all seeds


def read_photographs(source: str | Path) -> pd.DataFrame:
    """Probes, similarities and spatial structure of one run of photographs in both directions, with one thread."""
    torch.set_num_threads(1)
    run, images = load(source), Images(limit=PHOTOGRAPHS_LIMIT)
    tables = []
    for protocol in map(FeatureProtocol, DIRECTIONS):
        classifiers = ("gradient",) if protocol.direction == "forward" else ()
        tables += [
            probe(run, protocol=protocol, limit=PHOTOGRAPHS_LIMIT, classifiers=classifiers),
            similarity(run, protocol=protocol, images=images),
            spatial_structure(run, protocol=protocol, images=images),
        ]
    print(f"layers of {source}", file=sys.stderr, flush=True)
    return pd.concat(tables, ignore_index=True).drop(columns="device").assign(run=run.config.name)


def read_classes(source: str | Path) -> pd.DataFrame:
    """Accuracy and calibration of one run by every method, by block, and averaged over noise samples; one thread."""
    torch.set_num_threads(1)
    run = load(source)
    blocks = range(1, run.flow.config.blocks + 1)
    reports = [classification_report(run, method) for method in CLASSIFIERS]
    reports += [classification_report(run, noise=count) for count in (1, 4, 16)]
    reports += [classification_report(run, method, blocks=[t]) for method in ("gradient", "bayes") for t in blocks]
    print(f"classes of {source}", file=sys.stderr, flush=True)
    return pd.concat([report.summary for report in reports], ignore_index=True).assign(run=run.config.name)


def read_gap(source: str | Path) -> StepGap:
    """Curvature and overfitting in the one-step accuracy of one run, train against test split; one thread."""
    torch.set_num_threads(1)
    run = load(source)
    found = step_gap(run)
    print(f"step and Bayes' rule of {source}", file=sys.stderr, flush=True)
    return StepGap(*(part.assign(run=run.config.name) for part in found))


def photographs(table: str) -> list[str]:
    """The bundled runs of PIXELS or of LATENTS."""
    names = sorted(path.parent.name for path in (assets() / "runs").glob("cifar10-*/config.json"))
    return [name for name in names if ("latent" in name) == (table == LATENTS)]


def read_runs(read: Callable[[str | Path], Found], sources: Sequence[str | Path], workers: int) -> list[Found]:
    """What is read of each run, `workers` at a time."""
    from joblib import Parallel, delayed

    return list(Parallel(n_jobs=workers)(delayed(read)(source) for source in sources))


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Mean (`value`), standard deviation (`sd`) and number of training seeds of every cell; floors are means too."""
    beside = [name for name in ("floor", "above_floor") if name in table]
    keys = [name for name in table.columns if name not in ("train_seed", "value", "standard_error", *beside)]
    cells = mean_and_spread(table, keys).rename(columns={"seeds": "train_seeds"})
    floors = table.groupby(keys, sort=False, dropna=False)[beside].mean() if beside else None
    return (cells if floors is None else cells.join(floors)).reset_index()


def _readings(layers: pd.DataFrame) -> list[Finding]:
    """Accuracies on real images by what is read, and CKA with the encoder, of the per-seed table of `read_layers`.

    The best layer of a linear probe is that of the mean over seeds, one for each strategy: a choice on the test split, which
    favours the probe a little.
    """
    real = layers[(layers["direction"] == "forward") & (layers["label_fed"] == "none")]
    mean, every = (real[real["pool"] == pool] for pool in ("mean", "all"))
    linear = [part[(part["metric"] == "linear_accuracy") & (part["layer"] > 0)] for part in (mean, every)]
    read = {words: mean[mean["metric"] == f"{name}_accuracy"] for name, words in READINGS.items()}
    for words, part in zip((BEST, BEST_OF_ALL), linear, strict=True):
        tops = part.groupby(["strategy", "tap"])["value"].mean().groupby("strategy").idxmax()
        read[words] = part[[key in set(tops) for key in zip(part["strategy"], part["tap"], strict=True)]]
    read[ALIGNED_LAYER] = linear[0][linear[0]["tap"] == ALIGNED_LAYER]
    near = mean[(mean["metric"] == "cka") & (mean["tap"] == ALIGNED_LAYER) & (mean["other"] != "")]
    parts = [("accuracy", "fraction", words, part) for words, part in read.items()]
    return [
        Finding(
            row["run"],
            {"align.strategy": row["strategy"], "read": words},
            row["train_seed"],
            metric,
            row["value"],
            unit,
            row["n"],
            "",
        )
        for metric, unit, words, part in [*parts, ("cka", "CKA", ALIGNED_LAYER, near)]
        for row in part.to_dict("records")
    ]


def reading_verdicts(layers: pd.DataFrame) -> pd.DataFrame:
    """What the per-seed table of `read_layers` says of the paper's claims about layers; see `measurements.claims.verdicts`.

    "As good as" is tested as "at least as good as": contradicted where the probe's lead has an interval above zero.
    """

    def ahead(claim: str, metric: str, pairs: Sequence[tuple[dict[str, str], dict[str, str]]]) -> Claim:
        return Claim(claim=claim, metric=metric, contrasts=[Contrast(better=better, than=than) for better, than in pairs])

    def of(strategy: str, read: str) -> dict[str, str]:
        return {"align.strategy": strategy, "read": read}

    steps = [
        ahead(f"{words.capitalize()}: at least as accurate as a linear probe of the {layer}", "accuracy",
              [(of(strategy, words), of(strategy, layer)) for strategy in ALIGNED])
        for words in ("one step", "twenty steps") for layer in (BEST, BEST_OF_ALL)
    ]  # fmt: skip
    aligned = [
        ahead(claim, metric, [(of(strategy, ALIGNED_LAYER), of("none", ALIGNED_LAYER)) for strategy in ALIGNED[1:]])
        for claim, metric in (
            ("Alignment makes the class easier to read at the aligned layer", "accuracy"),
            ("Alignment brings the aligned layer closer to the encoder", "cka"),
        )
    ]
    return verdicts(_readings(layers), steps + aligned)


def load_table(name: str = LAYERS) -> pd.DataFrame:
    """A shipped table by its name without .csv; LabError if there is none."""
    path = assets() / "studies" / f"{name}.csv"
    if not path.is_file():
        raise LabError(f"no table at {path}: make it by python -m rrepa_lab.studies.reading")
    return read_layer_table(path)


def read_layer_table(path: Path) -> pd.DataFrame:
    """A table of measurements by layer as it was written: names stay text, also where they look like numbers."""
    table = read_table(path, dtype=_TEXTS).rename(columns={"draws": "n_noise_samples"})  # its name in version 0.1
    texts = table.columns.intersection(list(_TEXTS))
    return table.assign(**{text: table[text].fillna("") for text in texts})


def levels(layers: pd.DataFrame) -> pd.DataFrame:
    """For each run the best layer of a linear probe on real images, beside pixels, encoder and what needs no training.

    A table over seeds gives "mean ± standard deviation"; the best layer is then the best of the means.
    """
    real = layers[layers["direction"] == "forward"].copy()
    real["shown"] = _shown(real)
    every = real[real["pool"] == "all"]
    real = real[real["pool"] == "mean"]
    linear = real[real["metric"] == "linear_accuracy"]
    columns = {
        "best layer": best_layer(real).set_index("run")["tap"],
        "linear probe there": best_layer(real).set_index("run")["shown"],
    }
    if len(every):
        columns["best layer, all tokens"] = best_layer(every).set_index("run")["shown"]
    columns |= {f"linear, {tap}": linear[linear["tap"] == tap].set_index("run")["shown"] for tap in ("pixels", "encoder")}
    columns |= {name: real[real["metric"] == f"{name}_accuracy"].set_index("run")["shown"] for name in CLASSIFIERS}
    return pd.DataFrame(columns).reset_index()


def _shown(rows: pd.DataFrame) -> list[str]:
    if "sd" not in rows:
        return [f"{value:.3f}" for value in rows["value"]]
    return [f"{value:.3f} ± {sd:.3f}" for value, sd in zip(rows["value"], rows["sd"], strict=True)]


def evidence(classes: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of each run by method, blocks that see the label, and noise draws."""
    rows = classes[classes["metric"].str.endswith("_accuracy")].copy()
    rows["value"] = _shown(rows)
    draws = rows["n_noise_samples"].map(lambda count: f", {count} draws" if count else "")
    rows["how"] = rows["method"] + rows["blocks"].map(lambda text: "" if text == "all" else f", block {text} only") + draws
    return rows.pivot(index="how", columns="run", values="value").loc[list(dict.fromkeys(rows["how"]))].reset_index()


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bundled", "seeds", "gap", "photographs", "show"))
    parser.add_argument("--runs", type=Path, help="folder of `studies.digits study` (seeds: runs/digits)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    given = parser.parse_args()
    sources: list[str | Path] = [f"digits-{strategy}" for strategy in ALIGNED]
    if given.what == "seeds" or given.runs is not None:
        folder = given.runs or Path("runs/digits")
        sources = [folder / f"{name}-{seed}" for name in sources for seed in SEEDS]
    if given.what == "gap":
        gaps = read_runs(read_gap, sources, given.workers)
        for name, part in ((GAP, "table"), (f"{GAP}-effects", "effects")):
            table = pd.concat([getattr(gap, part) for gap in gaps], ignore_index=True)
            write_text(assets() / "studies" / f"{name}.csv", table.to_csv(index=False, float_format="%.5g"))
            print(f"\n{name}.csv\n\n{table.to_markdown(index=False, floatfmt='.4f')}")
        write_sums()
        return
    if given.what == "photographs":
        for name in PHOTOGRAPHS:
            table = pd.concat(read_runs(read_photographs, photographs(name), given.workers), ignore_index=True)
            write_text(assets() / "studies" / f"{name}.csv", table.to_csv(index=False, float_format="%.5g"))
            print(f"\n{name}.csv\n\n{levels(table).to_markdown(index=False, disable_numparse=True)}")
        write_sums()
        return
    for name, read in ((LAYERS, read_layers), (CLASSES, read_classes)) if given.what != "show" else ():
        table = pd.concat(read_runs(read, sources, given.workers), ignore_index=True)
        over = given.what == "seeds"
        if over and name == LAYERS:
            found = reading_verdicts(table)
            write_text(assets() / "studies" / f"{name}-verdicts.csv", found.to_csv(index=False, float_format="%.6g"))
            print(verdict_table(found).to_markdown(index=False, disable_numparse=True))
        path = assets() / "studies" / f"{name}{'-seeds' if over else ''}.csv"
        write_text(path, (over_seeds(table) if over else table).to_csv(index=False, float_format="%.5g"))
        write_sums()
    for name in (f"{kind}{suffix}" for suffix in ("", "-seeds") for kind in (LAYERS, CLASSES)):
        if (assets() / "studies" / f"{name}.csv").is_file():
            table = load_table(name)
            shown = levels(table) if name.startswith(LAYERS) else evidence(table)
            print(f"\n{name}.csv\n\n{shown.to_markdown(index=False, disable_numparse=True)}")


if __name__ == "__main__":
    main()
