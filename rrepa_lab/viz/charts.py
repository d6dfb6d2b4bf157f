"""Plain charts of named values, and of a measurement against a setting."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from rrepa_lab.errors import LabError
from rrepa_lab.measurements.spread import mean_and_spread
from rrepa_lab.viz.theme import COLOURS, INK, SYMBOLS, styled

DASHES = ("solid", "dash", "dot", "dashdot")


def bars(
    values: Mapping[str, float],
    title: str,
    axis: str,
    unit: str,
    caption: str,
    errors: Sequence[float] | None = None,
    texts: Sequence[str] | None = None,
) -> go.Figure:
    """A bar for each named value; `errors` are drawn as whiskers to either side, `texts` stand at the ends of the bars."""
    bar = go.Bar(x=list(values), y=list(values.values()), marker={"color": COLOURS[0]})
    if errors is not None:
        bar.error_y = {"type": "data", "array": list(errors), "color": INK, "thickness": 1.5}
    if texts is not None:
        where = "auto" if errors is None else "inside"  # where no whisker crosses them
        bar.update(text=list(texts), textposition=where, insidetextanchor="middle", cliponaxis=False)
    figure = go.Figure(bar)
    figure.update_xaxes(title=axis, type="category")
    figure.update_yaxes(title=unit)
    return styled(figure, title, caption, legend=0)


def band(figure: go.Figure, x: Sequence[Any], mean: pd.Series, sd: pd.Series, colour: str, run: str) -> None:
    """Add a band of one standard deviation to either side of a run's curve, which it comes and goes with in the legend.

    Nothing is added where a point has no spread.
    """
    if sd.notna().all():
        low, high = (mean - sd).tolist(), (mean + sd).tolist()
        figure.add_scatter(
            x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=colour, opacity=0.18, line={"width": 0},
            hoverinfo="skip", showlegend=False, legendgroup=run, mode="lines",
        )  # fmt: skip


def sweep(
    table: pd.DataFrame,
    over: str,
    title: str,
    axis: str,
    unit: str,
    caption: str = "",
    *,
    by: str | None = None,
    dash: str | None = None,
    levels: Mapping[str, float] | None = None,
) -> go.Figure:
    """Column `value` against the numbers in column `over`, one curve for each value of `by`; a tidy table of one metric.

    Several rows at one place are drawn as their mean and a whisker of one standard deviation; a row alone has a whisker
    of its standard_error, where the table has one.

    Args:
        dash: column whose values differ in the kind of line; `by` by colour and symbol.
        levels: named values drawn across the figure.

    Raises: LabError for an empty table, or one of several metrics.
    """
    if table.empty:
        raise LabError("there is nothing to draw: the table has no rows")
    if "metric" in table and table["metric"].nunique() > 1:
        raise LabError(f"a sweep shows one metric, the table holds {', '.join(dict.fromkeys(table['metric']))}")
    figure = go.Figure()
    keys = [name for name in (by, dash) if name is not None]
    colours, dashes = (list(dict.fromkeys(table[name])) if name else [] for name in (by, dash))
    for key, rows in table.groupby(keys, sort=False) if keys else [((), table)]:
        values = dict(zip(keys, key, strict=True))
        name = ", ".join(map(str, dict.fromkeys(key)))
        cells = mean_and_spread(rows, [over]).sort_index()
        spread = cells["sd"]
        if "standard_error" in rows:
            spread = spread.where(cells["seeds"] > 1, rows.groupby(over)["standard_error"].mean())
        place = colours.index(values[by]) if by else 0
        line = dashes.index(values[dash]) if dash else 0
        figure.add_scatter(
            x=cells.index.tolist(), y=cells["value"].tolist(), name=name or unit, mode="lines+markers", showlegend=bool(keys),
            line={"color": COLOURS[place % len(COLOURS)], "dash": DASHES[line % len(DASHES)]},
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8},
            hovertemplate=f"{name or unit}<br>{axis} %{{x:g}}: %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
        if spread.notna().any():
            figure.data[-1].error_y = {"type": "data", "array": spread.tolist(), "thickness": 1.5}
    ends = [table[over].min(), table[over].max()]
    for name, value in (levels or {}).items():
        figure.add_scatter(
            x=[ends[0], sum(ends) / 2, ends[1]], y=[value] * 3, name=name, mode="lines+text",
            text=["", f"{name} {value:.3f}", ""], textposition="top center", textfont={"color": INK, "size": 11},
            line={"color": INK, "dash": "dash", "width": 1.5}, showlegend=False,
            hovertemplate=f"{name} %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title=axis)
    figure.update_yaxes(title=unit)
    return styled(figure, title, caption, legend=-(-len(figure.data) // 2) if keys else 0)
