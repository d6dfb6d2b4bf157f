"""From noise to image, block by block: the states after each block, the features of each layer, and the teacher's features."""

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
from page.panels import Code, Panel, Sidebar, Tab
from server.handlers import show_errors
from server.runs import DEFAULT_RUN, N_TEST_IMAGES, by_run, class_choices, get_run, label_of, pair, test_code, test_images
from server.settings import PRIVATE

import rrepa_lab as rl
from rrepa_lab.viz.html import picture_table
from tabs.trajectories import IMAGE, N_IMAGES, NOISE, ReversePathView, facts, features, strip, tap_in, trajectory_of

NAME, TITLE = "reverse-path", "Reverse path"
SECONDS_PER_BLOCK = 0.5  # of Play


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_trajectory(view: ReversePathView) -> str:
    """The strips of both runs."""
    strips, last_steps, decoded = {}, {}, []
    for name, run in pair(view.run, view.other).items():
        trajectory = trajectory_of(run, view)
        strips[f"{name}, {trajectory.columns[0]}"] = strip(trajectory)
        last_steps[name] = trajectory.finish.replace("denoised", "denoised by one step along the score")
        if run.space.stage_words:
            decoded.append(f" Pictures of {name} are {run.space.stage_words}.")
    last_step = by_run(last_steps)
    label = f"class {view.choice}" if label_of(view.choice, get_run(view.run)) >= 0 else "no label"
    caption = (
        f"{view.start}, {label}, guidance {view.guidance:g}, temperature {view.temperature:g}; "
        f"the last picture is clipped to -1..1{f', and {last_step}' if last_step else ''}.{''.join(decoded)}"
    )
    return picture_table(strips, caption, f"after block {view.block}", "from noise to image")


def draw_features(view: ReversePathView) -> tuple[str, Any, str]:
    """The features of each run at the layer, and the measurements."""
    tables, lines = [], []
    projected = False
    for name, run in pair(view.run, view.other).items():
        tap = tap_in(run, view.block, view.layer)
        trajectory = trajectory_of(run, view, tap.name)
        rows = features(run, trajectory, tap)
        tables.append(picture_table({f"{name}: {row}": pictures for row, pictures in rows.items()}))
        lines.append(facts(name, run, trajectory, tap))
        projected = projected or tap.name in run.projectors.taps
    note = "Colours are the first three principal components, fitted to the six images of a row."
    if projected:
        note += " The teacher's features and those through the projector share them."
    second = gr.update(value=tables[1], visible=True) if len(tables) > 1 else gr.update(visible=False)
    return tables[0], second, "  \n".join([*lines, note])


def draw(view: ReversePathView) -> tuple[str, str, Any, str]:
    """The whole tab."""
    return draw_trajectory(view), *draw_features(view)


def code(view: ReversePathView) -> Code:
    """The trace of the first run."""
    run = get_run(view.run)
    label, tap = label_of(view.choice, run), tap_in(run, view.block, view.layer).name
    last = view.seed + N_IMAGES - 1
    lines = ["import rrepa_lab as rl"]
    if view.start == NOISE:
        lines += ["from rrepa_lab.sampling.sample import noise", "", f'run = rl.load("{view.run}")']
        lines += [f"source = noise(run.flow, range({view.seed}, {last + 1}))"]
        source = f"--seeds {view.seed}..{last}"
    else:
        rows = f"{view.image}:{view.image + N_IMAGES}"
        lines += ["", f'run = rl.load("{view.run}")', f"source = {test_code(view.run)}[{rows}]"]
        source = f"--rows {view.image}..{view.image + N_IMAGES - 1}"
    settings = f"guidance=rl.Guidance({view.guidance:g}, temperature={view.temperature:g})"
    lines += [
        f't = rl.trace(run, source, {"None" if label < 0 else label}, "reverse", "{tap}", {settings})',
        "t.images  # by block: noise first, the image last",
        f't.states["{tap}"], t.error',
    ]
    shell = (
        f"rrepa-lab trace {view.run} {source} --taps {tap} --guidance {view.guidance:g} --temperature {view.temperature:g}"
        f"{'' if label < 0 else f' --label {label}'} --picture path.png --out states.safetensors"
    )
    return Code(shell, "\n".join(lines))


# --- the tab ----------------------------------------------------------------------------------------------------------


def previous_block(block: int, run: str) -> int:
    """The block before this one in the order of generation, which is one nearer to the noise."""
    return min(int(block) + 1, get_run(run).flow.config.blocks)


def next_block(block: int) -> int:
    """The block after this one in the order of generation, which is one nearer to the image."""
    return max(int(block) - 1, 1)


def play_blocks(run: str) -> Iterator[int]:
    """The numbers of the blocks in the order in which they generate, SECONDS_PER_BLOCK apart."""
    for number in range(get_run(run).flow.config.blocks, 0, -1):
        yield number
        time.sleep(SECONDS_PER_BLOCK)


def build(sidebar: Sidebar) -> Tab:
    """The tab, filled with the trajectory of a three."""
    default = ReversePathView()
    config = get_run(DEFAULT_RUN).flow.config
    gr.Markdown("**How does an image come out of noise, and what do the features show after each block?** Drag the block.")
    strips = gr.HTML(draw_trajectory(default), elem_id="way")
    with gr.Row(equal_height=False):
        block = gr.Slider(
            1, config.blocks, default.block, step=1, label="Block", info="1 makes the image, the last one reads the noise",
            elem_id="block",
        )  # fmt: skip
        layer = gr.Slider(
            1,
            max(config.depths),
            default.layer,
            step=1,
            label="Layer",
            elem_id="layer",
            info="of that block's Transformer; in a shallower block its last",
        )
        with gr.Column(min_width=180, scale=0):
            play = gr.Button("Play", size="sm", variant="primary", elem_id="play")
            with gr.Row():
                back = gr.Button("◀ noise", size="sm", min_width=70, elem_id="step-back")
                forth = gr.Button("image ▶", size="sm", min_width=70, elem_id="step-forth")
    with gr.Row(equal_height=False):
        tables = []
        for place in ("features", "features-other"):
            with gr.Column(min_width=320):  # side by side where there is room
                tables.append(gr.HTML(elem_id=place))
    note = gr.Markdown(elem_id="way-note")
    controls = {**_build_source(default), "block": block, "layer": layer}
    play.click(show_errors(play_blocks), sidebar.run, block, concurrency_id="film", concurrency_limit=8, **PRIVATE)
    back.click(show_errors(previous_block), [block, sidebar.run], block, queue=False, **PRIVATE)
    forth.click(next_block, block, block, queue=False, **PRIVATE)
    return Tab(ReversePathView, sidebar, controls, [Panel([strips, *tables, note], draw)], code, fit)


def _build_source(default: ReversePathView) -> dict[str, Any]:
    """The controls of what is decoded, and how."""
    with gr.Accordion("Source, class and guidance", open=False):
        with gr.Row():
            start = gr.Radio(
                [NOISE, IMAGE], value=default.start, label="Start from", info="an image is encoded first, then decoded again"
            )
            choice = gr.Dropdown(
                class_choices(get_run(DEFAULT_RUN)), value=default.choice, label="Class", info="the label fed to the flow"
            )
            image = gr.Slider(
                0, N_TEST_IMAGES - 1, default.image, step=1, label="Test image", info="of the test split, never trained on"
            )
        with gr.Row():
            guidance = gr.Slider(0, 5, default.guidance, step=0.1, label="Guidance", info="0 is none")
            temperature = gr.Slider(
                0.2, 2, default.temperature, step=0.1, label="Temperature",
                info="of the unconditional branch, so only with guidance",
            )  # fmt: skip
    return {"start": start, "choice": choice, "image": image, "guidance": guidance, "temperature": temperature}


def fit(run: rl.Run, view: ReversePathView) -> dict[str, Any]:
    """Blocks, layers, classes and test images of another run."""
    tap, choices, last = tap_in(run, view.block, view.layer), class_choices(run), len(test_images(run).x) - 1
    return {
        "choice": gr.Dropdown(choices=choices, value=view.choice if view.choice in choices else choices[0]),
        "image": gr.Slider(maximum=last, value=min(view.image, last)),
        "block": gr.Slider(maximum=run.flow.config.blocks, value=tap.block),
        "layer": gr.Slider(maximum=max(run.flow.config.depths), value=int(tap.layer)),
    }
