"""What the page asks its server for: `pytest -m browser`. Only the handlers of the open tab, and those of the page itself."""

import json
import urllib.request

import pytest
from conftest import reopen
from test_browser import TABS, open_tab, pick_run, quiet

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def owners(page):
    """By number of a handler: the names of the tabs whose components it listens to, and of those it fills."""
    config = json.load(urllib.request.urlopen(f"{page}/config"))
    parts = {part["id"]: part for part in config["components"]}
    tab_of = {}

    def visit(node, tab):
        part = parts[node["id"]]
        if part["type"] == "tabitem" and (part["props"].get("elem_id") or "").startswith("tab-"):
            tab = part["props"]["label"]
        tab_of[node["id"]] = tab
        for child in node.get("children") or ():
            visit(child, tab)

    for node in config["layout"]["children"]:
        visit(node, None)
    names = set(tab_of.values()) - {None}
    assert names == {*TABS}
    found = {}
    for one in config["dependencies"]:
        heard, filled = (
            {tab_of.get(part) for part in ids} - {None} for ids in ([t[0] for t in one["targets"]], one["outputs"])
        )
        found[one["id"]] = (heard, filled)
    return found


def belongs(owner, tab):
    """Whether a handler is the tab's own, or one of the page: of the sidebar, or of all tabs."""
    heard, filled = owner
    return heard <= {tab} and (filled <= {tab} or filled == {*TABS})


def listen(view):
    """The numbers of the handlers that are asked for from now on."""
    made = []
    view.on("request", lambda r: made.append(r.post_data_json["fn_index"]) if "/queue/join" in r.url else None)
    return made


def settle(view, made, least=0):
    """Wait until so many handlers were asked for, and then until none was for three seconds."""
    for _ in range(600):
        if len(made) >= least:
            break
        view.wait_for_timeout(100)
    assert len(made) >= least, made
    before = -1
    while len(made) != before:
        before = len(made)
        view.wait_for_timeout(3000)


def test_no_handler_is_both_of_one_tab_and_of_another(owners):
    """Else `belongs` could not tell whose request it is."""
    for heard, filled in owners.values():
        assert len(heard) <= 1 or heard == {*TABS}
        assert len(filled) <= 1 or filled == {*TABS}


@pytest.mark.parametrize(("name", "others", "slider"), [("Samples", 2, "Samples a row"), ("Map", 3, "Image")])
def test_a_change_asks_the_handlers_of_the_open_tab_alone(view, owners, name, others, slider):
    """Each panel of the tab once, the link once, and of the page what gives the redraw."""
    for visited in ("Classify", "Training", name):  # their controls are in the page, and hear what changes
        open_tab(view, visited)
    made = listen(view)
    settle(view, made)

    def seed():
        view.get_by_role("spinbutton", name="Seed", exact=True).fill("11")

    def slide():
        view.locator(f".tabitem:visible input[type=range][aria-label*='{slider}']").first.focus()
        view.keyboard.press("ArrowRight")

    for change, most in ((seed, others + 1), (lambda: pick_run(view, "digits-forward"), others + 1), (slide, others)):
        made.clear()
        change()
        settle(view, made, least=2)
        assert len(made) == len(set(made)) <= most, (change.__name__, made)
        assert [number for number in made if not belongs(owners[number], name)] == []
    quiet(view)


def test_a_change_makes_requests_for_the_open_tab_alone(view):
    open_tab(view, "Samples")
    view.wait_for_selector("img[alt='80 samples of every class from digits-none']")
    view.wait_for_timeout(500)
    made = []
    view.on("request", lambda r: made.append(r.post_data_json["fn_index"]) if "/queue/join" in r.url else None)
    view.get_by_role("button", name="Roll").click()
    view.wait_for_function("!document.querySelector('#samples-note').innerText.includes('columns are seeds 0 to')")
    view.wait_for_timeout(1000)
    assert 1 < len(made) == len(set(made)) <= 4, made
    made.clear()
    open_tab(view, "Classify")
    view.wait_for_selector("#confusion-2 .heatmaplayer image, #confusion-2 .heatmaplayer path", state="attached")
    view.wait_for_timeout(1000)
    assert len(made) == len(set(made)) <= 7, made  # its five parts, what opened, and the link
    quiet(view)


def test_opening_the_page_makes_requests_for_the_open_tab_alone(view, page):
    made = listen(view)
    settle(view, made)  # of the page that is left
    made.clear()
    for address, most in ((page, 3), (f"{page}?tab=samples&run=digits-none", 5)):
        reopen(view, address)
        view.wait_for_selector("#sheet img" if "samples" in address else "#features img")
        view.wait_for_timeout(2000)
        assert len(made) == len(set(made)) <= most, made  # the tab, the link and what opened, of another run that as well
        made.clear()
    quiet(view)


def test_a_page_at_rest_asks_for_nothing(view):
    asked = []
    view.on("request", lambda request: asked.append(request.url))
    for name in TABS:
        open_tab(view, name)
        view.wait_for_timeout(5000)
        asked.clear()
        view.wait_for_timeout(1500)
        assert [url for url in asked if url.split("?")[0].endswith(("/queue/join", "/run/predict"))] == [], name
