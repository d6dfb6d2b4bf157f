"""One look for all plotly figures: transparent, with greys that pass contrast on white and on black."""

import plotly.graph_objects as go

INK = "#808080"
GRID = "rgba(128,128,128,0.25)"
# Okabe and Ito's palette without black, safe for the common kinds of colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def styled(figure: go.Figure, title: str, caption: str = "", height: int = 320) -> go.Figure:
    """The figure with title, caption below the axes, and the common look; returned for chaining."""
    figure.update_layout(
        title={"text": title, "font": {"size": 15}, "x": 0, "xref": "paper", "y": 0.97, "yanchor": "top"},
        font={"color": INK, "family": "system-ui, sans-serif"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        colorway=COLOURS,
        height=height,
        margin={"l": 60, "r": 20, "t": 75, "b": 90 if caption else 60},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=INK)
    if caption:
        figure.add_annotation(
            text=caption,
            x=0,
            y=-0.30,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="top",
            showarrow=False,
            font={"size": 11},
        )
    return figure
