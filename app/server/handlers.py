"""The model lock, and errors as notices."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import Any

import gradio as gr

from rrepa_lab.errors import LabError
from rrepa_lab.paths import assets, runs_root

model_lock = RLock()


@contextmanager
def notices() -> Iterator[None]:
    """A LabError inside is shown to the visitor with its advice."""
    try:
        yield
    except LabError as error:
        raise gr.Error(without_folders(error), title="That did not work", print_exception=False) from None


def report_error(error: LabError) -> None:
    """Show an error as a notice, from a handler that goes on; `notices` is for handlers that end with it."""
    gr.Warning(without_folders(error), title="That did not work")


def without_folders(error: LabError | str) -> str:
    """A message with runs by name: visitors do not learn where they are on this machine."""
    text = str(error)
    for root in (runs_root().resolve(), assets() / "runs", assets()):
        text = text.replace(f"{root}/", "")
    return text


def show_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Show a LabError of a handler as a notice; generators too."""
    if not inspect.isgeneratorfunction(handler):
        return notices()(handler)

    @wraps(handler)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with notices():
            yield from handler(*args, **kwargs)

    return wrapper


def with_model_lock(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`show_errors`, under the model lock; a generator holds it from one value to the next, not while a value is shown."""

    @wraps(handler)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with model_lock:
            return handler(*args, **kwargs)

    @wraps(handler)
    def generator(*args: Any, **kwargs: Any) -> Any:
        values = handler(*args, **kwargs)
        end = object()
        try:
            while True:
                with model_lock:
                    value = next(values, end)
                if value is end:
                    return
                yield value
        finally:
            values.close()

    return show_errors(generator if inspect.isgeneratorfunction(handler) else wrapper)
