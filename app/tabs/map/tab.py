"""A map of many images by their features at one layer: pick one, and see its neighbours and its trajectory."""

import math
from dataclasses import replace
from typing import Any

import gradio as gr
import pandas as pd
from page.panels import Code, Panel, Sidebar, Tab
from page.scripts import script, style
from server.runs import DEFAULT_RUN, N_TEST_IMAGES, get_run, missing_data
from server.settings import PRIVATE
from tabs.map.data import (
    CONDITIONAL,
    N_NEIGHBOURS,
    REAL,
    UNCONDITIONAL,
    MapView,
    image_count,
    nearest,
    pca_map,
    purity,
    thumbnails,
    trajectory_of,
    umap_of,
)
from tabs.map.fitting import fit_umaps, stopped
from tabs.map.view import IMAGE, PCA, UMAP, FeatureMapView, map_views
from tabs.trajectories import strip, tap_in

import rrepa_lab as rl
from rrepa_lab.viz.html import picture_table
from rrepa_lab.viz.spaces import embedding

NAME, TITLE = "map", "Map"


# --- drawing ----------------------------------------------------------------------------------------------------------


def chart(map_view: MapView, table: pd.DataFrame, row: int) -> Any:
    """The map as a figure, whose `meta` names it for `static/map.js`."""
    figure = embedding(table, highlight=map_view.first + row)
    method = table["method"].iloc[0]
    label = f"Map of {len(table)} images by {method.upper()}, {map_view.name}, {map_view.tap.name}"
    meta = {
        "run": map_view.name, "map": f"{map_view.images} {map_view.seed} {map_view.tap.name} {method}",
        "label": f"{label}; choose one with the slider Image below",
    }  # fmt: skip
    figure.update_annotations(xshift=-40)  # the caption needs the width of a phone
    return figure.update_layout(meta=meta, margin={"l": 45, "r": 10})


def draw(view: FeatureMapView) -> tuple[Any, ...]:
    """Thumbnails, the maps of both runs, the measurements, and the view if UMAPs of it are still to be fitted."""
    maps, settings = map_views(view), (view.neighbours, view.distance)
    missing = view.method == UMAP and any(umap_of(one, *settings) is None for one in maps)
    figures: list[Any] = []
    sheets, lines = {}, []
    for one in maps:
        row = one.row(view.image)
        fitted = umap_of(one, *settings) if view.method == UMAP and not missing else None
        table = pca_map(one) if fitted is None else fitted
        figures.append(chart(one, table, row))
        sheets[one.name] = thumbnails(one.run, view.images, one.first, one.tap)
        lines.append(f"**{one.name}**, {one.tap.name}: {_purity_line(one)}, over {len(table)} images")
        lines[-1] += f"; there is no image {view.image}, {row} is the last." if row != view.image else "."
    if view.images == CONDITIONAL:
        lines.append("These classes were fed to the flow, which alone separates them in some layers.")
    if missing:
        lines.append("**These are maps by PCA** until UMAP is ready.")
    second = gr.update(value=figures[1], visible=True) if len(maps) > 1 else gr.update(visible=False)
    due = replace(view, image=0, fitted=None) if missing else None
    return {"sheets": sheets}, figures[0], second, "  \n".join(lines), due


def _purity_line(map_view: MapView) -> str:
    share = purity(map_view)
    if math.isnan(share):
        return "generated without classes"
    return f"{share:.0%} of the {N_NEIGHBOURS} nearest neighbours of an image share its class"


def draw_picked(view: FeatureMapView) -> tuple[Any, Any]:
    """The picked image in both runs."""
    tables = [picked(one, one.row(view.image)) for one in map_views(view)]
    return tables[0], gr.update(value=tables[1], visible=True) if len(tables) > 1 else gr.update(visible=False)


def picked(map_view: MapView, row: int) -> str:
    """The image large, its neighbours, and its trajectory from noise to image."""
    x, y, classes = map_view.batch.x, map_view.batch.y, map_view.run.classes
    caption, label = map_view.caption(row), int(y[row])
    table = nearest(map_view, row)
    columns, same = {}, []
    for rank, image, cosine in zip(table["rank"], table["image"], table["cosine"], strict=True):
        other = int(y[image])
        column = f"{rank}. {classes[other] if other >= 0 else 'no label'}, {cosine:.2f}"
        columns[column] = x[image]
        if other == label >= 0:
            same.append(column)
    share = f", {len(same)} of {len(table)} of class {classes[label]} (framed)" if label >= 0 else ""
    source = "encoded, then decoded" if map_view.images == REAL else "generated"
    return "".join([
        picture_table({caption: {"": x[row]}}, what=f"picked, {map_view.name}"),
        picture_table({f"{map_view.name}: nearest by cosine{share}": columns}, marked=same, what=f"neighbour of {caption}"),
        picture_table(
            {f"{map_view.name}: {caption}, {source}": strip(trajectory_of(map_view, row))},
            marked=f"after block {map_view.tap.block}",
        ),
    ])  # fmt: skip


def code(view: FeatureMapView) -> Code:
    """The coordinates of both maps."""
    lines = ["import rrepa_lab as rl", ""]
    for variable, one in zip(("table", "other"), map_views(view), strict=False):
        arguments = [f'rl.load("{one.name}")', f'"{one.tap.name}"', f'"{view.method.lower()}"']
        if view.images == REAL:
            settings, arguments = [], [*arguments, f"images=rl.Images(limit={N_TEST_IMAGES})"]
        else:
            settings = ['"reverse"', f"samples={image_count(one.run, view.images)}"]
            settings += ["feed_label=True"] if view.images == CONDITIONAL else []
        arguments += [f"protocol=rl.FeatureProtocol({', '.join([*settings, f'seed={view.seed}'])})"]
        if view.method == UMAP:
            arguments += [f"umap=rl.Umap({view.neighbours}, {view.distance:g})"]
        lines.append(f"{variable} = rl.embed({', '.join(arguments)})")
    lines.append('table[["image", "label", "c1", "c2"]]')
    return Code("", "\n".join(lines))


# --- the tab ----------------------------------------------------------------------------------------------------------


def pick(event: gr.EventData) -> int:
    """The image whose point was clicked."""
    return int(event.index)


def build(sidebar: Sidebar) -> Tab:
    """The tab; it is drawn when it is opened."""
    default = FeatureMapView()
    gr.Markdown(
        "**Which images have similar features at a layer?** Each point is an image, coloured by its class. "
        "Click one, or move the slider *Image*, to see its neighbours and its trajectory."
    )
    controls = _build_choice(default)
    with gr.Row(visible=False) as line:
        status = gr.Markdown(elem_id="map-status", min_width=240)
        stop = gr.Button("Stop", size="sm", visible=False, scale=0, min_width=100)
        start = gr.Button("Compute UMAP", size="sm", visible=False, scale=0, min_width=140)
    bridge = gr.HTML(
        {"sheets": {}}, html_template='@children<div class="card" aria-hidden="true" hidden><i></i><span></span></div>',
        css_template=style("map"), js_on_load=script("map"), apply_default_css=False, elem_id="maps",
    )  # fmt: skip
    with bridge, gr.Row(equal_height=False):
        here = gr.Plot(label="Map", show_label=False, min_width=320, elem_id="map-here")
        there = gr.Plot(label="Map of the other run", show_label=False, min_width=320, elem_id="map-other")
    note = gr.Markdown(elem_id="map-note")
    image = gr.Slider(
        0, N_TEST_IMAGES - 1, default.image, step=1, label="Image", elem_id="map-image",
        info="row of the test split, or which of the samples: their seeds go on from the seed of the sidebar",
    )  # fmt: skip
    tables = []
    with gr.Row(equal_height=False):
        for place in ("map-picked", "map-picked-other"):
            with gr.Column(min_width=320):
                tables.append(gr.HTML(elem_id=place))
    due, fitted = gr.State(None), gr.State(None)
    controls |= {"image": image, **_build_umap(default), "fitted": fitted}
    fitting = gr.on(
        [due.change, start.click], fit_umaps, due, [line, status, stop, start, fitted], trigger_mode="always_last",
        concurrency_id="umap", concurrency_limit=1, **PRIVATE,
    )  # fmt: skip
    stop.click(stopped, None, [line, status, stop, start], cancels=fitting, queue=False, **PRIVATE)
    bridge.select(pick, None, image, queue=False, **PRIVATE)
    panels = [Panel([bridge, here, there, note, due], draw, slow=True), Panel(tables, draw_picked, IMAGE)]
    return Tab(FeatureMapView, sidebar, controls, panels, code, fit)


def _build_choice(default: FeatureMapView) -> dict[str, Any]:
    """The controls of the images, the method and the layer."""
    config = get_run(DEFAULT_RUN).flow.config
    with gr.Row(equal_height=False):
        images = gr.Radio(
            [REAL, CONDITIONAL, UNCONDITIONAL], value=default.images, label="Images", info="encoded, or as they are generated"
        )
        method = gr.Radio([PCA, UMAP], value=default.method, label="Map", info="at once, or after some seconds")
    with gr.Row(equal_height=False):
        block = gr.Slider(1, config.blocks, default.block, step=1, label="Block", info="1 is next to the image")
        layer = gr.Slider(
            1, max(config.depths), default.layer, step=1, label="Layer",
            info="of that block's Transformer; in a shallower block its last",
        )  # fmt: skip
    return {"images": images, "method": method, "block": block, "layer": layer}


def _build_umap(default: FeatureMapView) -> dict[str, Any]:
    """The settings of UMAP."""
    with gr.Accordion("Settings of UMAP", open=False), gr.Row():
        neighbours = gr.Slider(
            2, 50, default.neighbours, step=1, label="Neighbours", info="few: local structure, many: global structure"
        )
        distance = gr.Slider(0, 0.99, default.distance, step=0.01, label="Minimum distance", info="between points of the map")
    return {"neighbours": neighbours, "distance": distance}


def fit(run: rl.Run, view: FeatureMapView) -> dict[str, Any]:
    """Blocks, layers and images of another run; its samples where its test images are not at hand."""
    tap = tap_in(run, view.block, view.layer)
    last = max(image_count(run, images) for images in (REAL, CONDITIONAL)) - 1
    updates = {
        "block": gr.update(maximum=run.flow.config.blocks, value=tap.block),
        "layer": gr.update(maximum=max(run.flow.config.depths), value=int(tap.layer)),
        "image": gr.update(maximum=last, value=min(view.image, last)),
    }
    if missing_data(run) and view.images == REAL:
        updates["images"] = gr.update(value=CONDITIONAL)
    return updates
