"""metrics.jsonl becomes curves, run by run or as means over seeds."""

import math
from collections.abc import Mapping
from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from rrepa_lab.errors import LabError
from rrepa_lab.flow.likelihood import HALF_LOG_2PI
from rrepa_lab.runs.card import FLOORS
from rrepa_lab.viz.charts import band
from rrepa_lab.viz.theme import COLOURS, INK, SYMBOLS, one_of, styled

# what curves may be drawn against, by the column of the table that holds it
AXES = {"step": "step", "images": "training images", "seconds": "seconds of training"}


def loss_curves(
    metrics: Mapping[str, pd.DataFrame], caption: str = "", x: str = "step", unit: Literal["nats/dim", "bits/dim"] = "nats/dim"
) -> go.Figure:
    """Nats/dim against steps: training images as a thin line, held-out images (of averaged weights) as marks; a colour a run.

    `metrics` are tables of `training.records.Records`, by the name to be shown; `x` is one of AXES. Bits/dim are those of
    the noised images, nats/dim divided by ln 2.
    """
    figure, scale = go.Figure(), 1.0 if unit == "nats/dim" else 1 / math.log(2)
    for place, (name, table) in enumerate(metrics.items()):
        colour = COLOURS[place % len(COLOURS)]
        if table.empty:
            continue
        figure.add_scatter(
            x=table[x], y=table["nats_per_dim"] * scale, name=f"{name}, training", mode="lines", legendgroup=name, opacity=0.55,
            line={"color": colour, "width": 1.5}, hovertemplate=f"{name}, {x} %{{x}}: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
        looked = _known(table, "held_out_nats_per_dim")
        figure.add_scatter(
            x=looked[x], y=looked["held_out_nats_per_dim"] * scale, name=f"{name}, held out", mode="lines+markers",
            legendgroup=name, line={"color": colour, "width": 2}, marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8},
            hovertemplate=f"{name}, held out, {x} %{{x}}: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title=AXES[x])
    figure.update_yaxes(title=f"{unit} under the training noise")
    return styled(figure, "How well are images explained?", caption, legend=len(metrics))


def loss_parts(metrics: Mapping[str, pd.DataFrame], caption: str = "", x: str = "step") -> go.Figure:
    """What training minimises, and its parts: L_nf + lambda * L_align as a line, L_nf dashed, L_align dotted; a colour a run.

    L_align is minus the mean similarity over the aligned taps. Of an unaligned run there is L_nf alone.
    """
    figure = go.Figure()
    for place, (name, table) in enumerate(metrics.items()):
        if table.empty:
            continue
        parts = {"L_nf": ("dash", table["nats_per_dim"] - HALF_LOG_2PI)}
        taps = [column for column in table.columns if column.startswith("similarity.")]
        if taps:
            parts = {"total": ("solid", table["loss"])} | parts | {"L_align": ("dot", -table[taps].mean(axis=1))}
        for part, (dash, y) in parts.items():
            figure.add_scatter(
                x=table[x], y=y, name=f"{name}, {part}", mode="lines", legendgroup=name,
                line={"color": COLOURS[place % len(COLOURS)], "dash": dash},
                hovertemplate=f"{name}, {part}, {x} %{{x}}: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title=AXES[x])
    figure.update_yaxes(title="loss: nats/dim less 0.92, or cosine")
    return styled(figure, "What is minimised?", caption, legend=len(figure.data))


def similarity_curves(metrics: Mapping[str, pd.DataFrame], caption: str = "", x: str = "step") -> go.Figure:
    """Mean cosine of the aligned features with the encoder's against steps, one curve for each run and tap.

    Where the floors were recorded (see `align.floors`), they are grey levels and stand in the caption.
    """
    figure, floors = go.Figure(), dict[str, None]()
    for place, (name, table) in enumerate(metrics.items()):
        taps = [column for column in table.columns if column.startswith("similarity.")]
        for column, dash in zip(taps, ("solid", "dash", "dot", "dashdot") * len(taps), strict=False):
            tap = column.removeprefix("similarity.")
            figure.add_scatter(
                x=table[x], y=table[column], name=f"{name}, {tap}", mode="lines",
                line={"color": COLOURS[place % len(COLOURS)], "dash": dash},
                hovertemplate=f"{name}, {tap}, {x} %{{x}}: %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
    lines = len(figure.data)
    for table in metrics.values():
        for column, what in FLOORS.items():
            known = _known(table, column)
            if known.empty or (text := f"{what} alone {known[column].iloc[-1]:.3f}") in floors:
                continue
            floors[text] = None
            figure.add_scatter(
                x=known[x], y=known[column], name=text, mode="lines", showlegend=False,
                line={"color": INK, "dash": "dot", "width": 1.5}, hovertemplate=f"floor: {text}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title=AXES[x])
    figure.update_yaxes(title="cosine with the encoder", range=[-0.05, 1])
    if floors:
        caption = "; ".join([*([caption] if caption else []), f"dotted, without reading the image: {', '.join(floors)}"])
    return styled(figure, "How near do the aligned features come to the encoder's?", caption, legend=lines)


def accuracy_curves(metrics: Mapping[str, pd.DataFrame], caption: str = "", x: str = "step") -> go.Figure:
    """Accuracy of one gradient step on held-out images, one curve a run; runs that did not record it are left out."""
    figure = go.Figure()
    for place, (name, table) in enumerate(metrics.items()):
        looked = _known(table, "held_out_accuracy")
        if looked.empty:
            continue
        figure.add_scatter(
            x=looked[x], y=looked["held_out_accuracy"], name=name, mode="lines+markers",
            line={"color": COLOURS[place % len(COLOURS)]}, marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8},
            hovertemplate=f"{name}, {x} %{{x}}: %{{y:.1%}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title=AXES[x])
    figure.update_yaxes(title="one-step accuracy, held-out images", range=[0, 1], tickformat=".0%")
    return styled(figure, "One-step accuracy while training", caption, legend=len(figure.data))


def _known(table: pd.DataFrame, column: str) -> pd.DataFrame:
    return table.dropna(subset=[column]) if column in table else table.iloc[:0].assign(**{column: []})


_CURVES = {
    "nats_per_dim": ("How likely are training images?", "nats/dim under the training noise"),
    "held_out_nats_per_dim": ("How likely are held-out images?", "nats/dim under the training noise"),
    "held_out_accuracy": ("One-step accuracy while training", "one-step accuracy on held-out images"),
    "similarity": ("How near to the encoder?", "cosine with the encoder, aligned taps"),
    "FD": ("How far are samples from real images?", "Fréchet distance"),
}


def setting_curves(table: pd.DataFrame, metric: str) -> go.Figure:
    """One metric against steps for every setting of a study, the mean over training seeds with a band of one sd.

    `table` is one of `studies.alignment.curves_of`; a setting without this metric keeps its colour for other figures.
    """
    if metric not in set(table["metric"]):
        raise LabError(f"no training recorded {metric!r}; recorded: {', '.join(dict.fromkeys(table['metric']))}")
    figure = go.Figure()
    runs = list(dict.fromkeys(table["run"]))
    rows = table[table["metric"] == metric]
    for place, run in enumerate(runs):
        part = rows[rows["run"] == run].sort_values("step")
        if part.empty:
            continue
        colour = COLOURS[place % len(COLOURS)]
        x = part["step"].tolist()
        band(figure, x, part["value"], part["sd"], colour, run)
        marks = {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8}
        figure.add_scatter(
            x=x, y=part["value"], name=run, legendgroup=run, mode="lines+markers" if len(x) <= 20 else "lines",
            line={"color": colour, "width": 2}, marker=marks, customdata=part["sd"],
            hovertemplate=f"{run}, step %{{x}}: %{{y:.4f}} ± %{{customdata:.4f}}<extra></extra>",
        )  # fmt: skip
    title, what = _CURVES.get(metric.partition("[")[0], (metric, metric))
    figure.update_xaxes(title="step")
    figure.update_yaxes(title=what)
    seeds = one_of(rows["train_seeds"])
    caption = "one training seed" if seeds == "1" else f"{seeds} training seeds, mean ± sd"
    return styled(figure, title, caption, legend=len(runs))
