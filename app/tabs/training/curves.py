"""Curves of how runs learned, and the settings in which they differ."""

from collections.abc import Callable
from functools import partial

import pandas as pd
import plotly.graph_objects as go
from server.runs import run_folder

import rrepa_lab as rl
from rrepa_lab.measurements.compare import as_text, settings_of
from rrepa_lab.runs.presets import config_file
from rrepa_lab.runs.records import Records
from rrepa_lab.viz.training import accuracy_curves, loss_curves, loss_parts, similarity_curves

# what can be shown: the figure, and the column of metrics.jsonl (or how one begins) that it needs
SHOWN: dict[str, tuple[Callable[..., go.Figure], str]] = {
    "nats/dim": (partial(loss_curves, unit="nats/dim"), "held_out_nats_per_dim"),
    "bits/dim": (partial(loss_curves, unit="bits/dim"), "held_out_nats_per_dim"),
    "loss parts": (loss_parts, "loss"),
    "similarity": (similarity_curves, "similarity."),
    "accuracy": (accuracy_curves, "held_out_accuracy"),
}
LIKELIHOODS = ("nats/dim", "bits/dim", "loss parts")
AXES = {"steps": "step", "images": "images", "seconds": "seconds"}


def config_of(name: str) -> rl.RunConfig:
    """The configuration of a run on offer, without its weights."""
    return config_file(run_folder(name) / "config.json")


def metrics_of(name: str) -> pd.DataFrame:
    """metrics.jsonl of a run with a column `images`, and with seconds that go on where it was resumed."""
    table = Records(run_folder(name)).table()
    if table.empty:
        return table
    seconds = table["seconds"]
    before = seconds.shift(fill_value=0.0).where(seconds.diff() < 0, 0.0).cumsum()
    return table.assign(images=table["step"] * config_of(name).train.batch, seconds=seconds + before)


def differences(names: list[str]) -> pd.DataFrame:
    """The settings in which runs differ, among those that have them, and the seed: a row each, a column a run."""
    settings = {}
    for name in names:
        config = config_of(name)
        settings[name] = {key: str(as_text(value)) for key, value in settings_of(config).items()}
        settings[name]["train.seed"] = str(config.train.seed)
    rows = []
    for key in dict.fromkeys(key for one in settings.values() for key in one):
        values = {name: one.get(key, "-") for name, one in settings.items()}
        if len(set(values.values()) - {"-"}) > 1:
            rows.append({"setting": key, **values})
    return pd.DataFrame(rows, columns=["setting", *names])


def curves_of(names: list[str], show: str, axis: str) -> tuple[go.Figure, str, pd.DataFrame]:
    """The curves of runs, a note on what they are and what is missing, and the settings in which the runs differ.

    Args:
        show: key of SHOWN.
        axis: key of AXES.
    """
    configs = {name: config_of(name) for name in names}
    left_out = _other_spaces(configs) if show in LIKELIHOODS else {}
    configs = {name: config for name, config in configs.items() if name not in left_out}
    tables = {name: metrics_of(name) for name in configs}
    make, column = SHOWN[show]
    figure = make(tables, _caption(configs), x=AXES[axis])
    table = differences(names)
    lines = [_meaning(configs, show), *left_out.values()]
    missing = [name for name in tables if not _has(tables[name], column)]
    if missing:
        lines.append(f"Not recorded for {', '.join(f'`{name}`' for name in missing)}: {_reason(show)}.")
    lines.append(_differences_note(names, table))
    return figure, "\n\n".join(lines), table


def _other_spaces(configs: dict[str, rl.RunConfig]) -> dict[str, str]:
    """Runs of another space than the first one's -> why their likelihoods are not drawn beside it."""
    first, *others = configs
    known = {name: config.space_words for name, config in configs.items()}
    return {
        name: f"`{name}` is left out: it models {known[name]}, `{first}` {known[first]}; their likelihoods do not compare."
        for name in others
        if known[name] != known[first]
    }


def _has(table: pd.DataFrame, column: str) -> bool:
    return any(name.startswith(column) and table[name].notna().any() for name in table.columns)


def _reason(show: str) -> str:
    if show == "accuracy":
        return "it was trained before this was measured, or without classes, or not validated yet"
    return "it is not aligned" if show == "similarity" else "`metrics.jsonl` is missing or empty"


def _meaning(configs: dict[str, rl.RunConfig], show: str) -> str:
    """What the curves are, in a sentence."""
    legend = "Thin: training images; thick with marks: up to 512 held-out images, averaged weights."
    what = "images" if all(config.space.is_pixels for config in configs.values()) else "latents"
    text = {
        "nats/dim": f"Negative log-likelihood of noised {what}. {legend}",
        "bits/dim": f"Nats/dim divided by ln 2, of noised {what}: no code length of clean ones. {legend}",
        "loss parts": "Total = L_nf + lambda * L_align. L_nf is nats/dim less its constant, L_align minus the mean cosine.",
        "similarity": "Mean cosine over the patches of training images, through the projector.",
        "accuracy": "Accuracy of one gradient step: up to 512 clean held-out images, averaged weights.",
    }[show]
    aligned = {name: config.align.weight for name, config in configs.items() if config.align.taps}
    if show == "loss parts" and aligned:
        text += f" Lambda: {', '.join(f'{weight:g} (`{name}`)' for name, weight in aligned.items())}."
    if show in LIKELIHOODS:
        facts = {"with different noise": _noise, "on different data": _data}
        differ = [words for words, fact in facts.items() if len(set(map(fact, configs.values()))) > 1]
        if differ:
            text += f" **These runs were trained {' and '.join(differ)}: their likelihoods do not compare.**"
    return text


def _caption(configs: dict[str, rl.RunConfig]) -> str:
    """What the runs share in a line, for the figure."""
    noises, seeds = (list(dict.fromkeys(values)) for values in (map(_noise, configs.values()), map(_seed, configs.values())))
    return f"training noise {', '.join(noises)}; training seed {', '.join(seeds)}"


def _seed(config: rl.RunConfig) -> str:
    return str(config.train.seed)


def _data(config: rl.RunConfig) -> str:
    return f"{config.data.words} {config.data.image_size}"


def _noise(config: rl.RunConfig) -> str:
    flow = config.flow
    return f"sigma {flow.noise_std:g}" if flow.noise == "gaussian" else "uniform"


def _differences_note(names: list[str], table: pd.DataFrame) -> str:
    if len(names) < 2:
        return "One run alone: compare it with another one, or add more."
    return (
        "Settings in which these runs differ (- where a run has none):" if len(table) else "These runs have the same settings."
    )
