"""Endpoints for programs: `gradio_client.Client(address).predict(..., api_name="/sample")`; with --mcp they are tools as well.

Their arguments are typed by hidden components, so that they are checked as on the page.
"""

from typing import Any

import gradio as gr
import torch
from PIL import Image
from server.handlers import show_errors, with_model_lock
from server.runs import DEFAULT_RUN, get_run
from server.settings import LARGEST_SEED, MODEL_QUEUE
from server.uploads import picture_field

import rrepa_lab as rl
from rrepa_lab.data.prepare import prepare
from rrepa_lab.errors import LabError
from rrepa_lab.flow.taps import Tap
from rrepa_lab.sampling.sample import noise
from rrepa_lab.viz.images import grid, picture


@show_errors
def runs() -> list[dict[str, str]]:
    """List the runs that the other endpoints accept.

    Returns:
        for each its name, alignment strategy, data set and a summary
    """
    return [{"name": i.name, "strategy": i.strategy, "data": i.data, "summary": i.summary} for i in rl.available()]


@with_model_lock
def sample(run: str, label: int, seed: int, guidance: float) -> tuple[Image.Image, dict[str, Any]]:
    """Draw one denoised image from a flow; the same arguments give the same image.

    Args:
        run: name of a run, see /runs
        label: class from 0 on, or -1 for none
        seed: of the noise, 0 or above
        guidance: classifier-free guidance weight, 0 for none

    Returns:
        the picture, each pixel eight wide, and what it is with its values in [-1, 1], (C, H, W)
    """
    label, seed = _whole("label", label), _whole("seed", seed)
    made = rl.sample(get_run(run), [seed], label, guidance)
    facts = {"run": run, "label": label, "seed": seed, "guidance": guidance, "values": made.images[0].tolist()}
    return picture(made.images[0], scale=8), facts


@with_model_lock
def classify(run: str, image: Image.Image | None, method: str) -> dict[str, Any]:
    """Predict the class of a picture with a flow, without a classifier.

    Args:
        run: name of a run, see /runs
        image: its centre square is averaged down to the flow's size; a digit is also cropped to its ink, light on dark
        method: "gradient" (d log p / d logit, nats), "bayes" (log posterior, nats) or "iterated" (logits after ascent)

    Returns:
        the label, the scores of all classes, and what was done to the picture ("" if it was only averaged down)
    """
    if image is None:
        raise LabError("no image given")
    loaded = get_run(run)
    x, how = prepare(image, loaded.config.data)
    result = rl.classify(loaded, x.to(loaded.device), method)
    scores = dict(zip(loaded.classes, result.scores[0].tolist(), strict=True))
    label = loaded.classes[int(result.label[0])]
    return {"run": run, "method": method, "label": label, "scores": scores, "prepared": how}


@with_model_lock
def trace(run: str, seed: int, label: int, tap: str) -> tuple[Image.Image, dict[str, Any]]:
    """Decode noise to an image block by block, and return an inner state.

    Args:
        run: name of a run, see /runs
        seed: of the noise, 0 or above
        label: class from 0 on, or -1 for none
        tap: address of the state, block.<t>.layer.<l>, block.<t>.in or block.<t>.out, blocks and layers from 1

    Returns:
        the stages from the noise to the image in a row, and the state (T, D) with its module path and the round-trip error
    """
    loaded, label, seed = get_run(run), _whole("label", label), _whole("seed", seed)
    if seed < 0:
        raise LabError(f"seed must be 0 or above, not {seed}")
    name = Tap.parse(tap).name
    made = rl.trace(loaded, noise(loaded.flow, [seed]), label if loaded.flow.config.classes else None, "reverse", name)
    facts = {
        "run": run, "seed": seed, "label": label, "tap": name, "module_path": Tap.parse(name).module_path,
        "error": float(made.error[0]), "state": made.states[name][0].tolist(),
    }  # fmt: skip
    stages = torch.cat(list(made.images.values()))
    return grid(stages, columns=len(stages)), facts


def _whole(what: str, number: float | None) -> int:
    if number is None or int(number) != number:
        raise LabError(f"{what} must be a whole number, not {number}")
    return int(number)


def build() -> None:
    """Add the endpoints to the page that is being composed."""
    with gr.Column(visible=False):
        run = gr.Textbox(DEFAULT_RUN, label="run", max_length=200)
        label = gr.Number(3, minimum=-1, label="label")
        seed = gr.Number(0, minimum=0, maximum=LARGEST_SEED, label="seed")
        guidance = gr.Number(0.0, minimum=0, maximum=100, label="guidance")
        image = picture_field(label="image")
        method = gr.Textbox("gradient", label="method", max_length=20)
        tap = gr.Textbox("block.3.layer.2", label="tap", max_length=40)
        drawn, stages = (gr.Image(format="png", label="image") for _ in range(2))
        facts, scores, states, listed = (gr.JSON(label=name) for name in ("facts", "scores", "facts", "runs"))
        serve: dict[str, Any] = {"concurrency_id": MODEL_QUEUE}
        gr.Button().click(runs, None, listed, api_name="runs", **serve)
        gr.Button().click(sample, [run, label, seed, guidance], [drawn, facts], api_name="sample", **serve)
        gr.Button().click(classify, [run, image, method], scores, api_name="classify", **serve)
        gr.Button().click(trace, [run, seed, label, tap], [stages, states], api_name="trace", **serve)
