"""Results become plotly figures: pure functions, nothing is computed beyond what the drawing needs."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from rrepa_lab.analysis.classify import Classification
from rrepa_lab.viz.theme import COLOURS, styled

_UNITS = {"gradient": "d log p / d logit, nats", "bayes": "log posterior, nats"}


def class_scores(results: Mapping[str, Classification], classes: Sequence[str], method: str, row: int = 0) -> go.Figure:
    """Bars of the class scores of one image for several runs, each run's prediction outlined."""
    figure = go.Figure()
    for (name, result), colour in zip(results.items(), COLOURS, strict=False):
        scores, best = result.scores[row].tolist(), int(result.label[row])
        lines = [2.5 if k == best else 0 for k in range(len(scores))]
        figure.add_bar(
            name=name, x=list(classes), y=scores, marker={"color": colour, "line": {"width": lines, "color": "#808080"}}
        )
    figure.update_xaxes(title="class", type="category")
    figure.update_yaxes(title=_UNITS.get(method, "score"))
    return styled(figure, f"Class scores by {method}", "outlined: the run's prediction", height=340)


def bars(values: Mapping[str, float], title: str, axis: str, unit: str, caption: str) -> go.Figure:
    """A bar for each named value."""
    figure = go.Figure(go.Bar(x=list(values), y=list(values.values()), marker={"color": COLOURS[0]}))
    figure.update_xaxes(title=axis, type="category")
    figure.update_yaxes(title=unit)
    return styled(figure, title, caption)
