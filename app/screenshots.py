"""Make the README's pictures: `python app/screenshots.py` photographs tabs of the page and a figure in a headless Chromium.

Needs the `dev` extra and a Chromium (its path in $CHROMIUM, /usr/bin/chromium by default).
"""

import os

from demo import build_demo
from playwright.sync_api import sync_playwright
from serving import launch

from rrepa_lab.paths import bundled
from rrepa_lab.studies.reading import LAYERS, load_table
from rrepa_lab.viz.layers import layer_curves

# picture -> link, tab, what must be there, and the part of the page to show, in pixels
VIEWS = {
    "page": ("?seed=4", "Reverse path", "#features-other img", 1010),
    "page-layers": ("", "Layers", "#pair-map .heatmaplayer image", 800),
}


def main() -> None:
    """Write assets/pictures: VIEWS of the page, and layers.png, from the shipped table over seeds."""
    out = bundled("assets") / "pictures"
    out.mkdir(exist_ok=True)
    page = build_demo()
    _, address, _ = launch(page, host="127.0.0.1", port=None, prevent_thread_lock=True, quiet=True)
    table = load_table(f"{LAYERS}-seeds")
    figure = layer_curves(table[(table["direction"] == "forward") & (table["pool"] == "mean")])
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1200, "height": 1000})
        for name, (query, tab, wanted, height) in VIEWS.items():
            view.set_viewport_size({"width": 1200, "height": height})
            view.goto(address + query)
            view.wait_for_selector("#way img")
            view.get_by_role("tab", name=tab, exact=True).click()
            view.wait_for_selector(wanted, state="attached")
            view.wait_for_timeout(3000)  # all of the tab is drawn, fonts and shadows settle
            view.screenshot(path=out / f"{name}.png")
        view.set_viewport_size({"width": 900, "height": int(figure.layout.height) + 10})
        view.set_content(figure.to_html(include_plotlyjs=True))
        view.wait_for_selector(".scatterlayer .trace")
        view.screenshot(path=out / "layers.png")
        browser.close()
    page.close()
    print(out)


if __name__ == "__main__":
    main()
