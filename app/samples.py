"""Samples of two runs on the same seeds: classes, guidance, temperature, denoising, and how they are decoded."""

import io
import json
import sys
import time
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import gradio as gr
import torch
from frame import Bar, Code, Panel, serve
from PIL import Image
from shell import FIRST, QUIET, class_choices, computes, get_run, keep_file, label_of, pair, parameters
from torch import Tensor

import rrepa_lab as rl
from rrepa_lab.flow.decode.engine import METHODS
from rrepa_lab.viz.images import encoded, grid, picture

NAME, TITLE = "samples", "Samples"
EVERY = "every class"
SHEET = 560  # pixels across, about
BREATH = 0.2  # seconds between two looks at a sheet that is being filled
SAVE_ZIP = "() => document.querySelector('#samples-file').click()"  # a browser saves what a click asks for


class Drawn(NamedTuple):
    """A row of a sheet: the images of one label."""

    images: Tensor  # (count, C, H, W) in [-1, 1]
    seconds: float
    error: float  # largest difference of a number from the noise it came from, encoded again (before the last step)
    finish: str  # what the last step was


@lru_cache(maxsize=512)
def row(
    run: rl.Run, label: int, seed: int, count: int, guidance: float, temperature: float, denoise: bool, method: str
) -> Drawn:
    """`count` samples of a label with seeds from `seed` on."""
    if label < 0:
        guidance, temperature = 0.0, 1.0  # both need a label
    began = time.perf_counter()
    made = rl.sample(run, range(seed, seed + count), label, guidance, temperature=temperature, denoise=denoise, method=method)
    seconds = time.perf_counter() - began
    flow, generated = run.flow, made.path[-2 if denoise else -1]
    y = made.labels.to(run.device) if flow.config.classes else None
    with torch.no_grad():
        again = flow(generated, y, (), guidance, False, temperature).z
    error = float((flow.images(again) - made.path[0]).abs().max())
    return Drawn(made.images.cpu(), seconds, error, made.finish)


def labels_of(choice: str, run: rl.Run) -> list[int]:
    """The labels of a sheet, a row each."""
    return list(range(len(run.classes))) if choice == EVERY and run.flow.config.classes else [label_of(choice, run)]


def sheet(rows: list[Drawn], total: int) -> Image.Image:
    """The rows there are, and room for those to come."""
    images = torch.cat([drawn.images for drawn in rows])
    count = len(rows[0].images)
    room = images.new_zeros(((total - len(rows)) * count, *images.shape[1:]))
    return grid(torch.cat([images, room]), columns=count, scale=max(1, SHEET // (count * images.shape[-1])))


def draw(
    run: str, other: str, seed: int, choice: str, count: int, guidance: float, temperature: float, denoise: bool, method: str
) -> Iterator[tuple[Any, ...]]:
    """The sheets of both runs and what they are, again and again while they fill."""
    runs, count = pair(run, other), int(count)
    wanted = {name: labels_of(choice, one) for name, one in runs.items()}
    rows: dict[str, list[Drawn]] = {name: [] for name in runs}
    shown = 0.0
    for turn in range(max(map(len, wanted.values()))):
        for name, one in runs.items():
            if turn < len(wanted[name]):
                rows[name].append(row(one, wanted[name][turn], seed, count, guidance, temperature, denoise, method))
        done = all(len(rows[name]) == len(wanted[name]) for name in runs)
        if done or time.perf_counter() - shown > BREATH:
            shown = time.perf_counter()
            yield _view(runs, rows, wanted, choice, seed, guidance, temperature, denoise, method)


def _view(
    runs: dict[str, rl.Run], rows: dict[str, list[Drawn]], wanted: dict[str, list[int]], choice: str, seed: int,
    guidance: float, temperature: float, denoise: bool, method: str,
) -> tuple[Any, ...]:  # fmt: skip
    sheets, costs = [], []
    for name, drawn in rows.items():
        count = len(drawn[0].images)
        what = _words(choice, runs[name])
        alt = f"{len(drawn) * count} samples of {what} from {name}"
        sheets.append((f"**{name}**", gr.update(value=sheet(drawn, len(wanted[name])), alt_text=alt, visible=True)))
        seconds, error = sum(part.seconds for part in drawn), max(part.error for part in drawn)
        costs.append(f"{name} {seconds:.2f} s, back at its noise within {error:.1e}")
    name, one = next(iter(runs.items()))
    count = len(rows[name][0].images)
    asked = "rows are classes in order" if len(wanted[name]) > 1 else _words(choice, one)
    caption = (
        f"{asked}, columns are seeds {seed} to {seed + count - 1}, guidance {guidance:g}, temperature {temperature:g}, "
        f"{rows[name][0].finish}. Decoding ({method}, {one.device.type.upper()}): {'; '.join(costs)}. "
        f"Demo size: a flow of {parameters(one)} on {one.flow.config.image_size}x{one.flow.config.image_size} "
        f"{one.config.data.name}."
    )
    second = sheets[1] if len(sheets) > 1 else ("", gr.update(visible=False))
    return *sheets[0], *second, caption[0].upper() + caption[1:]


def _words(choice: str, run: rl.Run) -> str:
    if choice == EVERY and run.flow.config.classes:
        return EVERY
    return f"class {choice}" if label_of(choice, run) >= 0 else "no label"


def code(
    run: str, other: str, seed: int, choice: str, count: int, guidance: float, temperature: float, denoise: bool, method: str
) -> Code:
    """The samples of the first run."""
    labels, last = labels_of(choice, get_run(run)), seed + int(count) - 1
    asked = "" if labels == [-1] else f" --labels {labels[0]}..{labels[-1]}" if len(labels) > 1 else f" --labels {labels[0]}"
    shell = (
        f"rrepa-lab sample {run}{asked} --seeds {seed}..{last} --guidance {guidance:g} --temperature {temperature:g} "
        f"--method {method}{'' if denoise else ' --no-denoise'} --out grid.png"
    )
    python = (
        f'import rrepa_lab as rl\n\nrun = rl.load("{run}")\nlabels, seeds = {labels}, range({seed}, {last + 1})\n'
        f"s = rl.sample(\n    run, [seed for _ in labels for seed in seeds], [label for label in labels for _ in seeds], "
        f'{guidance:g},\n    temperature={temperature:g}, denoise={denoise}, method="{method}",\n)\n'
        "s.images  # (B, C, H, W) in [-1, 1]; s.path holds the way there"
    )
    return Code(shell, python)


@computes
def pack(run: str, other: str, seed: int, *controls: Any) -> str:
    """A zip of every image on the page as a PNG, the sheets, and metadata.json; returns its path."""
    choice, count, guidance, temperature, denoise, method = controls
    settings = {"guidance": guidance, "temperature": temperature, "denoise": denoise, "method": method}
    stream = io.BytesIO()
    about: dict[str, Any] = {"rrepa_lab": rl.__version__, **settings, "code": code(run, other, seed, *controls).python}
    about["images"] = []
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, one in pair(run, other).items():
            labels = labels_of(choice, one)
            rows = [row(one, label, seed, int(count), **settings) for label in labels]
            archive.writestr(f"{name}.png", encoded(grid(torch.cat([part.images for part in rows]), columns=int(count))))
            for label, part in zip(labels, rows, strict=True):
                for step, image in enumerate(part.images):
                    file = f"{name}/label{'-none' if label < 0 else f'-{label}'}-seed-{seed + step}.png"
                    archive.writestr(file, encoded(picture(image)))
                    facts = {"file": file, "run": name, "step": one.step, "label": label, "seed": seed + step}
                    about["images"].append(facts)
        archive.writestr("metadata.json", json.dumps(about, indent=2))
    return keep_file("samples.zip", stream.getvalue())


def fit(run: rl.Run, choice: str, *_rest: Any) -> dict[str, Any]:
    """The classes of another run."""
    choices = [EVERY, *class_choices(run)]
    return {"class": gr.Dropdown(choices=choices, value=choice if choice in choices else choices[0])}


def build(bar: Bar) -> Panel:
    """The tab."""
    gr.Markdown("The same noise, sent through two flows. **What does alignment change in the samples?**")
    with gr.Row():
        choice = gr.Dropdown([EVERY, *class_choices(get_run(FIRST))], value=EVERY, label="Class", info="what is asked of both")
        count = gr.Slider(1, 16, 8, step=1, label="Samples a row", info="seeds count up from the seed of the sidebar")
        guidance = gr.Slider(
            0, 5, 0.0, step=0.1, label="Guidance", info="0 is none and scores best on digits; more exaggerates the class"
        )
    with gr.Row():
        temperature = gr.Slider(0.2, 2, 1.0, step=0.1, label="Temperature", info="of the unconditional branch, under guidance")
        denoise = gr.Checkbox(True, label="Denoise", info="one step along the score removes the training noise")
        method = gr.Dropdown(list(METHODS), value="auto", label="Decoding", info="all give the same images")
    sheets: list[Any] = []
    with gr.Row():
        for place in ("sheet", "sheet-other"):
            with gr.Column(min_width=260):
                sheets += [
                    gr.Markdown(elem_id=f"{place}-name"),
                    gr.Image(
                        format="png", type="pil", interactive=False, buttons=["download", "fullscreen"], show_label=False,
                        label="Samples", elem_id=place,
                    ),
                ]  # fmt: skip
    note = gr.Markdown(elem_id="samples-note")
    with gr.Row():
        zipped = gr.Button("Download all as zip", size="sm", scale=0, min_width=200)
        stop = gr.Button("Stop", size="sm", scale=0, min_width=100)
    file = gr.DownloadButton(elem_classes="unseen", elem_id="samples-file")
    controls = {
        "class": choice, "count": count, "guidance": guidance, "temperature": temperature, "denoise": denoise, "method": method,
    }  # fmt: skip
    packed = zipped.click(pack, [bar.run, bar.other, bar.seed, *controls.values()], file, **QUIET)
    packed.success(None, js=SAVE_ZIP)
    return Panel(controls, [*sheets, note], draw, code, fit, stop=stop, slow=True)


if __name__ == "__main__":
    serve([sys.modules[__name__]])
