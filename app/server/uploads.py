"""Pictures from outside: only files that were uploaded are read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from server.handlers import notices

from rrepa_lab.data.pictures import check_size, read_picture
from rrepa_lab.errors import LabError


def picture_field(**settings: Any) -> gr.Image:
    """A field for an uploaded picture, whose files are read by `read_picture`: an error of one is a line."""
    field = gr.Image(type="pil", **settings)
    inherited = field.preprocess

    def preprocess(payload: Any) -> Any:
        check_uploaded(payload)
        if payload is None or payload.path is None:
            return inherited(payload)
        with notices():
            try:
                return read_picture(payload.path)
            except LabError as error:
                name = Path(payload.path).name
                raise LabError(str(error).replace(name, payload.orig_name or name)) from None

    field.preprocess = preprocess  # type: ignore[method-assign]
    return field


def only_uploads(field: Any) -> Any:
    """The same component, refusing files that were not uploaded; see `check_uploaded`."""
    inherited = field.preprocess

    def preprocess(payload: Any) -> Any:
        check_uploaded(payload)
        with notices():
            for name in _file_names(payload.model_dump() if hasattr(payload, "model_dump") else payload):
                check_size(Path(name))
        return inherited(payload)

    field.preprocess = preprocess
    return field


def check_uploaded(payload: Any) -> None:
    """gr.Error unless every file that a payload names is a regular file in gradio's upload folder, links followed.

    Gradio checks this only for dictionaries that carry its own `meta` key, which a client may leave out. The message is
    the same for all other files, whether they exist or not.
    """
    root = Path(get_upload_folder()).resolve()
    values = payload.model_dump() if hasattr(payload, "model_dump") else payload
    for name in _file_names(values):
        path = Path(name).resolve() if isinstance(name, str) and "\0" not in name else root
        if root not in path.parents or not path.is_file():
            raise gr.Error("The picture must be uploaded to this page.", title="That did not work", print_exception=False)


def _file_names(values: Any) -> Iterator[Any]:
    """The path of every file that a payload names; None for one that has an address alone."""
    if isinstance(values, dict):
        if values.get("path") is not None or values.get("url") is not None:
            yield values.get("path")
        values = list(values.values())
    for value in values if isinstance(values, list | tuple) else ():
        yield from _file_names(value)
