"""Make the README's pictures: `python app/pictures.py` photographs the page and a figure in a headless Chromium.

Needs the `dev` extra and a Chromium (its path in $CHROMIUM, /usr/bin/chromium by default).
"""

import os

from demo import build_demo
from frame import launch
from playwright.sync_api import sync_playwright

from rrepa_lab.places import bundled
from rrepa_lab.studies.reading import LAYERS, load_table
from rrepa_lab.viz.layers import layer_curves


def main() -> None:
    """Write assets/pictures: page.png, once the page has its samples, and layers.png, from the shipped table over seeds."""
    out = bundled("assets") / "pictures"
    out.mkdir(exist_ok=True)
    page = build_demo()
    _, address, _ = launch(page, host="127.0.0.1", port=None, prevent_thread_lock=True, quiet=True)
    table = load_table(f"{LAYERS}-seeds")
    figure = layer_curves(table[table["direction"] == "forward"])
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1200, "height": 900})
        view.goto(address)
        view.wait_for_selector("img[alt^='16 samples']")
        view.wait_for_timeout(1000)  # fonts and shadows settle
        view.screenshot(path=out / "page.png", full_page=True)
        view.set_viewport_size({"width": 900, "height": int(figure.layout.height) + 10})
        view.set_content(figure.to_html(include_plotlyjs=True))
        view.wait_for_selector(".scatterlayer .trace")
        view.screenshot(path=out / "layers.png")
        browser.close()
    page.close()
    print(out)


if __name__ == "__main__":
    main()
