"""A notebook in a real JupyterLab: opened in a headless browser, run from the menu, its slider moved by keyboard and mouse."""

import os
import shutil
import sys

import pytest
from conftest import chromium, free_port, served

from rrepa_lab.paths import bundled

pytestmark = [pytest.mark.notebooks, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab over a copy of the notebooks."""
    shutil.copytree(bundled("notebooks"), tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*", "runs"))
    port = free_port()
    places = {
        name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1",
               "--IdentityProvider.token=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
               "--LabApp.news_url=", "--LabApp.extension_manager=readonly"]  # fmt: skip
    address = f"http://127.0.0.1:{port}/lab"
    with served(command, address, tmp_path / "notebooks", **places):
        yield address


def test_a_slider_dragged_in_jupyterlab_changes_its_figure(lab):
    with chromium(height=1600) as page:
        page.set_default_timeout(120_000)
        page.goto(f"{lab}/tree/00_start_here.ipynb")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # else it asks which kernel to start
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()

        titles = page.locator(".jp-OutputArea .gtitle")
        figure = titles.filter(has_text="digits-reverse, denoised")
        figure.first.wait_for()
        page.locator(".jp-RenderedHTMLCommon td", has_text="gradient_accuracy").first.wait_for()  # the last cell has run
        handle = page.locator(".jp-OutputArea .widget-slider .noUi-handle").first
        handle.scroll_into_view_if_needed()
        handle.focus()
        page.keyboard.press("ArrowLeft")
        titles.filter(has_text="digits-reverse, after block 1").first.wait_for()
        assert figure.count() == 0, "the figure before is gone"
        page.keyboard.press("Home")
        titles.filter(has_text="digits-reverse, noise").first.wait_for()
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + 400, box["y"], steps=8)
        page.mouse.up()
        figure.first.wait_for()
        if picture := os.environ.get("LAB_PICTURE"):
            page.screenshot(path=picture)
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0
