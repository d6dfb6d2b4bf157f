"""From noise to image, block by block: the way, the features of every layer on it, and what the teacher sees at its end."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import gradio as gr
import torch
from frame import Bar, Code, Panel, serve
from shell import FIRST, HIDDEN, SECOND, TESTED, class_choices, get_run, label_of, pair, test_code, test_images, told
from torch import Tensor

import rrepa_lab as rl
from rrepa_lab.align.encoder import Encoder
from rrepa_lab.align.projector import similarity
from rrepa_lab.align.target import match_grid
from rrepa_lab.errors import LabError
from rrepa_lab.flow.taps import Tap
from rrepa_lab.sampling.denoise import Finished, finish
from rrepa_lab.sampling.sample import noise
from rrepa_lab.studies.reading import LAYERS, load_table
from rrepa_lab.viz.html import picture_table

NAME, TITLE = "reverse-path", "Reverse path"
NOISE, IMAGE = "fresh noise", "test image"
COMPANY = 6  # images that share the colours of features: a basis fitted to one image alone says little
HELD = 2**26  # numbers of inner states that may be kept for a view; above, only those of the layer looked at
PACE = 0.5  # seconds a step of the film


@dataclass(frozen=True, eq=False)
class Way:
    """The way of some images through a run."""

    trace: rl.Trace
    finished: Tensor  # (B, C, H, W) in [-1, 1]
    columns: list[str]  # what each image is
    how: str  # what the last step was, "" for none


@lru_cache(maxsize=16)
def travel(
    run: rl.Run, start: str, seed: int, image: int, label: int, guidance: float, temperature: float, taps: tuple[str, ...]
) -> Way:
    """Send fresh noise (seeds from `seed` on), or test images encoded first (rows from `image` on), to the image side."""
    flow = run.flow
    if start == NOISE:
        source: Tensor = noise(flow, range(seed, seed + COMPANY))
        columns = [f"seed {number}" for number in range(seed, seed + COMPANY)]
    else:
        x, _ = test_images(run)
        rows = [(image + step) % len(x) for step in range(COMPANY)]
        source, columns = x[rows], [f"test image {row}" for row in rows]
    labels = torch.full((COMPANY,), label, device=run.device) if flow.config.classes else None
    trace = rl.trace(run, source, labels, "reverse", taps, guidance=guidance, temperature=temperature)
    made = trace.images["block.1.in"].to(run.device)
    done = finish(run, made, labels) if start == NOISE else Finished(made, "")
    return Way(trace, done.images.clamp(-1, 1).cpu(), columns, done.how)


def way_of(run: rl.Run, start: str, seed: int, image: int, choice: str, guidance: float, temperature: float, *taps: str) -> Way:
    """`travel` with all layers of a small flow, so that moving a slider needs no other pass, else with those asked for."""
    config = run.flow.config
    if COMPANY * config.tokens * config.width * config.blocks * config.layers <= HELD:
        taps = ("block.*.layer.*",)
    return travel(run, start, seed, int(image), label_of(choice, run), guidance, temperature, taps)


@lru_cache(maxsize=8)
def encoder_of(run: rl.Run) -> tuple[Encoder | None, str]:
    """The run's encoder, and why there is none; the page never downloads one, and tries to load each once."""
    if run.config.encoder is None:
        return None, "the run has no teacher"
    try:
        return run.encoder(download=False), ""
    except LabError:
        weights = run.config.encoder.weights if run.config.encoder.weights != "pretrained" else "timm's own"
        return None, f"its teacher {run.config.encoder.model} is not shown: no weights on this machine ({weights})"


@lru_cache(maxsize=16)
def teacher_of(run: rl.Run, way: Way) -> Tensor | None:
    """The encoder's features (B, T, E) of the finished images; None for a run without an encoder at hand."""
    encoder, _ = encoder_of(run)
    if encoder is None:
        return None
    return match_grid(encoder(way.finished.to(run.device)), encoder.grid, run.flow.config.side).cpu()


def tap_in(run: rl.Run, block: float, layer: float) -> Tap:
    """The layer the sliders point at; in a smaller flow the last there is."""
    config = run.flow.config
    return Tap(min(int(block), config.blocks), min(int(layer), config.layers))


def strip(way: Way) -> dict[str, Tensor]:
    """The first image's stages by caption, from the noise on."""
    blocks = len(way.trace.images) - 1
    captions = ["noise", *(f"after block {number}" for number in range(blocks, 0, -1))]
    stages = {caption: image[0] for caption, image in zip(captions, way.trace.images.values(), strict=True)}
    return stages | {"finished": way.finished[0]}


def features(run: rl.Run, way: Way, tap: Tap) -> dict[str, dict[str, Tensor]]:
    """Strips of pictures in [-1, 1]: the images as the block leaves them, the layer's features, and the teacher's.

    At an aligned tap also the features as the projector sends them to the teacher, in the colours of the teacher's own.
    """
    side = run.flow.config.side
    left = way.trace.images[Tap(1, "in").name if tap.block == 1 else Tap(tap.block - 1, "out").name]
    rows = {f"images after block {tap.block}": left} | _paint({f"features, {tap.name}": way.trace.states[tap.name]}, side)
    teacher = teacher_of(run, way)
    if teacher is not None:
        seen = {"the teacher's, of the finished images": teacher}
        if tap.name in run.projectors.taps:
            seen = {"features through the projector": project(run, way, tap)} | seen
        rows |= _paint(seen, side)
    return {name: dict(zip(way.columns, images, strict=True)) for name, images in rows.items()}


def _paint(states: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    return {name: 2 * image - 1 for name, image in rl.patch_colours(states, side).items()}


@torch.no_grad()
def project(run: rl.Run, way: Way, tap: Tap) -> Tensor:
    """The features at an aligned tap in the teacher's space, (B, T, E)."""
    return run.projectors.project(tap.name, way.trace.states[tap.name].to(run.device)).cpu()


def facts(name: str, run: rl.Run, way: Way, tap: Tap) -> str:
    """What was measured on the way, in a line."""
    parts = [f"comes back to its source within {float(way.trace.error.max()):.1e}"]
    teacher = teacher_of(run, way)
    if teacher is not None and tap.name in run.projectors.taps:
        near = float(similarity(project(run, way, tap), teacher).mean())
        parts.append(f"cosine with the teacher through the projector {near:.3f}")
    missing = encoder_of(run)[1]
    if missing:
        parts.append(missing)
    known = shipped_cka(name, tap.name)
    if known is not None:
        parts.append(f"linear CKA with the teacher {known:.2f} over the 360 test images")
    return f"**{name}**, `{tap.module_path}`: {'; '.join(parts)}."


def shipped_cka(name: str, tap: str) -> float | None:
    """Linear CKA of a bundled run's layer with the encoder, from the shipped table."""
    table = layers_table()
    rows = table[(table["run"] == name) & (table["tap"] == tap)]
    return float(rows["value"].iloc[0]) if len(rows) else None


@lru_cache(maxsize=1)
def layers_table() -> Any:
    """CKA of real images without label, from assets/studies."""
    table = load_table(LAYERS)
    return table[(table["metric"] == "cka") & (table["direction"] == "forward") & (table["label_fed"] == "none")]


def draw_way(
    run: str, other: str, seed: int, start: str, choice: str, image: int, guidance: float, temperature: float, block: int
) -> str:
    """The strips of both runs."""
    strips = {}
    for name, one in pair(run, other).items():
        way = way_of(one, start, seed, image, choice, guidance, temperature)
        strips[f"{name}, {way.columns[0]}"] = strip(way)
    asked = f"class {choice}" if label_of(choice, get_run(run)) >= 0 else "no label"
    how = way.how.replace("denoised", "denoised by one step along the score")
    finish = f", and {how}" if how else ""
    caption = (
        f"{start}, {asked}, guidance {guidance:g}, temperature {temperature:g}; the last picture is clipped to -1..1{finish}."
    )
    return picture_table(strips, caption, f"after block {int(block)}", "from noise to image")


def draw_features(
    run: str, other: str, seed: int, layer: int, start: str, choice: str, image: int, guidance: float, temperature: float,
    block: int,
) -> tuple[str, Any, str]:  # fmt: skip
    """The features of each run at the layer, and what was measured."""
    views, lines = [], []
    for name, one in pair(run, other).items():
        tap = tap_in(one, block, layer)
        way = way_of(one, start, seed, image, choice, guidance, temperature, tap.name)
        views.append(picture_table({f"{name}: {row}": pictures for row, pictures in features(one, way, tap).items()}))
        lines.append(facts(name, one, way, tap))
    note = "Colours are the first three principal components, fitted to the six images of a row."
    if any(tap_in(one, block, layer).name in one.projectors.taps for one in pair(run, other).values()):
        note += " The teacher's features and those through the projector share them."
    second = gr.update(value=views[1], visible=True) if len(views) > 1 else gr.update(visible=False)
    return views[0], second, "  \n".join([*lines, note])


def draw(run: str, other: str, seed: int, *controls: Any) -> tuple[str, str, Any, str]:
    """The whole tab; the last of the controls is the layer."""
    *steering, layer = controls
    return draw_way(run, other, seed, *steering), *draw_features(run, other, seed, layer, *steering)


def code(
    run: str, other: str, seed: int, start: str, choice: str, image: int, guidance: float, temperature: float, block: int,
    layer: int,
) -> Code:  # fmt: skip
    """The trace of the first run."""
    loaded = get_run(run)
    label, tap = label_of(choice, loaded), tap_in(loaded, block, layer).name
    last = seed + COMPANY - 1
    fed = "None" if label < 0 else str(label)
    lines = ["import rrepa_lab as rl"]
    if start == NOISE:
        lines += ["from rrepa_lab.sampling.sample import noise", "", f'run = rl.load("{run}")']
        lines += [f"source = noise(run.flow, range({seed}, {last + 1}))"]
        source = f"--seeds {seed}..{last}"
    else:
        lines += ["", f'run = rl.load("{run}")', f"source = {test_code(run)}.x[{image}:{image + COMPANY}]"]
        source = f"--rows {image}..{image + COMPANY - 1}"
    lines += [
        f't = rl.trace(run, source, {fed}, "reverse", "{tap}", guidance={guidance:g}, temperature={temperature:g})',
        "t.images  # by block: noise first, the image last",
        f't.states["{tap}"], t.error',
    ]
    shell = (
        f"rrepa-lab trace {run} {source} --taps {tap} --guidance {guidance:g} --temperature {temperature:g}"
        f"{'' if label < 0 else f' --label {label}'} --picture path.png --out states.safetensors"
    )
    return Code(shell, "\n".join(lines))


def step_back(block: int, run: str) -> int:
    """The block before this one on the way from the noise."""
    return min(int(block) + 1, get_run(run).flow.config.blocks)


def step_forth(block: int) -> int:
    """The block after this one on the way to the image."""
    return max(int(block) - 1, 1)


def film(run: str) -> Iterator[int]:
    """The numbers of the blocks in the order in which they generate, PACE seconds apart."""
    for number in range(get_run(run).flow.config.blocks, 0, -1):
        yield number
        time.sleep(PACE)


def build(bar: Bar) -> Panel:
    """The tab, filled with a three on its way."""
    run = get_run(FIRST)
    blocks, layers = run.flow.config.blocks, run.flow.config.layers
    three = class_choices(run)[4]
    gr.Markdown("**How does an image come out of noise, and what does the flow know on the way?** Drag the block.")
    way = gr.HTML(draw_way(FIRST, SECOND, 0, NOISE, three, 0, 0.0, 1.0, 3), elem_id="way")
    with gr.Row(equal_height=False):
        block = gr.Slider(
            1, blocks, 3, step=1, label="Block", info="1 makes the image, the last one reads the noise", elem_id="block"
        )
        layer = gr.Slider(1, layers, 2, step=1, label="Layer", info="of that block's Transformer", elem_id="layer")
        with gr.Column(min_width=180, scale=0):
            play = gr.Button("Play", size="sm", variant="primary", elem_id="play")
            with gr.Row():
                back = gr.Button("◀ noise", size="sm", min_width=70, elem_id="step-back")
                forth = gr.Button("image ▶", size="sm", min_width=70, elem_id="step-forth")
    with gr.Row(equal_height=False):
        views = []
        for place in ("features", "features-other"):
            with gr.Column(min_width=320):  # beside one another where there is room
                views.append(gr.HTML(elem_id=place))
    note = gr.Markdown(elem_id="way-note")
    with gr.Accordion("Where it starts, and how it is steered", open=False):
        with gr.Row():
            source = gr.Radio([NOISE, IMAGE], value=NOISE, label="Start from", info="an image is encoded first, and comes back")
            choice = gr.Dropdown(class_choices(run), value=three, label="Class", info="what the flow is asked for")
            image = gr.Slider(0, TESTED - 1, 0, step=1, label="Test image", info="of those never trained on")
        with gr.Row():
            guidance = gr.Slider(0, 5, 0.0, step=0.1, label="Guidance", info="0 is none")
            temperature = gr.Slider(
                0.2, 2, 1.0, step=0.1, label="Temperature", info="of the unconditional branch, so only with guidance"
            )
    play.click(told(film), bar.run, block, concurrency_id="film", concurrency_limit=8, **HIDDEN)
    back.click(told(step_back), [block, bar.run], block, queue=False, **HIDDEN)
    forth.click(step_forth, block, block, queue=False, **HIDDEN)
    controls = {
        "start": source, "class": choice, "image": image, "guidance": guidance, "temperature": temperature,
        "block": block, "layer": layer,
    }  # fmt: skip
    return Panel(controls, [way, *views, note], draw, code, fit)


def fit(
    run: rl.Run, start: str, choice: str, image: int, guidance: float, temperature: float, block: int, layer: int
) -> dict[str, Any]:
    """Blocks, layers, classes and test images of another run."""
    tap, choices, most = tap_in(run, block, layer), class_choices(run), len(test_images(run).x) - 1
    return {
        "class": gr.Dropdown(choices=choices, value=choice if choice in choices else choices[0]),
        "image": gr.Slider(maximum=most, value=min(int(image), most)),
        "block": gr.Slider(maximum=run.flow.config.blocks, value=tap.block),
        "layer": gr.Slider(maximum=run.flow.config.layers, value=int(tap.layer)),
    }


if __name__ == "__main__":
    serve([sys.modules[__name__]])
