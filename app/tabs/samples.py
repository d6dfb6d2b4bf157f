"""Samples of two runs on the same seeds: classes, guidance, temperature, denoising, and the decoding method."""

import io
import json
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import gradio as gr
import torch
from page.panels import Code, Panel, Sidebar, Tab
from page.scripts import script
from page.views import View, linked_as
from PIL import Image
from server.downloads import keep_file
from server.handlers import with_model_lock
from server.runs import DEFAULT_RUN, by_run, class_choices, get_run, label_of, latents_text, pair, parameters
from server.settings import PRIVATE_MODEL
from torch import Tensor

import rrepa_lab as rl
from rrepa_lab.flow.decode.plan import METHODS
from rrepa_lab.viz.images import encoded, grid, picture

NAME, TITLE = "samples", "Samples"
ALL_CLASSES = "every class"
GRID_PIXELS = 560  # width of a grid, about
MAX_ROWS = 20  # classes in a grid: of many classes the first
POLL_SECONDS = 0.2  # between two views of a grid that is being filled


@dataclass(frozen=True)
class SamplesView(View):
    """What the tab shows."""

    choice: str = field(default=ALL_CLASSES, metadata=linked_as("class"))
    count: int = 8  # samples a row, with seeds from `seed` on
    guidance: float = 0.0
    temperature: float = 1.0
    denoise: bool = True
    method: str = "auto"


class Row(NamedTuple):
    """A row of a grid: the samples of one label."""

    images: Tensor  # (count, C, H, W) in [-1, 1]
    seconds: float
    error: float  # largest difference of a value from the noise it came from, encoded again (before the last step)
    finish: str  # what the last step was


def row_of(run: rl.Run, label: int, view: SamplesView) -> Row:
    """The samples of a label."""
    guided = label >= 0  # guidance and its temperature need a label
    guidance = rl.Guidance(view.guidance, temperature=view.temperature) if guided else rl.Guidance()
    return _row(run, label, range(view.seed, view.seed + view.count), guidance, view.denoise, view.method)


@lru_cache(maxsize=512)
def _row(run: rl.Run, label: int, seeds: range, guidance: rl.Guidance, denoise: bool, method: str) -> Row:
    began = time.perf_counter()
    made = rl.sample(run, seeds, label, guidance, denoise=denoise, method=method)
    seconds = time.perf_counter() - began
    flow, generated = run.flow, made.x[-1]
    y = made.labels.to(run.device) if flow.config.classes else None
    with torch.no_grad():
        again = flow(generated, flow.condition(y, len(generated), guidance)).z
    error = float((flow.untokenize(again) - made.x[0]).abs().max())
    return Row(made.images.cpu(), seconds, error, made.finish)


def labels_of(choice: str, run: rl.Run) -> list[int]:
    """The labels of a grid, a row each."""
    every = choice == ALL_CLASSES and run.flow.config.classes
    return list(range(min(MAX_ROWS, len(run.classes)))) if every else [label_of(choice, run)]


def grid_image(rows: list[Row], total: int) -> Image.Image:
    """The rows there are, and room for those to come."""
    images = torch.cat([row.images for row in rows])
    count = len(rows[0].images)
    room = images.new_zeros(((total - len(rows)) * count, *images.shape[1:]))
    return grid(torch.cat([images, room]), columns=count, scale=max(1, GRID_PIXELS // (count * images.shape[-1])))


def draw(view: SamplesView) -> Iterator[tuple[Any, ...]]:
    """(name, grid, name of the other run, its grid, caption), again and again while the grids fill."""
    runs = pair(view.run, view.other)
    labels = {name: labels_of(view.choice, run) for name, run in runs.items()}
    rows: dict[str, list[Row]] = {name: [] for name in runs}
    shown = 0.0
    for place in range(max(map(len, labels.values()))):
        for name, run in runs.items():
            if place < len(labels[name]):
                rows[name].append(row_of(run, labels[name][place], view))
        done = all(len(rows[name]) == len(labels[name]) for name in runs)
        if done or time.perf_counter() - shown > POLL_SECONDS:
            shown = time.perf_counter()
            yield _outputs(view, runs, rows)


def _outputs(view: SamplesView, runs: dict[str, rl.Run], rows: dict[str, list[Row]]) -> tuple[Any, ...]:
    grids, costs = [], []
    for name, made in rows.items():
        alt = f"{len(made) * view.count} samples of {_label_text(view.choice, runs[name])} from {name}"
        image = grid_image(made, len(labels_of(view.choice, runs[name])))
        grids.append((f"**{name}**", gr.update(value=image, alt_text=alt, visible=True)))
        seconds, error = sum(row.seconds for row in made), max(row.error for row in made)
        costs.append(f"{name} {seconds:.2f} s, round-trip error {error:.1e}")
    name, run = next(iter(runs.items()))
    total = len(labels_of(view.choice, run))
    several = total > 1
    so_far = f"{len(rows[name])} of {total} rows so far. " if len(rows[name]) < total else ""
    last_step = by_run({name: made[0].finish for name, made in rows.items()})
    caption = (
        f"{_rows_text(run) if several else _label_text(view.choice, run)}, columns are seeds {view.seed} to "
        f"{view.seed + view.count - 1}, guidance {view.guidance:g}, temperature {view.temperature:g}, "
        f"{last_step}. Decoding ({view.method}, {run.device.type.upper()}): {'; '.join(costs)}. "
        f"{_other_rows(runs) if several else ''}{_sizes(runs)}"
    )
    second = grids[1] if len(grids) > 1 else ("", gr.update(visible=False))
    return *grids[0], *second, so_far + caption[0].upper() + caption[1:]


def _other_rows(runs: dict[str, rl.Run]) -> str:
    """The rows of a second run whose classes are others."""
    first, *others = runs.items()
    return "".join(
        f"Of {name} {_rows_text(run)}. " for name, run in others if run.flow.config.classes and run.classes != first[1].classes
    )


def _sizes(runs: dict[str, rl.Run]) -> str:
    """Flow, space and data of the runs, in sentences."""
    facts = {}
    for name, run in runs.items():
        side = run.config.data.image_size
        facts[name] = f"a flow of {parameters(run)} on {latents_text(run)}{side}x{side} {run.config.data.words}"
    return f"Demo size: {by_run(facts)}."


def _label_text(choice: str, run: rl.Run) -> str:
    if choice == ALL_CLASSES and run.flow.config.classes:
        return ALL_CLASSES if len(run.classes) <= MAX_ROWS else _first(run)
    return f"class {choice}" if label_of(choice, run) >= 0 else "no label"


def _rows_text(run: rl.Run) -> str:
    some = _first(run) if len(run.classes) > MAX_ROWS else "classes"
    return f"rows are {some}: {', '.join(run.classes[:MAX_ROWS])}"


def _first(run: rl.Run) -> str:
    return f"the first {MAX_ROWS} of {len(run.classes)} classes"


def code(view: SamplesView) -> Code:
    """The samples of the first run."""
    labels, last = labels_of(view.choice, get_run(view.run)), view.seed + view.count - 1
    fed = "" if labels == [-1] else f" --labels {labels[0]}..{labels[-1]}" if len(labels) > 1 else f" --labels {labels[0]}"
    shell = (
        f"rrepa-lab sample {view.run}{fed} --seeds {view.seed}..{last} --guidance {view.guidance:g} "
        f"--temperature {view.temperature:g} --method {view.method}{'' if view.denoise else ' --no-denoise'} --out grid.png"
    )
    python = (
        f'import rrepa_lab as rl\n\nrun = rl.load("{view.run}")\nlabels, seeds = {labels}, range({view.seed}, {last + 1})\n'
        f"s = rl.sample(\n    run, [seed for _ in labels for seed in seeds], [label for label in labels for _ in seeds], "
        f"\n    rl.Guidance({view.guidance:g}, temperature={view.temperature:g}), denoise={view.denoise}, "
        f'method="{view.method}",\n)\n'
        "s.images  # (B, C, H, W) in [-1, 1]; s.path: the states after each block"
    )
    return Code(shell, python)


def pack(view: SamplesView) -> str:
    """A zip of every image on the page as a PNG, the grids, and metadata.json; returns its path."""
    settings = {key: getattr(view, key) for key in ("guidance", "temperature", "denoise", "method")}
    metadata: dict[str, Any] = {"rrepa_lab": rl.__version__, **settings, "code": code(view).python, "images": []}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, run in pair(view.run, view.other).items():
            rows = {label: row_of(run, label, view) for label in labels_of(view.choice, run)}
            images = torch.cat([row.images for row in rows.values()])
            archive.writestr(f"{name}.png", encoded(grid(images, columns=view.count)))
            for label, row in rows.items():
                for seed, image in enumerate(row.images, view.seed):
                    file = f"{name}/label{'-none' if label < 0 else f'-{label}'}-seed-{seed}.png"
                    archive.writestr(file, encoded(picture(image)))
                    entry = {"file": file, "run": name, "step": run.step, "label": label, "seed": seed}
                    metadata["images"].append(entry)
        archive.writestr("metadata.json", json.dumps(metadata, indent=2))
    return keep_file("samples.zip", stream.getvalue())


def fit(run: rl.Run, view: SamplesView) -> dict[str, Any]:
    """The classes of another run."""
    choices = [ALL_CLASSES, *class_choices(run)]
    return {"choice": gr.Dropdown(choices=choices, value=view.choice if view.choice in choices else choices[0])}


def build(sidebar: Sidebar) -> Tab:
    """The tab."""
    gr.Markdown("The same noise, decoded by two flows. **What does alignment change in the samples?**")
    controls = _build_controls(SamplesView())
    outputs: list[Any] = []
    with gr.Row():
        for place in ("sheet", "sheet-other"):
            with gr.Column(min_width=260):
                outputs += [
                    gr.Markdown(elem_id=f"{place}-name"),
                    gr.Image(
                        format="png", type="pil", interactive=False, buttons=["download", "fullscreen"], show_label=False,
                        label="Samples", elem_id=place,
                    ),
                ]  # fmt: skip
    outputs.append(gr.Markdown(elem_id="samples-note"))
    with gr.Row():
        zipped = gr.Button("Download all as zip", size="sm", scale=0, min_width=200)
        stop = gr.Button("Stop", size="sm", scale=0, min_width=100)
    file = gr.DownloadButton(elem_classes="unseen", elem_id="samples-file")
    tab = Tab(SamplesView, sidebar, controls, [Panel(outputs, draw, stop=stop, slow=True)], code, fit)
    zipped.click(with_model_lock(tab.on_view(pack)), tab.inputs, file, **PRIVATE_MODEL).success(None, js=script("save_zip"))
    return tab


def _build_controls(default: SamplesView) -> dict[str, Any]:
    with gr.Row():
        choice = gr.Dropdown(
            [ALL_CLASSES, *class_choices(get_run(DEFAULT_RUN))],
            value=default.choice,
            label="Class",
            info="fed to both runs",
        )
        count = gr.Slider(1, 16, default.count, step=1, label="Samples a row", info="seeds count up from the sidebar's seed")
        guidance = gr.Slider(
            0, 5, default.guidance, step=0.1, label="Guidance",
            info="0 is none; more exaggerates the class",
        )  # fmt: skip
    with gr.Row():
        temperature = gr.Slider(
            0.2, 2, default.temperature, step=0.1, label="Temperature", info="of the unconditional branch, under guidance"
        )
        denoise = gr.Checkbox(default.denoise, label="Denoise", info="one step along the score removes the training noise")
        method = gr.Dropdown(list(METHODS), value=default.method, label="Decoding", info="all give the same images")
    return {
        "choice": choice, "count": count, "guidance": guidance, "temperature": temperature, "denoise": denoise,
        "method": method,
    }  # fmt: skip
