"""Tables and figures of the report about layers and classification, from the committed CSV files; see `report`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd

from rrepa_lab.runs.presets import ALIGNED
from rrepa_lab.studies.report_text import between, cell, interval, markdown, study_table

LAYERS = "digits-layers"
NEAREST = "block.3.layer.2"  # the first aligned tap of the bundled runs


def layers() -> str:
    """Probes of the best and of the aligned layer, CKA there in both directions, and classification by the flow itself."""
    table = study_table(f"{LAYERS}-seeds")
    real = table[(table["direction"] == "forward") & (table["label_fed"] == "none")]
    rows = []
    for strategy in ALIGNED:
        own = real[real["strategy"] == strategy]
        linear = own[(own["metric"] == "linear_accuracy") & (own["layer"] > 0)]
        mean, every = (linear[linear["pool"] == pool] for pool in ("mean", "all"))
        tops = [part.iloc[int(part["value"].argmax())] for part in (mean, every)]
        there = mean[mean["tap"] == NEAREST].iloc[0]
        near = [encoder_similarity(table, f"digits-{strategy}", direction) for direction in ("forward", "reverse")]
        flows = [own[(own["metric"] == f"{name}_accuracy") & (own["pool"] == "mean")].iloc[0]
                 for name in ("gradient", "iterated", "bayes")]  # fmt: skip
        rows.append([f"`digits-{strategy}`", *(cell(row, 3) for row in (*tops, there, *near, *flows))])
    titles = ["run", "best layer, mean of tokens", "best layer, all tokens", "block 3, layer 2 (aligned)"]
    titles += ["CKA there, test images", "CKA there, generating pass", "one gradient step", "twenty steps", "Bayes' rule"]
    return markdown(titles, rows)


def encoder_similarity(table: pd.DataFrame, run: str, direction: str = "forward") -> "pd.Series[Any]":
    """The row of CKA with the encoder at the aligned layer, no label given to the flow."""
    chosen = (table["run"] == run) & (table["metric"] == "cka") & (table["tap"] == NEAREST)
    chosen &= (table["direction"] == direction) & (table["label_fed"] == "none") & table["other"].notna()
    return table[chosen].iloc[0]


def classification() -> str:
    """Accuracy on test images of every method, with the label given to one block, and averaged over noise draws."""
    table = study_table("digits-classification-seeds")
    table = table[table["metric"].str.endswith("_accuracy")]
    words = {"gradient": "one step", "iterated": "twenty steps", "bayes": "Bayes' rule"}
    rows = []
    for (method, draws, blocks), part in table.groupby(["method", "n_noise_samples", "blocks"], sort=False):
        how = words[str(method)] + ("" if blocks == "all" else f", label given to block {blocks} alone")
        how += f", mean of {draws} draw{'s' if draws != 1 else ''} of noise" if draws else ""
        rows.append([how, *(cell(part[part["strategy"] == strategy].iloc[0], 3) for strategy in ALIGNED)])
    return markdown(("method", *(f"`digits-{strategy}`" for strategy in ALIGNED)), rows)


def step_gap() -> str:
    """Change of one-step accuracy if only gain or curvature is of test images; mean over seeds with Student's t interval."""
    table = study_table("digits-step-gap-effects")
    words = {"gain of the second split": "gain of test images", "curvature of the second split": "curvature of test images"}
    rows = []
    for strategy in ALIGNED:
        own = table[table["strategy"] == strategy]
        rows.append([f"`digits-{strategy}`", *(_mean_interval(own[own["effect"] == effect]["value"], 3) for effect in words)])
    return markdown(("run", *words.values()), rows)


def _mean_interval(values: "pd.Series[float]", digits: int) -> str:
    """Mean with its two-sided 95 % interval (Student's t) over seeds."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    return interval({"difference": mean, "low": mean - half, "high": mean + half}, digits)


def probe_level(tap: str) -> str:
    """Accuracy of a linear probe of pixels or encoder on test images."""
    table = study_table(f"{LAYERS}-seeds")
    chosen = (table["tap"] == tap) & (table["metric"] == "linear_accuracy") & (table["direction"] == "forward")
    return f"{table[chosen & (table['pool'] == 'mean')]['value'].iloc[0]:.3f}"


def all_token_range() -> str:
    """Smallest to largest linear accuracy of the layers with all tokens side by side."""
    table = study_table(f"{LAYERS}-seeds")
    chosen = (table["pool"] == "all") & (table["metric"] == "linear_accuracy") & (table["layer"] > 0)
    return between(table[chosen & (table["direction"] == "forward")]["value"], 3)


TABLES: dict[str, Callable[[], str]] = {
    "layers": layers,
    "classification": classification,
    "step-gap": step_gap,
}
VALUES: dict[str, Callable[[], str]] = {
    "probe-pixels": partial(probe_level, "pixels"),
    "probe-encoder": partial(probe_level, "encoder"),
    "probe-all-tokens": all_token_range,
}
