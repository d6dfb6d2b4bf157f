"""Endpoints for programs: typed by components nobody sees, so that files are checked as on the page."""

from typing import Any

import gradio as gr
from PIL import Image
from shell import FIRST, MODEL, get_run, run_names, told

import rrepa_lab as rl
from rrepa_lab.data.pixels import from_picture
from rrepa_lab.viz.images import picture


@told
def sample(run: str, label: int, seed: int, guidance: float) -> tuple[Image.Image, dict[str, Any]]:
    """One denoised sample of a run, as a picture (each pixel eight wide), and what it is with its values in [-1, 1], (C, H, W).

    label: class from 0, or -1 for none. seed: >= 0; the same seed gives the same image. guidance: >= 0.
    """
    made = rl.sample(get_run(run), [int(seed)], int(label), guidance)
    facts = {"run": run, "label": int(label), "seed": int(seed), "guidance": guidance, "values": made.images[0].tolist()}
    return picture(made.images[0], scale=8), facts


@told
def classify(run: str, image: Image.Image | None, method: str) -> dict[str, Any]:
    """Class scores of a picture: its centre square, averaged down to the flow's size, light on dark as it comes.

    method: "gradient" (d log p / d logit, nats), "bayes" (log posterior, nats) or "iterated" (logits after gradient ascent).
    """
    if image is None:
        raise rl.LabError("no image given")
    loaded = get_run(run)
    config = loaded.flow.config
    result = rl.classify(loaded, from_picture(image, config.channels, config.image_size), method)
    scores = dict(zip(loaded.classes, result.scores[0].tolist(), strict=True))
    return {"run": run, "method": method, "label": loaded.classes[int(result.label[0])], "scores": scores}


def build() -> None:
    """Add the endpoints to the page that is being composed."""
    with gr.Column(visible=False):
        run = gr.Dropdown(run_names(), value=FIRST, label="run")
        label = gr.Number(3, precision=0, minimum=-1, label="label")
        seed = gr.Number(0, precision=0, minimum=0, label="seed")
        guidance = gr.Number(2.0, minimum=0, label="guidance")
        image = gr.Image(type="pil", image_mode="RGB", label="image")
        method = gr.Radio(["gradient", "bayes", "iterated"], value="gradient", label="method")
        drawn, facts = gr.Image(format="png", label="image"), gr.JSON(label="facts")
        scores = gr.JSON(label="scores")
        gr.Button().click(sample, [run, label, seed, guidance], [drawn, facts], api_name="sample", concurrency_id=MODEL)
        gr.Button().click(classify, [run, image, method], scores, api_name="classify", concurrency_id=MODEL)
