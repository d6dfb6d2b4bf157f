"""UMAPs, fitted in the background while the maps by PCA are shown."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import gradio as gr
from server.handlers import model_lock, show_errors
from tabs.map.data import submit_umap, umap_of
from tabs.map.view import FeatureMapView, map_views

from rrepa_lab.errors import LabError

POLL_SECONDS = 0.5  # between two reports of a fit


@show_errors
def fit_umaps(missing: FeatureMapView | None) -> Iterator[tuple[Any, ...]]:
    """Fit the UMAPs that a drawing found missing; yields (line, status, Stop, Compute, the view fitted) while it goes on."""
    if missing is None:
        yield gr.update(visible=False), "", gr.skip(), gr.skip(), gr.skip()
        return
    settings = missing.neighbours, missing.distance
    fits: list[Future[None]] = []
    try:
        with model_lock:
            fits += [submit_umap(one, *settings) for one in map_views(missing) if umap_of(one, *settings) is None]
        began = time.monotonic()
        while not all(fit.done() for fit in fits):
            seconds = time.monotonic() - began
            status = f"UMAP is being fitted, {seconds:.0f} s so far: 10 to 30 s the first time, about a second later on."
            yield *_status(status, stop=True), gr.skip()
            time.sleep(POLL_SECONDS)
        for fit in fits:
            fit.result()
    except LabError:
        yield *_status("UMAP could not be fitted: these are maps by PCA."), gr.skip()
        raise
    finally:
        for fit in fits:
            fit.cancel()
    yield gr.update(visible=False), "", gr.skip(), gr.skip(), missing


def stopped() -> tuple[Any, ...]:
    """The status line after Stop."""
    return _status("Stopped: these are maps by PCA.")


def _status(text: str, stop: bool = False) -> tuple[Any, ...]:
    return gr.update(visible=True), text, gr.update(visible=stop), gr.update(visible=not stop)
