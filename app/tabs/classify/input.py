"""The image that Classify reads: a test image, a drawing or an uploaded picture."""

from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import torch
from page.panels import Tab
from page.scripts import script
from PIL import Image
from server.handlers import with_model_lock
from server.runs import N_TEST_IMAGES, get_run, image_word, test_images
from server.settings import PRIVATE_MODEL
from server.uploads import only_uploads, picture_field
from torch import Tensor

from rrepa_lab.data.pixels import from_drawing
from rrepa_lab.data.prepare import prepare
from rrepa_lab.errors import LabError

NOT_TRAINED_ON = "none of them was trained on"  # of the test images


class OwnPicture(NamedTuple):
    """What a visitor drew or uploaded, kept in the session of the page."""

    values: list[Any]  # (C, H, W) in [-1, 1], as nested lists
    source: str  # where it came from
    test_image: int  # the test image that was chosen when it came: choosing another one replaces it


class Subject(NamedTuple):
    """The image that is classified."""

    x: Tensor  # (1, C, H, W) in [-1, 1], on the CPU
    name: str
    label: int | None  # its class, if that is known


def from_pad(run: str, index: int, editor: dict[str, Any] | None) -> OwnPicture | None:
    """What was drawn on the sketchpad: the opacity of its layers is the ink. None, the test image, for an empty pad."""
    layers = [layer for layer in (editor or {}).get("layers") or [] if layer is not None]
    ink = np.max([np.asarray(layer)[..., 3] for layer in layers], axis=0) / 255 if layers else np.zeros((8, 8))
    if not ink.any():
        return None
    x = from_drawing(ink.astype(np.float32), get_run(run).config.data.image_size)
    return OwnPicture(_values_for(run, x), "your drawing", int(index))


def from_upload(run: str, index: int, image: Image.Image | None) -> OwnPicture:
    """An uploaded picture, prepared as the command line and the endpoint do; LabError without one."""
    if image is None:
        raise LabError("no picture yet: drop one on the field")
    x, preparation = prepare(image, get_run(run).config.data)
    return OwnPicture(_values_for(run, x), "your picture" + (f", {preparation}" if preparation else ""), int(index))


def _values_for(run: str, x: Tensor) -> list[Any]:
    shape, wanted = tuple(x.shape[1:]), get_run(run).config.frame.picture
    if shape != wanted:
        raise LabError(f"{run} takes pictures of {_shape_text(wanted)}, not of {_shape_text(shape)}: upload a picture instead")
    return x[0].tolist()


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def subject_of(name: str, index: int, picture: OwnPicture | None) -> Subject:
    """The image to be classified by a run: the visitor's own since the test image was chosen, or that test image."""
    if picture is not None and picture.test_image == index:
        return Subject(torch.tensor(picture.values)[None], picture.source, None)
    run = get_run(name)
    x, y = test_images(run)
    row = index % len(x)
    label = int(y[row])
    return Subject(x[row : row + 1].cpu(), f"{image_word(run)} {row}, class {run.classes[label]}", label)


# --- controls ---------------------------------------------------------------------------------------------------------


def build_input(index: int) -> tuple[dict[str, Any], gr.HTML, gr.Markdown, gr.Markdown]:
    """The components that give an image, and the outputs beside them.

    Args:
        index: the test image that is chosen at first.

    Returns: the components by name: index, picture, pad_tab, pad, upload; then the image, the verdict, and that of Bayes' rule.
    """
    with gr.Row():
        with gr.Column(min_width=300), gr.Tabs():
            with gr.Tab("Test image"):
                slider = gr.Slider(
                    0, N_TEST_IMAGES - 1, index, step=1, label="Test image", info=NOT_TRAINED_ON,
                    elem_id="index",
                )  # fmt: skip
            with gr.Tab("Draw") as pad_tab:
                gr.Markdown("For runs of digits: draw one with the mouse or a finger; it is classified after every stroke.")
                pad = only_uploads(gr.Sketchpad(
                    show_label=False, canvas_size=(280, 280), fixed_canvas=True, height=360, layers=False, transforms=(),
                    buttons=[], brush=gr.Brush(default_size=24, colors=["#000000"], color_mode="fixed"), elem_id="pad",
                ))  # fmt: skip
            with gr.Tab("Upload"):
                upload = picture_field(sources=["upload", "clipboard"], label="Picture", height=240)
        with gr.Column(scale=2, min_width=300), gr.Row():
            shown = gr.HTML(elem_id="seen", min_height=150)
            with gr.Column(min_width=200):
                verdict = gr.Markdown(elem_id="verdict")
                bayes_line = gr.Markdown(elem_id="verdict-bayes")
    entry = {"index": slider, "picture": gr.State(None), "pad_tab": pad_tab, "pad": pad, "upload": upload}
    return entry, shown, verdict, bayes_line


def connect_input(tab: Tab, entry: dict[str, Any]) -> None:
    """Keep a drawing or an uploaded picture in the session."""
    entry["pad_tab"].select(None, js=script("select_brush"))
    for event, read, source in (
        (entry["pad"].change, from_pad, entry["pad"]), (entry["upload"].upload, from_upload, entry["upload"]),
    ):  # fmt: skip
        event(
            with_model_lock(read), [tab.sidebar.run, entry["index"], source], entry["picture"],
            trigger_mode="always_last", **PRIVATE_MODEL,
        )  # fmt: skip
