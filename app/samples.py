"""Samples of a class from two runs, on the same noise."""

import time
from typing import Any

import gradio as gr
from PIL import Image
from shell import FIRST, MODEL, SECOND, get_run, parameters, run_names, told

import rrepa_lab as rl
from rrepa_lab.viz.images import grid

COUNT = 16


def draw(name: str, label: int, seed: int, guidance: float, denoise: bool) -> tuple[Image.Image, float]:
    """COUNT samples with seeds from `seed` on, as one picture, and the seconds they took; label -1 is no label."""
    run = get_run(name)
    began = time.perf_counter()
    made = rl.sample(run, range(int(seed), int(seed) + COUNT), label, guidance, denoise=denoise)
    seconds = time.perf_counter() - began
    return grid(made.images, scale=max(1, 80 // run.flow.config.image_size)), seconds


def sheets(
    first: str, second: str, choice: int, seed: int, guidance: float, denoise: bool
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Picture, label and alt text for each run, and a caption; `choice` 0 is no label, k is class k - 1."""
    label = choice - 1
    what = "any class" if label < 0 else f"class {get_run(first).classes[label]}"
    views, notes = [], []
    for name in (first, second):
        sheet, seconds = draw(name, label, seed, guidance, denoise)
        views.append({"value": sheet, "label": name, "alt_text": f"{COUNT} samples of {what} from {name}"})
        notes.append(f"{name} {seconds:.2f} s")
    flow = get_run(first)
    caption = (
        f"{COUNT} samples a run, {what}, seeds {int(seed)} to {int(seed) + COUNT - 1} in reading order, guidance {guidance:g}, "
        f"{'denoised' if denoise else 'as generated'}. Decoding on the CPU: {', '.join(notes)}. "
        f"Demo size: a flow of {parameters(flow)} on {flow.config.data.name}."
    )
    return views[0], views[1], caption


@told
def compare(*controls: Any) -> tuple[gr.Image, gr.Image, str]:
    """What `sheets` gives, as updates of the page."""
    left, right, caption = sheets(*controls)
    return gr.Image(**left), gr.Image(**right), caption


def _choices(name: str) -> list[str]:
    return ["any (no label)", *get_run(name).classes]


def build() -> gr.Blocks:
    """The tab, filled with samples."""
    defaults = (4, 0, 2.0, True)
    left, right, caption = sheets(FIRST, SECOND, *defaults)
    with gr.Blocks() as tab:
        gr.Markdown("The same noise, sent through two flows. **What does alignment change in the samples?**")
        with gr.Row():
            first = gr.Dropdown(run_names(), value=FIRST, label="Run", info="drawn on the left")
            second = gr.Dropdown(run_names(), value=SECOND, label="Compare with", info="drawn on the right")
            label = gr.Dropdown(
                _choices(FIRST), value=_choices(FIRST)[defaults[0]], type="index", label="Class", info="asked of both"
            )
        with gr.Row():
            seed = gr.Slider(0, 9999, defaults[1], step=1, label="First seed", info="each image has a seed of its own")
            guidance = gr.Slider(
                0, 5, defaults[2], step=0.1, label="Guidance", info="0 is none; more is cleaner and more alike"
            )
            denoise = gr.Checkbox(defaults[3], label="Denoise", info="one step along the score removes the training noise")
        with gr.Row():
            pictures = [
                gr.Image(**view, format="png", interactive=False, height=450, buttons=["download"]) for view in (left, right)
            ]
        note = gr.Markdown(caption, elem_id="samples-note")
        controls: list[Any] = [first, second, label, seed, guidance, denoise]
        gr.on(
            [control.change for control in controls], compare, controls, [*pictures, note],
            trigger_mode="always_last", concurrency_id=MODEL, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    return tab
