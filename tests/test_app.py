"""The page: handlers without a browser, endpoints through gradio's own client, and a real browser under `-m browser`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.data.pixels import from_picture
from rrepa_lab.places import bundled
from rrepa_lab.viz.images import picture

gr = pytest.importorskip("gradio")


# --- handlers ---------------------------------------------------------------------------------------------------------


def test_sheets_show_the_samples_of_the_library():
    from tabs import samples

    left, right, caption = samples.sheets("digits-reverse", "digits-none", 4, 7, 2.0, True)
    made = rl.sample(rl.load("digits-reverse"), range(7, 23), 3, 2.0)
    shown = from_picture(left["value"].crop((10, 10, 90, 90)), 1, 8)
    assert (shown[0] - made.images[0]).abs().max() < 0.01
    assert left["alt_text"] == "16 samples of class 3 from digits-reverse"
    assert right["label"] == "digits-none"
    assert "seeds 7 to 22" in caption
    assert "Demo size" in caption


def test_no_label_is_a_choice():
    from tabs import samples

    left, _, caption = samples.sheets("digits-reverse", "digits-none", 0, 0, 0.0, False)
    assert "any class" in caption
    assert "as generated" in caption
    assert left["value"].size[0] > 300


def test_judge_says_what_the_library_says():
    from tabs import classify

    seen = classify.test_digit("digits-reverse", 5)
    run = rl.load("digits-reverse")
    x = run.data("test").x[5:6]
    for words, method in classify.METHODS.items():
        _, figure, verdict = classify.judge("digits-reverse", "digits-none", words, seen)
        expected = rl.classify(run, x, method)
        assert np.allclose(figure.data[0].y, expected.scores[0].tolist())
        assert f"**digits-reverse** says **{int(expected.label)}**" in verdict


def test_uploads_are_turned_to_light_on_dark():
    from tabs import classify

    x = rl.load("digits-none").data("test").x[0]
    light_on_dark = classify.upload("digits-none", picture(x, scale=10))
    dark_on_light = classify.upload("digits-none", picture(-x, scale=10))
    assert np.allclose(light_on_dark[0], dark_on_light[0], atol=0.02)
    assert "turned" in dark_on_light[1]


def test_mistakes_become_notices():
    from shell import told
    from tabs import classify, samples

    with pytest.raises(gr.Error, match="the drawing is empty"):
        told(classify.drawing)("digits-none", {"layers": [np.zeros((280, 280, 4), np.uint8)]})
    with pytest.raises(gr.Error, match="no picture yet"):
        told(classify.upload)("digits-none", None)
    with pytest.raises(gr.Error, match="no run '../../etc'"):
        samples.compare("../../etc", "digits-none", 1, 0, 1.0, True)


# --- a served page ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    """The address of `python app/demo.py`, started as a person starts it, from another folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("elsewhere")
    log = (folder / "log").open("w")
    command = [sys.executable, str(bundled("app") / "demo.py"), "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        with contextlib.suppress(OSError), urllib.request.urlopen(address) as answer:
            if answer.status == 200:
                break
        assert process.poll() is None, Path(log.name).read_text()
        time.sleep(0.1)
    yield address
    process.terminate()
    process.wait(10)
    log.close()


@pytest.fixture(scope="module")
def client(page: str):
    from gradio_client import Client

    connected = Client(page, verbose=False)
    yield connected
    connected.close()


def test_endpoint_sample(client):
    path, facts = client.predict(run="digits-reverse", label=3, seed=17, guidance=2.0, api_name="/sample")
    expected = rl.sample(rl.load("digits-reverse"), [17], 3, 2.0).images[0]
    assert torch.allclose(torch.tensor(facts["values"]), expected, atol=1e-5)
    with Image.open(path) as opened:
        assert opened.size == (64, 64)


def test_endpoint_classify(client, tmp_path):
    from gradio_client import handle_file

    run = rl.load("digits-none")
    picture(run.data("test").x[2], scale=4).save(tmp_path / "digit.png")
    answer = client.predict(
        run="digits-none", image=handle_file(str(tmp_path / "digit.png")), method="bayes", api_name="/classify"
    )
    with Image.open(tmp_path / "digit.png") as opened:
        expected = rl.classify(run, from_picture(opened, 1, 8), "bayes")
    assert answer["label"] == str(int(expected.label))
    assert [answer["scores"][k] for k in run.classes] == pytest.approx(expected.scores[0].tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": "digits-nobody", "label": 3, "seed": 0, "guidance": 0.0}, "digits-nobody"),
        ({"run": "digits-none", "label": 11, "seed": 0, "guidance": 0.0}, "label 11 is out of range"),
        ({"run": "digits-none", "label": 1, "seed": -5, "guidance": 0.0}, "-5"),
    ],
)
def test_endpoint_mistakes_are_explained(client, arguments, message):
    with pytest.raises(Exception, match=message):
        client.predict(**arguments, api_name="/sample")


def test_endpoint_refuses_what_is_no_picture(client, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(Exception, match=r"(?i)image|error"):
        client.predict(run="digits-none", image=handle_file(str(tmp_path / "x.png")), method="bayes", api_name="/classify")


def test_only_the_endpoints_are_public(page):
    with urllib.request.urlopen(f"{page}/gradio_api/info") as answer:
        named = json.load(answer)["named_endpoints"]
    assert set(named) == {"/sample", "/classify"}
    assert [p["parameter_name"] for p in named["/sample"]["parameters"]] == ["run", "label", "seed", "guidance"]


def test_files_of_the_machine_are_not_served(page):
    for path in ("/etc/hostname", str(bundled("app") / "demo.py")):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{page}/gradio_api/file={path}")
        with caught.value as answer:
            assert answer.code in (403, 404)


# --- a real browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tab(page: str):
    """A browser page that collects what went wrong and where requests went."""
    sync = pytest.importorskip("playwright.sync_api")
    quiet = [
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
    ]
    with sync.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=quiet)
        opened = browser.new_page(viewport={"width": 1280, "height": 1000})
        opened.errors, opened.strays = [], []
        opened.on("console", lambda message: opened.errors.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.on("request", lambda r: opened.strays.append(r.url) if not r.url.startswith((page, "data:", "blob:")) else None)
        opened.goto(page)
        opened.wait_for_selector("img[alt='16 samples of class 3 from digits-reverse']")
        yield opened
        browser.close()


@pytest.mark.browser
def test_page_opens_filled_and_stays_at_home(tab):
    assert tab.locator("img[alt^='16 samples']").count() == 2
    tab.get_by_role("tab", name="Classify").click()
    tab.wait_for_selector(".js-plotly-plot .bars path")
    assert tab.locator(".js-plotly-plot .bars path").count() == 20
    assert tab.errors == []
    assert tab.strays == []


@pytest.mark.browser
def test_controls_repaint(tab):
    tab.get_by_label("Class", exact=True).click()
    tab.get_by_role("option", name="7").click()
    tab.wait_for_selector("img[alt='16 samples of class 7 from digits-none']")
    tab.get_by_role("slider", name="Guidance").first.focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("document.querySelector('#samples-note').innerText.includes('guidance 2.1')")
    assert tab.errors == []


@pytest.mark.browser
def test_a_digit_drawn_with_the_mouse_is_classified(tab):
    tab.get_by_role("tab", name="Classify").click()
    tab.get_by_role("tab", name="Draw").click()
    tab.get_by_role("button", name="Brush").click()
    box = tab.locator("#pad canvas").last.bounding_box()
    at = [(box["x"] + box["width"] * fx, box["y"] + box["height"] * fy) for fx, fy in ((0.5, 0.2), (0.5, 0.5), (0.5, 0.8))]
    tab.mouse.move(*at[0])
    tab.mouse.down()
    for point in at[1:]:
        tab.mouse.move(*point, steps=10)
    tab.mouse.up()
    tab.get_by_role("button", name="Classify the drawing").click()
    tab.wait_for_function("document.querySelector('#verdict').innerText.includes('your drawing')")
    assert "says" in tab.locator("#verdict").inner_text()
    assert tab.errors == []


@pytest.mark.browser
@pytest.mark.parametrize("name", ["digits-forward", "digits-detach"])
def test_every_bundled_run_can_be_picked(tab, name):
    tab.get_by_label("Run", exact=True).first.click()
    tab.get_by_role("option", name=name).click()
    tab.wait_for_selector(f"img[alt='16 samples of class 3 from {name}']")
    assert tab.errors == []


@pytest.mark.browser
def test_phone_width_and_dark_mode(tab, page):
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.goto(f"{page}?__theme=dark")
    tab.wait_for_selector("img[alt='16 samples of class 3 from digits-reverse']")
    assert tab.evaluate("document.body.classList.contains('dark')")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390, "the page can be pushed sideways"
