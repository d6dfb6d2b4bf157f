"""Plain charts of named values."""

from collections.abc import Mapping

import plotly.graph_objects as go

from rrepa_lab.viz.theme import COLOURS, styled


def bars(values: Mapping[str, float], title: str, axis: str, unit: str, caption: str) -> go.Figure:
    """A bar for each named value."""
    figure = go.Figure(go.Bar(x=list(values), y=list(values.values()), marker={"color": COLOURS[0]}))
    figure.update_xaxes(title=axis, type="category")
    figure.update_yaxes(title=unit)
    return styled(figure, title, caption)
