"""The tab "Map": its handlers without a browser, and a real browser under `-m browser`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import reopen

import rrepa_lab as rl
from rrepa_lab.analysis.features import FeatureProtocol, concatenate
from rrepa_lab.viz.html import data_uri

gr = pytest.importorskip("gradio")

from tabs.map import data as map_data  # noqa: E402
from tabs.map import tab as feature_map  # noqa: E402
from tabs.map.tab import FeatureMapView  # noqa: E402

REVERSE, NONE = "digits-reverse", "digits-none"
TAP = "block.3.layer.2"


def drawn(run: str = REVERSE, other: str = NONE, seed: int = 0, **more) -> tuple:
    """(thumbnails, map, other map, note, due), at TAP by default."""
    return feature_map.draw(FeatureMapView(run=run, other=other, seed=seed, **more))


def coordinates(figure) -> pd.DataFrame:
    """Where the points of a map lie, by image."""
    parts = [
        pd.DataFrame({"image": trace.customdata, "label": trace.name, "c1": trace.x, "c2": trace.y})
        for trace in figure.data
        if trace.customdata is not None
    ]
    return pd.concat(parts).sort_values("image", ignore_index=True)


def same_places(figure, table: pd.DataFrame) -> None:
    found = coordinates(figure)
    assert found["image"].tolist() == table["image"].tolist()
    assert np.allclose(found[["c1", "c2"]], table[["c1", "c2"]])


@pytest.fixture
def small(trained: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a tiny local run of two blocks."""
    monkeypatch.setenv("RREPA_RUNS", str(trained.parent))
    return trained.name


def test_maps_lie_where_embed_puts_them():
    sheets, here, there, note, due = drawn(image=12)
    assert due is None
    table = rl.embed(rl.load(REVERSE), TAP, images=rl.Images(limit=1000))
    same_places(here, table)
    assert coordinates(here)["label"].tolist() == table["label"].tolist()
    same_places(there["value"], rl.embed(rl.load(NONE), TAP, images=rl.Images(limit=1000)))
    ring = here.data[-1]
    assert (ring.name, ring.x[0]) == ("image 12", pytest.approx(table["c1"][12]))
    assert "image 12 ringed" in here.layout.annotations[0].text.replace("<br>", " ")
    assert sheets["sheets"].keys() == {REVERSE, NONE}
    assert "over 360 images" in note


@pytest.mark.parametrize(("images", "fed"), [(feature_map.CONDITIONAL, True), (feature_map.UNCONDITIONAL, False)])
def test_generated_images_are_those_of_the_seeds_from_the_sidebar_on(small: str, images: str, fed: bool):
    run = feature_map.get_run(small)
    _, here, there, _, _ = drawn(small, "", 7, images=images, image=2, block=2)
    generated = rl.FeatureProtocol("reverse", feed_label=fed, samples=360, seed=7)
    same_places(here, rl.embed(run, "block.2.layer.2", protocol=generated))
    assert there["visible"] is False
    assert here.data[-1].name == "image 9", "the third image has the third seed"
    view = FeatureMapView(run=small, other="", seed=7, images=images, block=2, layer=2, image=2)
    html, other = feature_map.draw_picked(view)
    sample = rl.sample(run, [9], 2 if fed else None).images[0]
    assert "seed 9, class 2" in html if fed else "seed 9" in html
    map_view = feature_map.map_views(view)[0]
    assert torch.allclose(map_view.batch.x[2], sample, atol=1e-5)
    trajectory = feature_map.trajectory_of(map_view, 2)
    assert torch.equal(trajectory.finished[0], map_view.batch.x[2])
    assert "after block 2" in html
    assert other["visible"] is False


def test_neighbours_are_the_nearest_by_cosine_and_those_of_the_class_are_framed():
    run = rl.load(REVERSE)
    read = concatenate(FeatureProtocol().batches(run, [TAP]))
    features = read.features[TAP]
    table = rl.neighbours(features, features[5:6], 8, exclude=[5])
    left, right = feature_map.draw_picked(FeatureMapView(run=REVERSE, other=NONE, image=5))
    begins = left.index("nearest by cosine")
    for image in table["image"]:
        begins = left.index(data_uri(read.x[image]), begins) + 1
    same = int((read.y[table["image"].tolist()] == read.y[5]).sum())
    assert f"{same} of 8 of class {run.classes[int(read.y[5])]} (framed)" in left
    assert left.count('class="marked"') == same + 1, "and the block of the slider"
    assert "test image 5" in right["value"]


def test_the_share_of_neighbours_with_the_same_class_is_counted_over_all_images():
    read = concatenate(FeatureProtocol().batches(rl.load(REVERSE), [TAP]))
    features = read.features[TAP]
    near = rl.neighbours(features, features, 8, exclude=range(360))
    share = np.mean([read.y[i] == read.y[q] for i, q in zip(near["image"], near["query"], strict=True)])
    assert f"**{REVERSE}**, {TAP}: {share:.0%} of the 8 nearest" in drawn()[3]


def test_an_image_that_is_not_there_gives_the_last_and_says_so():
    _, here, _, note, _ = drawn(image=5000)
    assert here.data[-1].name == "image 359"
    assert "there is no image 5000, 359 is the last" in note
    assert "test image 359" in feature_map.draw_picked(FeatureMapView(run=REVERSE, other=NONE, image=5000))[0]


def test_thumbnails_are_known_by_place(small: str):
    sheet = drawn(small, "", 3, images=feature_map.CONDITIONAL)[0]["sheets"][small]
    assert (sheet["first"], sheet["words"][4], len(sheet["words"])) == (3, "seed 7, class 4", 360)
    assert sheet["address"].startswith("data:image/png;base64,")
    assert len(sheet["address"]) < 60_000


def test_a_smaller_flow_is_read_at_its_last_layer(small: str):
    _, here, there, note, _ = drawn(run=small, block=4, layer=4)
    assert here.layout.meta["run"] == small
    assert f"**{small}**, block.2.layer.2" in note
    assert f"**{NONE}**, block.4.layer.4" in note
    same_places(there["value"], rl.embed(rl.load(NONE), "block.4.layer.4", images=rl.Images(limit=1000)))
    fits = feature_map.fit(feature_map.get_run(small), FeatureMapView(block=4, layer=4, image=500))
    assert [fits[name]["value"] for name in ("block", "layer", "image")] == [2, 2, 359]


@pytest.mark.slow
def test_umap_is_fitted_beside_the_maps_and_then_drawn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(map_data, "_umaps", {})
    _, here, _, note, due = drawn(other="", method="UMAP")
    same_places(here, rl.embed(rl.load(REVERSE), TAP, images=rl.Images(limit=1000)))
    assert "**These are maps by PCA** until UMAP is ready" in note
    steps = list(feature_map.fit_umaps(due))
    assert "UMAP is being fitted" in steps[0][1]
    assert steps[0][2]["visible"] is True, "it can be stopped"
    assert steps[-1][-1] == due
    _, here, _, note, due = drawn(other="", method="UMAP", image=3)
    assert due is None
    assert "until UMAP is ready" not in note
    same_places(here, rl.embed(rl.load(REVERSE), TAP, "umap", images=rl.Images(limit=1000)))
    assert drawn(other="", method="UMAP", distance=0.5)[4] is not None, "another map"


def test_a_umap_that_cannot_be_is_told():
    with pytest.raises(gr.Error, match="400 neighbours among 360 images"):
        list(feature_map.fit_umaps(FeatureMapView(run=REVERSE, other="", neighbours=400)))
    assert "UMAP could not be fitted" not in str(list(feature_map.fit_umaps(None)))


@pytest.mark.parametrize(("images", "other"), [(feature_map.REAL, NONE), (feature_map.CONDITIONAL, "")])
def test_the_code_gives_the_coordinates(small: str, images: str, other: str):
    view = FeatureMapView(run=small, other=other, seed=4, images=images, block=2, layer=3)
    made = feature_map.code(view)
    assert made.shell == ""
    names: dict = {}
    exec(made.python, names)
    _, here, there, *_ = feature_map.draw(view)
    same_places(here, names["table"])
    if other:
        same_places(there["value"], names["other"])


def test_the_code_of_a_umap_names_its_settings():
    code = feature_map.code(
        FeatureMapView(
            run=REVERSE,
            other="",
            images=feature_map.UNCONDITIONAL,
            method="UMAP",
            block=2,
            layer=3,
            neighbours=20,
            distance=0.25,
        )
    ).python
    assert '"umap", protocol=rl.FeatureProtocol("reverse", samples=360, seed=0), umap=rl.Umap(20, 0.25))' in code


# --- a real browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def maps(view) -> Iterator:
    view.get_by_role("tab", name="Map", exact=True).click()
    view.wait_for_selector("#map-other .points path")
    view.wait_for_selector("#map-picked img[alt*='test image 0,']")
    view.wait_for_timeout(500)
    yield view
    assert view.errors == []
    assert view.strays == []


def middle(view, number: int) -> tuple[float, float]:
    """Where a point of the map lies on the screen."""
    point = view.locator("#map-here .points path").nth(number)
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@pytest.mark.browser
def test_a_point_shows_its_image_and_a_click_picks_it(maps):
    assert maps.locator("#map-here .points path").count() == 361, "all images, and a ring"
    at = middle(maps, 40)
    maps.mouse.move(*at)
    card = maps.locator("#maps .card")
    card.wait_for(state="visible")
    words = card.inner_text().strip()
    assert words.startswith("test image ")
    assert "data:image/png" in card.locator("i").evaluate("e => e.style.backgroundImage")
    maps.mouse.click(*at)
    maps.wait_for_selector(f"#map-picked img[alt*='{words}']")
    number = words.split(",")[0].split()[-1]
    assert maps.locator("#map-image input[type=number]").input_value() == number
    maps.wait_for_function(f"document.querySelector('#map-here').innerText.includes('image {number} ringed')")


@pytest.mark.browser
def test_arrow_keys_go_through_the_images_and_a_zoom_stays(maps):
    ranges = "[...document.querySelector('#map-here .js-plotly-plot').layout.xaxis.range]"
    box = maps.locator("#map-here .nsewdrag").bounding_box()
    corners = [(box["x"] + box["width"] * part, box["y"] + box["height"] * part) for part in (0.3, 0.7)]
    maps.mouse.move(*corners[0])
    maps.mouse.down()
    maps.mouse.move(*corners[1], steps=5)
    maps.mouse.up()
    maps.wait_for_function("document.querySelector('#map-here .js-plotly-plot').layout.xaxis.autorange === false")
    before = maps.evaluate(ranges)
    maps.locator("#map-image input[type=range]").focus()
    maps.keyboard.press("ArrowRight")
    maps.wait_for_selector("#map-picked img[alt*='test image 1,']")
    maps.wait_for_function("document.querySelector('#map-here').innerText.includes('image 1 ringed')")
    assert maps.evaluate(ranges) == pytest.approx(before)


@pytest.mark.browser
def test_one_run_alone_and_a_link_to_it_on_a_phone(maps, page):
    maps.set_viewport_size({"width": 390, "height": 844})
    reopen(maps, f"{page}?__theme=dark&tab=map&compare=nothing&read=generated+by+class&image=14&block=2")
    maps.wait_for_selector("#map-picked img[alt*='seed 14, class 4']", timeout=60_000)
    maps.wait_for_selector("#map-here .points path")
    assert not maps.locator("#map-other").is_visible()
    assert maps.evaluate("document.documentElement.scrollWidth") <= 390
