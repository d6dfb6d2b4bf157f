"""Tables of the report about photographs, from the committed study files and what is measured of them; see `report`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pandas as pd

from rrepa_lab.analysis.probe import best_layer
from rrepa_lab.measurements.compare import wide
from rrepa_lab.paths import assets
from rrepa_lab.runs.card import read_scores
from rrepa_lab.studies.photographs import PhotographStudy, claims_side_by_side, effect, read_studies, verdict_words
from rrepa_lab.studies.reading import PHOTOGRAPHS, load_table, photographs
from rrepa_lab.studies.report_digits import STUDY
from rrepa_lab.studies.report_text import markdown, study_table

FD, NATS = "FD[efficientnet-lite0]", "nats_per_dim"
ALIGNED_TAPS = ("block.3.layer.3", "block.4.layer.3")
NOTHING = "No cell is measured yet."
# column of `compare.wide` -> title; other metrics are in the CSV files
SCORES = {
    NATS: "nats/dim", "gradient_accuracy": "one step", "gradient_accuracy[clean]": "one step, clean images",
    "iterated_accuracy": "twenty steps", "bayes_accuracy": "Bayes' rule", "linear_accuracy": "best layer, linear probe",
    FD: "Fréchet distance", "KD[efficientnet-lite0]": "kernel distance",
    "label_agreement": "labels agree",
}  # fmt: skip
# split and metric of the bundled runs' scores -> title
BUNDLED = {
    ("train", NATS): "nats/dim, train", ("test", NATS): "test",
    ("train", "gradient_accuracy"): "one step, train", ("test", "gradient_accuracy"): "test",
    ("test", "bayes_accuracy"): "Bayes' rule, test", ("test", FD): "Fréchet distance",
}  # fmt: skip


def claims() -> str:
    """Every claim with the paper's figures and its verdicts, digits and photographs side by side."""
    return markdown(*claims_side_by_side(study_table(f"{STUDY}-verdicts"), read_studies()))


def scores() -> str:
    """The settings that are measured, mean and spread over training seeds, a table for each study."""
    parts = [
        f"**{one.study.title}**, {one.done} of {one.cells} cells:\n\n{_of_study(one)}" for one in read_studies() if one.done
    ]
    return "\n\n".join(parts) or NOTHING


def _of_study(one: PhotographStudy) -> str:
    """Rows in the order of the study's settings; columns: settings that differ, seeds, and the scores of SCORES."""
    table = one.scores()
    assert table is not None
    shown = wide(table)
    metrics = set(table["metric"])
    columns = [name for name in shown.columns if name not in metrics or name in SCORES]
    columns.sort(key=lambda name: list(SCORES).index(name) + 1 if name in SCORES else 0)
    return markdown((SCORES.get(name, name) for name in columns), shown[columns].itertuples(index=False))


def bundled() -> str:
    """The scores of the bundled runs of photographs, on the training and the test split; one training seed each."""
    rows = []
    for name in (name for table in PHOTOGRAPHS for name in photographs(table)):
        found = _scores_of(name)
        rows.append([f"`{name}`", *(_value(found[key], interval=key[0] == "test") for key in BUNDLED)])
    return markdown(["run", *BUNDLED.values()], rows)


def layers() -> str:
    """What the layers of the bundled runs know: the best linear probe, and CKA and LDS at the layers that are aligned."""
    table = pd.concat(map(load_table, PHOTOGRAPHS), ignore_index=True)
    table = table[table["direction"] == "forward"]
    best, values = best_layer(table).set_index("run"), table.set_index(["run", "metric", "tap"])["value"]
    rows = []
    for run in dict.fromkeys(table["run"]):
        probe = f"{best['value'][run]:.3f} ({best['tap'][run]})"
        probes = [f"{values[run, 'linear_accuracy', tap]:.3f}" for tap in ("pixels", "encoder")]
        near = [f"{values[run, metric, tap]:.2f}" for metric in ("cka", "lds") for tap in ALIGNED_TAPS]
        rows.append([f"`{run}`", probe, *probes, *near, f"{values[run, 'lds', 'encoder']:.2f}"])
    taps = [f"{title}, {tap}" for title in ("CKA", "LDS") for tap in ALIGNED_TAPS]
    return markdown(["run", "best linear probe", "of pixels", "of the teacher", *taps, "LDS, teacher"], rows)


def _scores_of(name: str) -> dict[tuple[str, str], Mapping[Any, Any]]:
    """The rows of a bundled run's scores by split and metric."""
    table = read_scores(assets() / "runs" / name)
    assert table is not None
    return {(row["split"], row["metric"]): row for row in table.to_dict("records")}


def _value(row: Mapping[Any, Any], interval: bool = True) -> str:
    """A score, and its interval over images or samples."""
    value, low, high = (float(row[name]) for name in ("value", "low", "high"))
    digits = 0 if abs(value) >= 100 else 3
    return f"{value:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if interval else "")


def short(space: str = "") -> str:
    """A pair of bundled runs in a line: likelihood, accuracy and distance of samples, without alignment and with reverse.

    Args:
        space: "" for pixels, "latent-".
    """
    pair = [_scores_of(f"cifar10-{space}{strategy}") for strategy in ("none", "reverse")]
    parts = []
    for metric, title in ((NATS, "nats/dim"), ("gradient_accuracy", "one step"), (FD, "Fréchet distance")):
        parts.append(f"{title} {' and '.join(_value(found['test', metric]) for found in pair)}")
    return "; ".join(parts)


def difference(claim: str) -> str:
    """A claim's difference in `cifar10-main` with interval, seeds and verdicts: "90.5 [55.9, 125] (3 seeds), reproduced"."""
    study = next(one for one in read_studies() if one.name == "cifar10-main")
    table = study.verdicts()
    rows = table[table["claim"] == claim]
    (row,) = rows.to_dict("records")
    return ", ".join([f"{effect(row, with_size=False)} ({row['seeds']:.0f} seeds)", *verdict_words(rows)])


VALUES: dict[str, Callable[[], str]] = {
    "photographs-short": short,
    "photographs-short-latents": partial(short, "latent-"),
    "photographs-samples": partial(
        difference, "Reverse alignment of the last blocks makes the samples better than no alignment"
    ),
    "photographs-accuracy": partial(difference, "Reverse alignment of the last blocks classifies better than no alignment"),
    "photographs-clean": partial(
        difference, "Reverse alignment of the last blocks classifies clean images better than no alignment"
    ),
    "photographs-steps": partial(
        difference, "Reverse alignment needs fewer steps to the final Fréchet distance of no alignment"
    ),
}
TABLES: dict[str, Callable[[], str]] = {
    "photograph-claims": claims, "photograph-scores": scores, "photograph-runs": bundled, "photograph-layers": layers,
}  # fmt: skip
