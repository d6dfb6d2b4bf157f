"""The page in a headless Chromium, as a visitor meets it: `pytest -m browser`."""

import re
import statistics
import time

import pytest
from conftest import reopen

from rrepa_lab.runs.presets import ALIGNED
from rrepa_lab.viz.images import picture

pytestmark = pytest.mark.browser
TABS = {
    "Reverse path": "#way img", "Layers": "#layer-map .heatmaplayer image",
    "Intervene": "#intervention img",
    "Classify": "#by-step .bars path", "Samples": "#sheet img", "Map": "#map-here .scatterlayer .point",
    "Training": "#curves .scatterlayer path",
}  # fmt: skip


def quiet(view):
    """Nothing went wrong in the console, and nobody else was asked for anything."""
    assert view.errors == []
    assert view.strays == []


def open_tab(view, name):
    view.get_by_role("tab", name=name, exact=True).click()
    view.wait_for_selector(TABS[name], state="attached")  # a curve of one point has no extent


def pick_run(view, name, label="Run"):
    view.get_by_label(label, exact=True).first.click()
    view.get_by_role("option", name=name, exact=True).click()


def repaints(view, slider, watched, presses):
    """Seconds from an arrow key on a slider to a change of what is watched, for each press."""
    seconds = []
    view.get_by_role("slider", name=slider).first.focus()
    for key in presses:
        before = view.locator(watched).inner_text()
        began = time.perf_counter()
        view.keyboard.press(key)
        view.wait_for_function(f"before => document.querySelector('{watched}').innerText != before", arg=before)
        seconds.append(time.perf_counter() - began)
    return seconds


def test_the_page_opens_filled(view):
    assert view.locator("#way img").count() == 12
    assert "from noise to image" in view.locator("#way img").first.get_attribute("alt")
    quiet(view)


@pytest.mark.parametrize("name", list(TABS))
def test_every_tab_draws(view, name):
    open_tab(view, name)
    quiet(view)


@pytest.mark.parametrize(
    "run", [*(f"digits-{strategy}" for strategy in ALIGNED), "cifar10-none", "cifar10-latent-reverse", "small"]
)
def test_every_tab_draws_with_every_run(view, run):
    pick_run(view, run)
    view.wait_for_function(f"document.querySelector('#way').innerText.includes('{run}, seed 0')")
    for name in TABS:
        open_tab(view, name)
    quiet(view)


def test_a_damaged_run_is_told_and_the_page_lives_on(view):
    pick_run(view, "damaged")
    view.get_by_text("damaged or no safetensors file").first.wait_for()
    pick_run(view, "digits-detach")
    view.wait_for_function("document.querySelector('#way').innerText.includes('digits-detach, seed 0')")


def test_the_block_slider_moves_the_mark_and_the_features(view):
    view.wait_for_function("(document.querySelector('#way-note span.md') || {innerText: ''}).innerText.includes('block')")
    seconds = repaints(view, "Block", "#way-note span.md", ["ArrowLeft", "ArrowLeft", "ArrowRight", "ArrowRight", "ArrowRight"])
    view.wait_for_function("document.querySelector('#way figure.marked figcaption').innerText == 'after block 4'")
    assert "block.4.layer.2" in view.locator("#features").inner_text()
    seconds += repaints(view, "Layer", "#way-note span.md", ["ArrowLeft", "ArrowRight", "ArrowRight"])
    print(f"\nslider to repaint: median {statistics.median(seconds):.3f} s of {len(seconds)}")
    quiet(view)


def test_the_film_plays_to_the_image(view):
    view.get_by_role("button", name="Play").first.click()
    marked = "document.querySelector('#way figure.marked figcaption').innerText"
    view.wait_for_function(f"{marked} == 'after block 1'")
    view.get_by_role("button", name="◀ noise").click()
    view.wait_for_function(f"{marked} == 'after block 2'")
    quiet(view)


def test_a_gradient_prediction_is_quick(view):
    open_tab(view, "Classify")
    seconds = repaints(view, "Test image", "#verdict span.md", ["ArrowRight"] * 5)
    print(f"\nnext image to verdict: median {statistics.median(seconds):.3f} s of {len(seconds)}")
    quiet(view)


def test_a_digit_drawn_with_the_mouse_is_classified(view):
    open_tab(view, "Classify")
    view.get_by_role("tab", name="Draw").click()
    view.wait_for_function("document.querySelector(\"#pad button[title='Brush']\")?.classList.contains('highlight')")
    box = view.locator("#pad canvas").last.bounding_box()
    for fx in (0.5, 0.51):
        at = [(box["x"] + box["width"] * fx, box["y"] + box["height"] * fy) for fy in (0.2, 0.5, 0.8)]
        view.mouse.move(*at[0])
        view.mouse.down()
        for point in at[1:]:
            view.mouse.move(*point, steps=10)
        view.mouse.up()
        view.wait_for_timeout(300)
    view.wait_for_function("document.querySelector('#verdict span.md').innerText.includes('your drawing')")
    assert "says" in view.locator("#verdict span.md").inner_text()
    for tool in ("Pan", "Zoom in", "Save changes"):
        assert not view.locator(f"#pad button[title='{tool}']").is_visible()
    quiet(view)


def test_a_seed_out_of_range_is_reported_once(view):
    open_tab(view, "Classify")
    view.wait_for_selector("#confusion-2 .heatmaplayer image, #confusion-2 .heatmaplayer path", state="attached")
    view.get_by_label("Seed", exact=True).fill("-5")
    view.get_by_text("the seed must be a whole number from 0 to").first.wait_for()
    view.wait_for_selector("#by-step .bars path", state="detached")
    view.wait_for_timeout(1500)
    assert view.get_by_test_id("toast-body").count() == 1
    view.get_by_label("Seed", exact=True).fill("5")
    view.wait_for_selector("#by-step .bars path", state="attached")
    quiet(view)


def test_uploads_are_classified_or_explained(view, digits, tmp_path):
    open_tab(view, "Classify")
    view.get_by_role("tab", name="Upload").click()
    picture(digits[0][2], scale=10).save(tmp_path / "digit.png")
    (tmp_path / "text.png").write_text("no picture")
    field = view.locator("input[type=file]").first
    field.set_input_files(tmp_path / "digit.png")
    view.wait_for_function("document.querySelector('#verdict span.md').innerText.includes('your picture')")
    view.get_by_label("Remove Image").or_(view.get_by_label("Clear")).first.click()
    field.set_input_files(tmp_path / "text.png")
    view.get_by_text("text.png is not a picture").first.wait_for()


def test_a_printed_digit_is_read_like_one_of_the_data(view, printed, tmp_path):
    open_tab(view, "Classify")
    view.get_by_role("tab", name="Upload").click()
    printed(5).save(tmp_path / "five.png")
    view.locator("input[type=file]").first.set_input_files(tmp_path / "five.png")
    view.wait_for_function("document.querySelector('#verdict span.md').innerText.includes('inverted to light on dark')")
    assert view.locator("#verdict span.md").inner_text().count("says 5") == 2


@pytest.mark.parametrize("run", ["digits-reverse", "cifar10-reverse"])
def test_tokens_are_brushed_and_the_answer_follows(view, page, run):
    reopen(view, f"{page}?tab=intervene&run={run}&compare=nothing")
    view.wait_for_selector(TABS["Intervene"])
    note = view.locator("#intervention-note")
    whole = note.inner_text()
    first, last = view.locator(".token").nth(0), view.locator(".token").nth(2)
    start, end = first.bounding_box(), last.bounding_box()
    view.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    view.mouse.down()
    view.mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2, steps=12)
    view.mouse.up()
    view.wait_for_function("before => document.querySelector('#intervention-note').innerText != before", arg=whole)
    assert view.locator("#tokens input, #tokens textarea").input_value() == "0..2"
    view.wait_for_selector("#brush >> text=3 of")
    assert view.locator(".token[aria-pressed=true]").count() == 3
    part = note.inner_text()
    view.get_by_role("button", name="all tokens").click()
    view.wait_for_function("before => document.querySelector('#intervention-note').innerText == before", arg=whole)
    assert part != whole
    quiet(view)


def test_strength_is_a_slider_from_nothing_on(view):
    open_tab(view, "Intervene")
    for words in repaints(view, "Strength", "#intervention-note", ["ArrowLeft"] * 2):
        assert words > 0
    view.get_by_role("slider", name="Strength").first.fill("0")
    view.wait_for_function("document.querySelector('#intervention-note').innerText.includes('+0.00 nats')")
    quiet(view)


def test_mistakes_are_shown_and_can_be_looked_at(view):
    open_tab(view, "Classify")
    first = view.locator("#mistakes-gallery button img").first
    first.wait_for()
    assert "of 360" in view.locator("#browse-note").inner_text()
    before = view.locator("#verdict span.md").inner_text()
    view.locator("#mistakes-gallery button:has(img)").first.press("Enter")
    view.wait_for_function("before => document.querySelector('#verdict span.md').innerText != before", arg=before)
    assert "✗" in view.locator("#verdict span.md").inner_text()
    quiet(view)


def test_samples_can_be_taken_away(view):
    open_tab(view, "Samples")
    view.wait_for_selector("img[alt='80 samples of every class from digits-none']")
    with view.expect_download() as download:
        view.get_by_role("button", name="Download all as zip").click()
    assert download.value.suggested_filename == "samples.zip"
    quiet(view)


def test_a_link_brings_the_view_back(view, page):
    open_tab(view, "Samples")
    pick_run(view, "digits-detach")
    view.get_by_role("slider", name="Guidance").last.focus()
    for _ in range(3):
        view.keyboard.press("ArrowRight")
    view.wait_for_function("document.querySelector('#samples-note').innerText.includes('guidance 0.3')")
    view.get_by_role("button", name="Copy link").click()
    view.wait_for_function("(document.querySelector('#link textarea') || {value: ''}).value.includes('guidance=0.3')")
    link = view.locator("#link textarea").input_value()
    assert "run=digits-detach" in link
    reopen(view, link)
    view.wait_for_function("(document.querySelector('#samples-note') || {innerText: ''}).innerText.includes('guidance 0.3')")
    view.wait_for_selector("img[alt='80 samples of every class from digits-detach']")
    reopen(view, f"{page}/?tab=samples&run=nobody&guidance=99&count=4")
    view.get_by_text("Not in this page: no run 'nobody'").first.wait_for()
    view.get_by_text("guidance cannot be '99'").first.wait_for()
    view.wait_for_selector("img[alt='40 samples of every class from digits-reverse']")
    quiet(view)


def test_the_view_as_code(view):
    view.get_by_role("button", name="Show as code").click()
    view.wait_for_function("document.querySelector('#code').innerText.includes('rrepa-lab trace digits-reverse')")
    quiet(view)


def test_every_control_can_be_reached_by_the_tab_key(view):
    reached = []
    for _ in range(40):
        view.keyboard.press("Tab")
        reached.append(
            view.evaluate("(e => e.getAttribute('aria-label') || e.innerText || e.id || e.tagName)(document.activeElement)")
        )
    order = " | ".join(reached)
    wanted = ["Run", "Compare with", "Seed", "Copy link", "Reverse path", "Block", "Layer", "Play"]
    places = [next((k for k, name in enumerate(reached) if re.search(rf"\b{want}\b", name)), None) for want in wanted]
    assert None not in places, f"{wanted} in {order}"
    assert places == sorted(places), order


@pytest.mark.parametrize("dark", [False, True])
def test_phone_width(view, page, dark):
    view.set_viewport_size({"width": 390, "height": 844})
    reopen(view, f"{page}/?__theme={'dark' if dark else 'light'}")
    view.wait_for_selector("#way img")
    assert view.evaluate("document.body.classList.contains('dark')") == dark
    assert view.evaluate("document.documentElement.scrollWidth") <= 390, "the page can be pushed sideways"
    quiet(view)
