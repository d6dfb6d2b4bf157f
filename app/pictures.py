"""Make the README's picture: `python app/pictures.py` photographs the page in a headless Chromium.

Needs the `dev` extra and a Chromium (its path in $CHROMIUM, /usr/bin/chromium by default).
"""

import os

from demo import build_demo, launch
from playwright.sync_api import sync_playwright

from rrepa_lab.places import bundled


def main() -> None:
    """Open the page on a free port, wait for the samples, and write assets/pictures/page.png."""
    page = build_demo()
    _, address, _ = launch(page, host="127.0.0.1", port=None, prevent_thread_lock=True, quiet=True)
    out = bundled("assets") / "pictures" / "page.png"
    out.parent.mkdir(exist_ok=True)
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1200, "height": 900})
        view.goto(address)
        view.wait_for_selector("img[alt^='16 samples']")
        view.wait_for_timeout(1000)  # fonts and shadows settle
        view.screenshot(path=out, full_page=True)
        browser.close()
    page.close()
    print(out)


if __name__ == "__main__":
    main()
