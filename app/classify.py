"""The class of a digit read off two flows: one gradient step, or Bayes' rule, without a classifier."""

from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from shell import FIRST, MODEL, SECOND, get_run, run_names, told
from torch import Tensor

import rrepa_lab as rl
from rrepa_lab.data.pixels import from_drawing, from_picture
from rrepa_lab.viz.classes import class_scores
from rrepa_lab.viz.images import picture

METHODS = {"one gradient step": "gradient", "twenty steps": "iterated", "Bayes' rule": "bayes"}
Seen = tuple[list[Any], str]  # an image as nested lists, and where it came from: what a visitor's session keeps


def test_digit(name: str, index: int) -> Seen:
    """Image `index` of the run's test split."""
    x, y = get_run(name).data("test")
    row = int(index) % len(x)
    return x[row].tolist(), f"test image {row}, a {get_run(name).classes[int(y[row])]}"


def drawing(name: str, editor: dict[str, Any] | None) -> Seen:
    """What was drawn on the sketchpad: the opacity of its layers is the ink."""
    layers = [layer for layer in (editor or {}).get("layers") or [] if layer is not None]
    ink = np.max([np.asarray(layer)[..., 3] for layer in layers], axis=0) / 255 if layers else np.zeros((8, 8))
    return _fitting(name, from_drawing(ink.astype(np.float32), get_run(name).flow.config.image_size)), "your drawing"


def upload(name: str, image: Image.Image | None) -> Seen:
    """An uploaded picture; a dark digit on light ground is turned over, as the training digits are light on dark."""
    if image is None:
        raise rl.LabError("no picture yet: drop one on the field")
    config = get_run(name).flow.config
    x = from_picture(image, config.channels, config.image_size)
    turned = config.channels == 1 and _border(x) > 0
    return _fitting(name, -x if turned else x), "your picture" + (", turned to light on dark" if turned else "")


def _border(x: Tensor) -> float:
    edges = [x[..., 0, :], x[..., -1, :], x[..., :, 0], x[..., :, -1]]
    return float(torch.cat([edge.flatten() for edge in edges]).mean())


def _fitting(name: str, x: Tensor) -> list[Any]:
    get_run(name).flow.tokenize(x)  # an error here names both shapes
    return x[0].tolist()


@told
def judge(first: str, second: str, method: str, seen: Seen) -> tuple[Image.Image, Any, str]:
    """What the flow sees, the bars, and the verdicts in words."""
    x = torch.tensor(seen[0])[None]
    results = {name: rl.classify(get_run(name), x, METHODS[method]) for name in dict.fromkeys((first, second))}
    lines, unit = [], "logits" if METHODS[method] == "iterated" else "nats"
    for name, result in results.items():
        best, next_best = (get_run(name).classes[int(k)] for k in result.top(2).labels[0])
        lines.append(f"- **{name}** says **{best}**, by {float(result.margin[0]):.2f} {unit} before {next_best}")
    figure = class_scores(results, get_run(first).classes, METHODS[method], what=seen[1])
    return picture(x[0], scale=max(1, 160 // x.shape[-1])), figure, "\n".join([f"Looking at {seen[1]}.", *lines])


def build() -> gr.Blocks:
    """The tab, filled with a test digit."""
    begin = test_digit(FIRST, 3)
    view, figure, verdict = judge(FIRST, SECOND, next(iter(METHODS)), begin)
    with gr.Blocks() as tab:
        gr.Markdown(
            "No classifier was trained. **Which label would have made this image more likely?** "
            "The flow is asked once, and the gradient answers for all classes."
        )
        seen = gr.State(begin)
        with gr.Row():
            with gr.Column(min_width=300):
                first = gr.Dropdown(run_names(), value=FIRST, label="Run")
                second = gr.Dropdown(run_names(), value=SECOND, label="Compare with")
                method = gr.Radio(
                    list(METHODS), value=next(iter(METHODS)), label="Method", info="one pass, twenty, or one for each class"
                )
                with gr.Tabs():
                    with gr.Tab("Test digit"):
                        index = gr.Slider(0, 359, 3, step=1, label="Test image", info="none of them was trained on")
                    with gr.Tab("Draw"):
                        pad = gr.Sketchpad(
                            show_label=False, placeholder="Take the pencil on the left, then draw a digit",
                            canvas_size=(280, 280), fixed_canvas=True, height=400, layers=False,
                            brush=gr.Brush(default_size=24, colors=["#000000"], color_mode="fixed"), elem_id="pad",
                        )  # fmt: skip
                        ask = gr.Button("Classify the drawing", variant="primary")
                    with gr.Tab("Upload"):
                        file = gr.Image(
                            type="pil",
                            image_mode="RGB",
                            sources=["upload", "clipboard"],
                            label="Picture of one digit",
                            height=240,
                        )
            with gr.Column(scale=2, min_width=300):
                with gr.Row():
                    shown = gr.Image(
                        view, alt_text="What the flow sees: the image at the flow's own size", format="png", show_label=False,
                        interactive=False, height=190, width=190, min_width=190, scale=0, buttons=[],
                    )  # fmt: skip
                    said = gr.Markdown(verdict, elem_id="verdict")
                plot = gr.Plot(figure, label="Scores", show_label=False)
        outputs = [shown, plot, said]
        quiet: dict[str, Any] = {"concurrency_id": MODEL, "api_visibility": "private", "show_progress": "hidden"}
        for event, take, source in (
            (index.change, test_digit, index), (ask.click, drawing, pad), (file.change, upload, file),
        ):  # fmt: skip
            taken = event(told(take), [first, source], seen, trigger_mode="always_last", **quiet)
            taken.success(judge, [first, second, method, seen], outputs, **quiet)
        gr.on([first.change, second.change, method.change], judge, [first, second, method, seen], outputs, **quiet)
    return tab
