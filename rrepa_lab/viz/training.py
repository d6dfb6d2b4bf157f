"""metrics.jsonl becomes curves."""

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from rrepa_lab.viz.theme import COLOURS, SYMBOLS, styled


def loss_curves(metrics: Mapping[str, pd.DataFrame], caption: str = "") -> go.Figure:
    """Nats/dim against steps: training images as a thin line, held-out images (of averaged weights) as marks; a colour a run.

    `metrics` are tables of `training.records.Records`, by the name to be shown.
    """
    figure = go.Figure()
    for place, (name, table) in enumerate(metrics.items()):
        colour = COLOURS[place % len(COLOURS)]
        if table.empty:
            continue
        figure.add_scatter(
            x=table["step"], y=table["nats_per_dim"], name=f"{name}, training", mode="lines", legendgroup=name, opacity=0.55,
            line={"color": colour, "width": 1.5}, hovertemplate=f"{name}, step %{{x}}: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
        looked = table.dropna(subset=["held_out_nats_per_dim"])
        figure.add_scatter(
            x=looked["step"], y=looked["held_out_nats_per_dim"], name=f"{name}, held out", mode="lines+markers",
            legendgroup=name, line={"color": colour, "width": 2}, marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8},
            hovertemplate=f"{name}, held out, step %{{x}}: %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="nats/dim under the training noise")
    return styled(figure, "How well are images explained?", caption, legend=len(metrics))


def similarity_curves(metrics: Mapping[str, pd.DataFrame], caption: str = "") -> go.Figure:
    """Mean cosine of the aligned features with the encoder's against steps, one curve for each run and tap."""
    figure = go.Figure()
    for place, (name, table) in enumerate(metrics.items()):
        taps = [column for column in table.columns if column.startswith("similarity.")]
        for column, dash in zip(taps, ("solid", "dash", "dot", "dashdot") * len(taps), strict=False):
            tap = column.removeprefix("similarity.")
            figure.add_scatter(
                x=table["step"], y=table[column], name=f"{name}, {tap}", mode="lines",
                line={"color": COLOURS[place % len(COLOURS)], "dash": dash},
                hovertemplate=f"{name}, {tap}, step %{{x}}: %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="cosine with the encoder", range=[-0.05, 1])
    return styled(figure, "How near do the aligned features come to the encoder's?", caption, legend=len(figure.data))
