"""How fast the page answers in a real browser: from its start to the first picture, and from a key to the repaint."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rrepa_lab.bench.timing import spread
from rrepa_lab.errors import LabError
from rrepa_lab.paths import bundled
from rrepa_lab.runs.store import load
from rrepa_lab.viz.images import picture

CHROMIUM = "/usr/bin/chromium"
STARTS = 5  # of the page, each with a fresh browser
VISITORS, RUNS = 16, ("digits-none", "digits-reverse")  # of the measurement of memory
# case -> tab, slider, what is watched: text that a repaint changes
SLIDERS = {
    "block slider": ("Reverse path", "Block", "#way-note span.md"),
    "layer slider": ("Reverse path", "Layer", "#way-note span.md"),
    "gradient prediction": ("Classify", "Test image", "#verdict span.md"),
}


def page_times(repeats: int, threads: int, device: str) -> pd.DataFrame:
    """One row a case: start to the first picture, first picture of an open page, and each of SLIDERS; seconds.

    Raises: LabError without playwright or a Chromium.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise LabError('the benchmark of the page drives a browser: pip install "rrepa_lab[dev]"') from None
    rows = []
    with sync_playwright() as player:
        try:
            browser = player.chromium.launch(
                executable_path=os.environ.get("CHROMIUM", CHROMIUM), args=["--no-sandbox", "--disable-background-networking"]
            )
        except Error as error:
            raise LabError(
                f"no Chromium at {os.environ.get('CHROMIUM', CHROMIUM)}: set $CHROMIUM ({type(error).__name__})"
            ) from None
        starts = []
        for _ in range(STARTS):
            began = time.perf_counter()
            with _page(threads, device) as address:
                view = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
                view.goto(address)
                view.wait_for_selector("#way img")
                starts.append(time.perf_counter() - began)
        rows.append(_row("python app/demo.py to the first picture", starts))
        with _page(threads, device) as address:
            view = browser.new_page(viewport={"width": 1280, "height": 1000})
            again = []
            for _ in range(repeats):
                started = time.perf_counter()
                view.goto(address)
                view.wait_for_selector("#way img")
                again.append(time.perf_counter() - started)
            rows.append(_row("an open page to the first picture", again))
            for case, (tab, slider, watched) in SLIDERS.items():
                view.get_by_role("tab", name=tab).click()
                view.wait_for_function(f"(document.querySelector('{watched}') || {{innerText: ''}}).innerText.length > 20")
                view.wait_for_timeout(5000)  # all of the tab is drawn
                rows.append(_row(case, _repaints(view, slider, watched, repeats)))
        browser.close()
    return pd.DataFrame(rows)


def page_memory(minutes: int, threads: int, device: str) -> pd.DataFrame:
    """Resident memory of the page while VISITORS ask in turn for samples, traces and classes, and after a minute of rest.

    Returns: one row a minute, and "before" and "a minute after": case, rss_mib, answers so far, and growth_mib, what the
        minute added.
    """
    import psutil
    from gradio_client import Client, handle_file

    with _page(threads, device) as address, tempfile.TemporaryDirectory() as folder:
        (process,) = (one for one in psutil.Process().children() if "demo.py" in " ".join(one.cmdline()))
        file = Path(folder) / "digit.png"
        picture(load("digits-none").data("test", 10).x[0], scale=4).save(file)
        answers, stopped, failures = [0] * VISITORS, threading.Event(), list[Exception]()

        def visit(number: int) -> None:
            try:
                client = Client(address, verbose=False)
                while not stopped.is_set():
                    run, seed = RUNS[number % 2], 1000 * number + answers[number]
                    asked: list[dict[str, Any]] = [
                        {"run": run, "label": number % 10, "seed": seed, "guidance": 0.0, "api_name": "/sample"},
                        {"run": run, "label": -1, "seed": seed, "tap": "block.2.layer.1", "api_name": "/trace"},
                        {"run": run, "image": handle_file(str(file)), "method": "gradient", "api_name": "/classify"},
                    ]
                    client.predict(**asked[answers[number] % len(asked)])
                    answers[number] += 1
                client.close()
            except Exception as error:
                failures.append(error)

        rows = [_memory_row("before", process, answers)]
        visitors = [threading.Thread(target=visit, args=(number,), daemon=True) for number in range(VISITORS)]
        for one in visitors:
            one.start()
        for minute in range(1, minutes + 1):
            time.sleep(60)
            rows.append(_memory_row(f"minute {minute}", process, answers))
        stopped.set()
        for one in visitors:
            one.join(60)
        if failures:
            raise LabError(f"{len(failures)} visitors got no answer: {failures[0]}")
        time.sleep(60)
        rows.append(_memory_row("a minute after", process, answers))
    table = pd.DataFrame(rows)
    return table.assign(growth_mib=table["rss_mib"].diff(), visitors=VISITORS)


def _memory_row(case: str, process: Any, answers: Sequence[int]) -> dict[str, Any]:
    return {"case": case, "rss_mib": process.memory_info().rss / 2**20, "answers": sum(answers)}


def _repaints(view: Any, slider: str, watched: str, repeats: int) -> list[float]:
    """Seconds from an arrow key, on a page at rest, to the change of what is watched; the keys go to and fro."""
    view.get_by_role("slider", name=slider).first.focus()
    seconds = []
    for turn in range(repeats):
        before = view.locator(watched).inner_text()
        began = time.perf_counter()
        view.keyboard.press("ArrowLeft" if turn % 2 else "ArrowRight")
        view.wait_for_function(
            f"before => document.querySelector('{watched}').innerText != before", arg=before, polling=10, timeout=30_000
        )
        seconds.append(time.perf_counter() - began)
        view.wait_for_timeout(3000)  # charts come after words: at rest again
    return seconds


def _row(case: str, seconds: Sequence[float]) -> dict[str, Any]:
    return {"bench": "page", "case": case, "classes": 10, **spread(seconds), "flow": "digits-reverse beside digits-none"}


@contextlib.contextmanager
def _page(threads: int, device: str) -> Iterator[str]:
    """The address of a page of its own, which has answered once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(bundled("app") / "demo.py"), "--port", str(port), "--device", device]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
                break
            time.sleep(0.05)
        else:
            raise LabError("the page did not start: try python app/demo.py")
        yield address
    finally:
        process.terminate()
        process.wait(20)
