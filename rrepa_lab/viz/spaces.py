"""Inner states become pictures: the states of an image, features as colours, and maps of many images."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from rrepa_lab.analysis.trace import Trace
from rrepa_lab.data.pixels import to_uint8
from rrepa_lab.errors import LabError
from rrepa_lab.viz.theme import COLOURS, SYMBOLS, legend_lines, one_of, styled

MAX_LEGEND_LINES = 10  # a taller legend leaves no room for the map


def path_strip(traces: Mapping[str, Trace], row: int = 0, caption: str = "") -> go.Figure:
    """One image after each block, a picture a stage and a strip a trace; values are clipped to [-1, 1]."""
    strips, errors = {}, []
    for name, trace in traces.items():
        strips[name] = {_stage(tap, trace): image[row] for tap, image in trace.images.items()}
        if not trace.error[row].isnan():
            errors.append(f"{name} {float(trace.error[row]):.1e}")
    reverse = any(trace.direction == "reverse" for trace in traces.values())
    title = "From noise to image, after each block" if reverse else "From image to noise, after each block"
    notes = [caption, "round-trip error: " + ", ".join(errors) if errors else "", "values clipped to -1..1"]
    return tiles(strips, title, "; ".join(note for note in notes if note))


def _stage(tap: str, trace: Trace) -> str:
    block, side = int(tap.split(".")[1]), tap.split(".")[2]
    if side == "in":
        return "image"
    if block == len(trace.images) - 1:
        return "noise"
    return f"after {block + 1 if trace.direction == 'reverse' else block}"


def feature_maps(rows: Mapping[str, Mapping[str, Tensor]], caption: str = "", title: str = "Features as colours") -> go.Figure:
    """Pictures of `rl.patch_colours`: a row for each run or direction, a column for each tap; images (3, H, W) in [0, 1]."""
    return tiles(
        {name: {tap: 2 * image - 1 for tap, image in columns.items()} for name, columns in rows.items()}, title, caption
    )


def tiles(rows: Mapping[str, Mapping[str, Tensor]], title: str, caption: str = "") -> go.Figure:
    """Images (C, H, W) in [-1, 1] in a table: row name -> column name -> image. Pixels are drawn as squares."""
    if not rows or not all(rows.values()):
        raise LabError("there are no pictures to show")
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure = make_subplots(
        len(rows), len(columns), column_titles=columns, row_titles=list(rows) if len(rows) > 1 else None,
        horizontal_spacing=0.01, vertical_spacing=0.03,
    )  # fmt: skip
    for i, (name, row) in enumerate(rows.items(), start=1):
        for j, column in enumerate(columns, start=1):
            if column in row:
                pixels = to_uint8(row[column][None])[0]
                pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
                figure.add_trace(go.Image(z=pixels, name=name, hovertemplate=f"{name} {column}<extra></extra>"), row=i, col=j)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_annotations(font={"size": 11})
    side = max(86, min(120, 860 // len(columns)))  # about square on a wide page; row titles need their length
    styled(figure, title, caption, height=100 + len(rows) * (side + 8), legend=0, below=12)  # no axis is drawn
    return figure.update_layout(margin={"l": 10, "r": 30, "t": 65})


def neighbour_strips(
    near: Mapping[str, pd.DataFrame], images: Tensor, labels: Tensor, query: int, caption: str = ""
) -> go.Figure:
    """One image with its nearest neighbours, a strip for each table of `rl.neighbours` by the name of its features.

    The caption counts how many of them are of the image's class; `images` (n, C, H, W) and `labels` (n,) are what the tables'
    rows stand for.
    """
    strips, counts = {}, []
    for name, table in near.items():
        rows = table[table["query"] == query].sort_values("rank")["image"].tolist()
        strips[name] = {"image": images[query], **{f"{rank}.": images[row] for rank, row in enumerate(rows, start=1)}}
        counts.append(f"{name} {int((labels[rows] == labels[query]).sum())} of {len(rows)}")
    share = f"neighbours of its class: {', '.join(counts)}"
    return tiles(strips, f"Nearest neighbours of image {query}, by cosine", "; ".join(filter(None, [share, caption])))


def embedding(table: pd.DataFrame, highlight: int | None = None) -> go.Figure:
    """A map of images (`rl.embed`, one tap), coloured and shaped by class; `highlight` is an image to ring."""
    if table["tap"].nunique() != 1:
        raise LabError(f"a map shows one tap, the table holds {one_of(table['tap'])}")
    deep = "c3" in table
    figure = go.Figure()
    for place, (label, part) in enumerate(table.groupby("label")):
        marker = {"color": COLOURS[place % len(COLOURS)], "size": 3 if deep else 7, "opacity": 0.85}
        if deep:
            figure.add_scatter3d(x=part["c1"], y=part["c2"], z=part["c3"], mode="markers", name=str(label), marker=marker)
        else:
            marker["symbol"] = SYMBOLS[place % len(SYMBOLS)]
            figure.add_scatter(x=part["c1"], y=part["c2"], mode="markers", name=str(label) or "no label", marker=marker)
        figure.data[-1].update(customdata=part["image"], hovertemplate=f"image %{{customdata}}, class {label}<extra></extra>")
    if highlight is not None and not deep:
        one = table[table["image"] == highlight]
        figure.add_scatter(
            x=one["c1"], y=one["c2"], mode="markers", name=f"image {highlight}", hoverinfo="skip", showlegend=False,
            marker={"symbol": "circle-open", "size": 18, "color": COLOURS[1], "line": {"width": 3}},
        )  # fmt: skip
    method = one_of(table["method"])
    unit = f" ({float(table['explained'].iloc[0]):.0%} of the variance in both)" if method == "pca" else " (no unit)"
    figure.update_xaxes(title="axis 1" + unit)
    figure.update_yaxes(title="axis 2")
    what = "real images" if one_of(table["direction"]) == "forward" else "generated from fresh noise"
    caption = (
        f"{one_of(table['run'])}, {one_of(table['tap'])} ({one_of(table['module_path'])}), {one_of(table['n'])} {what}, "
        f"{'no label' if one_of(table['label_fed']) == 'none' else 'label'} fed, seed {one_of(table['seed'])}, "
        f"training seed {one_of(table['train_seed'])}"
    )
    if highlight is not None and not deep:
        caption += f", image {highlight} ringed"
    names = [str(label) for label in table["label"].unique()]
    title = f"{method.upper()} of the features, by class"
    if legend_lines(names) > MAX_LEGEND_LINES:
        figure.update_layout(showlegend=False)
        return styled(figure, title, f"{caption}; {len(names)} classes, named where the pointer is", height=460, legend=0)
    return styled(figure, title, caption, height=460, legend=legend_lines(names))
