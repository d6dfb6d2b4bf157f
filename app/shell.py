"""What all tabs share: the runs a visitor may use, loaded once, and how errors are shown."""

from collections.abc import Callable
from functools import lru_cache, wraps
from threading import RLock
from typing import Any

import gradio as gr

import rrepa_lab as rl

MODEL = "model"  # concurrency group of every event that computes: one at a time
FIRST, SECOND = "digits-reverse", "digits-none"

lock = RLock()


def run_names() -> list[str]:
    """The runs that can be picked: bundled and local ones, by name; nothing else is ever loaded for a visitor."""
    return [info.name for info in rl.available()]


@lru_cache(maxsize=8)
def _loaded(name: str) -> rl.Run:
    # asked once a run: reading all configurations at every event would be slow
    if name not in run_names():
        raise rl.LabError(f"no run {name!r}; known: {', '.join(run_names())}")
    return rl.load(name)


def get_run(name: str) -> rl.Run:
    """The run of this name, loaded once; LabError for a name that is not offered."""
    with lock:
        return _loaded(name)


def parameters(run: rl.Run) -> str:
    """Size of a flow in words, "0.8 M parameters"."""
    return f"{sum(p.numel() for p in run.flow.parameters()) / 1e6:.1f} M parameters"


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Show a LabError to the visitor as a notice with its advice; compute under the model lock."""

    @wraps(handler)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            with lock:
                return handler(*args, **kwargs)
        except rl.LabError as error:
            raise gr.Error(str(error), title="That did not work", print_exception=False) from None

    return wrapper
