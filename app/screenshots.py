"""Make the README's pictures: `python app/screenshots.py` shows tabs of the page and figures in a headless Chromium.

Needs the `dev` extra and a Chromium (its path in $CHROMIUM, /usr/bin/chromium by default).
"""

import os
from typing import Any

from demo import build_demo
from page.serve import launch
from playwright.sync_api import sync_playwright

import rrepa_lab as rl
from rrepa_lab.paths import assets, bundled
from rrepa_lab.studies.photographs import read_study
from rrepa_lab.studies.reading import LAYERS, load_table
from rrepa_lab.viz.layers import layer_curves
from rrepa_lab.viz.spaces import tiles
from rrepa_lab.viz.training import setting_curves

# picture -> link, tab, what must be there, and the part of the page to show, in pixels
VIEWS = {
    "page": ("?seed=4", "Reverse path", "#features-other img", 1010),
    "page-layers": ("", "Layers", "#pair-map .heatmaplayer image", 800),
}

PHOTOGRAPHS = ("cifar10-none", "cifar10-reverse", "cifar10-latent-none", "cifar10-latent-reverse")
GUIDANCE = 2.0


def probed_layers() -> Any:
    """The accuracy of probes by layer, from the shipped table over seeds."""
    table = load_table(f"{LAYERS}-seeds")
    return layer_curves(table[(table["direction"] == "forward") & (table["pool"] == "mean")])


def photographs() -> Any:
    """Samples of the bundled flows of CIFAR-10, the first ten seeds, a class each."""
    rows = {}
    for name in PHOTOGRAPHS:
        run = rl.load(name)
        images = rl.sample(run, range(10), range(10), guidance=GUIDANCE).images
        rows[name.removeprefix("cifar10-")] = dict(zip(run.classes, images, strict=True))
    caption = f"seeds 0 to 9, one for each class, not selected; guidance {GUIDANCE:g}, denoised; demo size"
    return tiles(rows, "Samples of four flows of CIFAR-10", caption)


def photograph_curves() -> list[Any]:
    """Distance of the samples and accuracy against steps, of the settings of the study on CIFAR-10 with the most seeds."""
    table = read_study(assets() / "studies" / "cifar10-main.yaml").curves()
    table = table[table["train_seeds"] == table["train_seeds"].max()]
    return [setting_curves(table, metric) for metric in ("FD[efficientnet-lite0]", "held_out_accuracy")]


# picture -> what is drawn in it, from the top
FIGURES = {"layers": lambda: [probed_layers()], "photographs": lambda: [photographs()], "photograph-curves": photograph_curves}


def main() -> None:
    """Write assets/pictures: VIEWS of the page, and FIGURES."""
    out = bundled("assets") / "pictures"
    out.mkdir(exist_ok=True)
    page = build_demo()
    _, address, _ = launch(page, host="127.0.0.1", port=None, prevent_thread_lock=True, quiet=True)
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
        for name, make in FIGURES.items():
            figures = make()
            view.set_viewport_size({"width": 900, "height": sum(int(one.layout.height) for one in figures) + 10})
            view.set_content("".join(one.to_html(config={"displayModeBar": False}) for one in figures))
            view.wait_for_selector(".main-svg")
            view.wait_for_timeout(1000)
            view.screenshot(path=out / f"{name}.png")
        browser.close()
    page.close()
    print(out)


if __name__ == "__main__":
    main()
