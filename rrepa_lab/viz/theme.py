"""One look for all plotly figures: transparent, with greys that pass contrast on white and on black."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

INK = "#808080"
GRID = "rgba(128,128,128,0.25)"
# Okabe and Ito's palette without black, safe for the common kinds of colour blindness; shapes tell apart what colours repeat
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "triangle-down", "hexagon", "bowtie", "pentagon")
SCALE = "Cividis"  # even in lightness, and the same to colour-blind eyes


def styled(figure: go.Figure, title: str, caption: str = "", height: int = 320, legend: int = 1, below: int = 50) -> go.Figure:
    """The figure with title, caption below the axes, and the common look; returned for chaining.

    The height grows with the lines of the caption, which is wrapped to fit a phone, and with those of the legend, of which
    `legend` is the number expected there. `below` are the pixels from the plot to its caption: room for what stands under
    the axis.
    """
    lines = textwrap.wrap(caption, 48)
    figure.update_layout(
        title={
            "text": title, "font": {"size": 15}, "x": 0, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top",
            "pad": {"t": 12},
        },
        font={"color": INK, "family": "system-ui, sans-serif"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        colorway=COLOURS,
        height=height + 15 * len(lines) + 20 * legend + below - 50,
        margin={"l": 60, "r": 20, "t": 55 + 20 * legend, "b": below + 10 + 15 * len(lines)},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )  # fmt: skip
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=INK)
    if lines:
        figure.add_annotation(
            text="<br>".join(lines), x=0, y=0, yshift=-below, xref="paper", yref="paper", xanchor="left", yanchor="top",
            align="left", showarrow=False, font={"size": 11},
        )  # fmt: skip
    return figure


CHARACTER = 7  # pixels of a character of a legend or a tick label, on average
PANEL = 360  # pixels across a plot on half a page or on a phone


def legend_lines(names: Sequence[str]) -> int:
    """Lines that a legend of these entries takes above a plot on half a page."""
    in_a_line = max(1, PANEL // (50 + CHARACTER * max(map(len, names), default=0)))
    return math.ceil(len(names) / in_a_line)


def class_axis(figure: go.Figure, names: Sequence[str], title: str = "class", columns: int = 1) -> int:
    """Make the x axes categories of these names, upright where they do not fit side by side.

    Args:
        columns: plots side by side.

    Returns: pixels from the plot to its caption, `below` of `styled`.
    """
    longest = CHARACTER * max(map(len, names), default=0)
    upright = len(names) * (longest + 6) > PANEL / columns
    figure.update_xaxes(title=title, type="category", tickangle=-90 if upright else 0)
    return 50 + longest if upright else 50


def one_of(values: Iterable[Any]) -> str:
    """What a column holds, for a caption: its value, or its values in a row, or how many there are; empty if none."""
    known = [value for value in dict.fromkeys(values) if value == value and value != ""]  # noqa: PLR0124
    shown = [str(int(value)) if isinstance(value, float) and value.is_integer() else str(value) for value in known]
    return ", ".join(shown) if len(shown) <= 4 else f"{len(shown)} values"
