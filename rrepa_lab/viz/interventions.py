"""Interventions become figures."""

from collections.abc import Mapping

import plotly.graph_objects as go

from rrepa_lab.analysis.intervene import Intervention
from rrepa_lab.viz.theme import COLOURS, styled


def nats_by_block(found: Mapping[str, Intervention], what: str, row: int = 0) -> go.Figure:
    """The change of log p of one image, by block and of the noise, for several runs; `what` names the intervention."""
    figure = go.Figure()
    for (name, one), colour in zip(found.items(), COLOURS, strict=False):
        parts = [*one.delta_by_block[row].tolist(), float(one.delta_prior[row])]
        names = [*(f"block {number}" for number in range(1, len(parts))), "noise"]
        figure.add_bar(name=f"{name}, {sum(parts):+.4g} in all", x=names, y=parts, marker={"color": colour})
    figure.update_xaxes(type="category")
    figure.update_yaxes(title="change of log p, nats")
    caption = f"{what}; log-determinant of each block, and log density of the noise"
    return styled(figure, "Change of log p", caption, height=320)
