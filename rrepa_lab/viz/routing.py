"""The gradient atlas, what the pseudo-reverse leaves out, and what a step costs."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rrepa_lab.errors import LabError, unknown
from rrepa_lab.viz.theme import COLOURS, SCALE, SYMBOLS, one_of, styled


def atlas(table: pd.DataFrame, tap: str) -> go.Figure:
    """Gradient norm of the alignment loss at one tap by strategy and parameter group (`rl.routing`), on a logarithmic scale.

    Places that the gradient does not reach stay empty.
    """
    rows = table[table["tap"] == tap]
    if rows.empty:
        raise unknown("tap", tap, dict.fromkeys(table["tap"]))
    strategies, groups = (list(dict.fromkeys(rows[name])) for name in ("strategy", "group"))
    norms = rows.pivot(index="strategy", columns="group", values="gradient_norm").loc[strategies, groups].to_numpy()
    reached = np.where(norms > 0, norms, np.nan)
    figure = go.Figure(
        go.Heatmap(
            z=np.log10(reached), x=groups, y=strategies, customdata=norms, colorscale=SCALE, xgap=2, ygap=2,
            colorbar={"title": {"text": "log10<br>norm"}, "thickness": 12},
            hovertemplate="%{y} reaches %{x}<br>gradient norm %{customdata:.3g}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(type="category", tickangle=-60)
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    caption = f"alignment loss at {tap}, empty where no gradient arrives; n = {one_of(rows['n'])} test images, seed "
    title = "What does each strategy teach?"
    return styled(figure, title, caption + one_of(rows["seed"]), 90 + 34 * len(strategies), legend=0, below=110)


def refinement_curves(table: pd.DataFrame, tap: str) -> go.Figure:
    """Relative error of the pseudo-reverse's gradient against refinements, one curve a block (`rl.refinement_errors`)."""
    rows = table[table["tap"] == tap]
    if rows.empty:
        raise unknown("tap", tap, dict.fromkeys(table["tap"]))
    figure = go.Figure()
    for place, (block, part) in enumerate(rows.groupby("block")):
        figure.add_scatter(
            x=part["refinements"].astype(str), y=part["relative_error"], name=f"block {block}", mode="lines+markers",
            line={"color": COLOURS[place % len(COLOURS)]}, marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 9},
            customdata=part["cosine"],
            hovertemplate=f"block {block}, k = %{{x}}: error %{{y:.2g}}, cosine %{{customdata:.4f}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="refinements k", type="category")
    figure.update_yaxes(title="error, relative to the exact gradient", type="log", exponentformat="power")
    caption = f"aligned at {tap}; gradient by block, float64; n = {one_of(rows['n'])} test images, seed {one_of(rows['seed'])}"
    return styled(figure, "How good is the pseudo-reverse?", caption)


def costs(table: pd.DataFrame) -> go.Figure:
    """Time and kept memory of a training step, as ratios to no alignment (`bench.step_costs`)."""
    if "none" not in set(table["strategy"]):
        raise LabError("the table has no strategy 'none' to compare with")
    names = [
        f"{strategy}, k = {count}" if strategy == "reverse" else strategy
        for strategy, count in zip(table["strategy"], table["refinements"], strict=True)
    ]
    memory = table["kept_mib"] / float(table.loc[table["strategy"] == "none", "kept_mib"].iloc[0])
    figure = make_subplots(1, 2, subplot_titles=("time", "memory kept for the backward pass"), shared_yaxes=True)
    for column, (values, absolute, unit) in enumerate(
        ((table["ratio"], table["seconds"], "s"), (memory, table["kept_mib"], "MiB")), start=1
    ):
        figure.add_bar(
            x=values, y=names, orientation="h", marker={"color": COLOURS[column - 1]}, showlegend=False, customdata=absolute,
            text=[f"{value:.2f}x" for value in values], textposition="auto",
            hovertemplate=f"%{{y}}: %{{x:.2f}} times, %{{customdata:.3g}} {unit}<extra></extra>",
            row=1, col=column,
        )  # fmt: skip
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    figure.update_xaxes(title="times that of no alignment")
    figure.update_annotations(font={"size": 12})
    caption = f"one step of {one_of(table['images'])} images, median of {one_of(table['repeats'])} alternating rounds; "
    caption += "random weights; encoder not counted; this machine, now"
    return styled(figure, "What does a step cost?", caption, 120 + 30 * len(names), legend=0)
