"""The tab "Intervene": a state is exchanged, moved or removed, and the picture and log p change."""

from html import escape
from typing import Any

import gradio as gr
from page.panels import Code, Panel, Sidebar, Tab
from page.scripts import script, style
from server.runs import DEFAULT_RUN, N_TEST_IMAGES, get_run, missing_data, pair, test_code, test_images
from server.settings import PRIVATE
from tabs.intervene.computed import (
    COMPONENT,
    DIRECTIONS,
    FORWARD,
    GENERATED,
    N_VECTOR_IMAGES,
    PATCH,
    REMOVE,
    REVERSE,
    STEER,
    TEST,
    Answer,
    InterveneView,
    answer_of,
    fits_tokens,
    images_of,
    part_choices,
    part_name,
    token_numbers,
    towards_choices,
    towards_of,
)
from tabs.trajectories import tap_in

import rrepa_lab as rl
from rrepa_lab.viz.html import image_tag, picture_table
from rrepa_lab.viz.interventions import nats_by_block

NAME, TITLE = "intervene", "Intervene"


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw(view: InterveneView) -> tuple[str, str, Any, str]:
    """(the target under its tokens, pictures of both runs, change of log p by block, lines about it)."""
    answers = {name: answer_of(name, view) for name in pair(view.run, view.other)}
    pictures = picture_table({name: _row(one, view) for name, one in answers.items()}, _caption(view), what="intervention")
    figure = nats_by_block({name: one.found for name, one in answers.items()}, next(iter(answers.values())).what)
    return brush(view), pictures, figure, "\n".join(_line(name, one, view) for name, one in answers.items())


def brush(view: InterveneView) -> str:
    """The target under a grid of buttons, one for each token; the chosen ones are pressed."""
    run, chosen = get_run(view.run), token_numbers(view.tokens) or ()
    images, names = images_of(run, view)
    side = run.flow.config.side
    cells = "".join(
        f'<button type="button" class="token" aria-pressed="{str(number in chosen).lower()}" '
        f'aria-label="token {number}, row {number // side + 1}, column {number % side + 1}"></button>'
        for number in range(side * side)
    )
    grid = f'<div class="tokens" style="grid-template-columns: repeat({side}, 1fr)">{cells}</div>'
    shown = f'<div class="brush">{image_tag(images[0].cpu(), f"target, {names[0]}")}{grid}</div>'
    words = f"{len(chosen)} of {side * side} tokens" if chosen else f"all {side * side} tokens"
    return f'{shown}<p class="caption">{escape(words)}</p><button type="button" class="all">all tokens</button>'


def _row(answer: Answer, view: InterveneView) -> dict[str, Any]:
    after = answer.found.images[0].clamp(-1, 1).cpu()
    row = {f"target, {answer.names[0]}": answer.target[0]}
    row |= {f"source, {answer.names[1]}": answer.source[0]} if view.action == PATCH else {}
    return row | {"after": after, "after - target": (after - answer.target[0]).clamp(-1, 1)}


def _caption(view: InterveneView) -> str:
    if view.keep == REVERSE:
        return (
            "after: what the flow with the intervention generates from the noise of the target; pictures are clipped to -1..1"
        )
    return (
        "after: what the flow generates from the noise that the flow with the intervention maps the target to; clipped to -1..1"
    )


def _line(name: str, answer: Answer, view: InterveneView) -> str:
    found = answer.found
    nats = float(found.delta_log_prob[0])
    what = "log p of the picture" if view.keep == REVERSE else "log p of the target under the changed flow"
    dims = get_run(name).flow.config.dims
    moved = float((found.images[0].cpu() - answer.target[0]).square().mean().sqrt())
    return (
        f"- **{name}**: {what} changes by **{_signed(nats)} nats** ({_signed(nats / dims, 4)} nats/dim); the picture by "
        f"{moved:.3g} (root mean square, of -1..1); round trip {float(found.round_trip.max()):.1e}."
    )


def _signed(value: float, digits: int = 2) -> str:
    """A number with its sign; what rounds to nothing is +0.00."""
    return f"{round(value, digits) + 0.0:+,.{digits}f}"


def code(view: InterveneView) -> Code:
    """The answer of the first run."""
    run, tokens = get_run(view.run), token_numbers(view.tokens)
    part, towards = part_name(run, view), towards_of(run, view)
    lines = ["import rrepa_lab as rl", "", f'run = rl.load("{view.run}")']
    if view.images == GENERATED:
        lines += [
            f"target, source = rl.sample(run, [{view.seed + view.target}, {view.seed + view.source}]).images.clamp(-1, 1)"
        ]
        noise = ", noise=0"
    else:
        rows = [min(row, len(test_images(run).x) - 1) for row in (view.target, view.source)]
        lines += [f"target, source = {test_code(view.run)}[{rows}]"]
        noise = ""
    how = f'tokens={None if tokens is None else list(tokens)}, direction="{DIRECTIONS[view.keep]}"{noise}'
    if view.action == PATCH:
        call = f'rl.patch(run, source[None], target[None], "{part}", {view.strength:g}, {how})'
    elif view.action == REMOVE:
        call = f'rl.ablate(run, target[None], "{part}", {view.strength:g}, {how})'
    else:
        kind, which = "class", f'label="{towards}"'
        if towards.startswith(COMPONENT):
            kind, which = "component", f"component={towards.removeprefix(COMPONENT)}"
        of = f'images=rl.Images("train", limit={N_VECTOR_IMAGES})'
        if missing_data(run):
            of = f'protocol=rl.FeatureProtocol("reverse", samples={N_VECTOR_IMAGES}, feed_label=True)'
        lines += [f'vector = rl.steering_vector(run, "{part}", "{kind}", {which}, {of})']
        call = f'rl.steer(run, target[None], "{part}", vector, {view.strength:g}, {how})'
    lines += [f"found = {call}", "found.images, found.delta_log_prob, found.delta_by_block, found.round_trip"]
    return Code("", "\n".join(lines))


# --- the tab ----------------------------------------------------------------------------------------------------------


def brushed(event: gr.EventData) -> str:
    """The numbers of the tokens that were chosen, as ranges."""
    numbers = [int(number) for number in event.index]
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{low}..{high}" if high > low else f"{low}" for low, high in ranges)


def build(sidebar: Sidebar) -> Tab:
    """The tab; it is drawn when it is opened."""
    default = InterveneView()
    gr.Markdown(
        "**What does a state carry?** Put a state of one image into another, move it, or remove it: the flow stays exactly "
        "invertible, so each answer has the exact change of log p."
    )
    with gr.Row(equal_height=False):
        with gr.Column(min_width=180, scale=1):
            tokens_html = gr.HTML(
                elem_id="brush", css_template=style("brush"), js_on_load=script("brush"), apply_default_css=False,
                html_template="${value}",
            )  # fmt: skip
        with gr.Column(min_width=320, scale=3):
            pictures = gr.HTML(elem_id="intervention")
            lines = gr.Markdown(elem_id="intervention-note")
    controls = _build_controls(default)
    chart = gr.Plot(label="Change of log p", show_label=False, elem_id="intervention-nats")
    tokens_html.select(brushed, None, controls["tokens"], queue=False, **PRIVATE)
    panel = Panel([tokens_html, pictures, chart, lines], draw, slow=True)
    return Tab(InterveneView, sidebar, controls, [panel], code, fit)


def _build_controls(default: InterveneView) -> dict[str, Any]:
    run = get_run(DEFAULT_RUN)
    config = run.flow.config
    with gr.Row():
        images = gr.Radio(
            [TEST, GENERATED], value=default.images, label="Images", info="generated: the seed plus these numbers"
        )
        target = gr.Slider(0, N_TEST_IMAGES - 1, default.target, step=1, label="Target", info="whose state is changed")
        source = gr.Slider(0, N_TEST_IMAGES - 1, default.source, step=1, label="Source", info="of the state that is put there")
    with gr.Row():
        action = gr.Radio([PATCH, STEER, REMOVE], value=default.action, label="Action", info="exchange, move, or take away")
        part = gr.Dropdown(part_choices(run), value=default.part, label="Part", info="of a block")
        block = gr.Slider(1, config.blocks, default.block, step=1, label="Block", info="1 is next to the image")
        layer = gr.Slider(1, max(config.depths), default.layer, step=1, label="Layer", info="of that block's Transformer")
    with gr.Row():
        tokens = gr.Textbox(default.tokens, label="Tokens", info="0..3,7; empty for all; or brush them", elem_id="tokens")
        strength = gr.Slider(
            -4, 4, default.strength, step=0.25, label="Strength", info="0 changes nothing, 1 is the whole state",
            elem_id="strength",
        )  # fmt: skip
        choices = towards_choices(run)
        towards = gr.Dropdown(choices, value=default.towards, label="Steer towards", info="mean of a class, or a component")
        keep = gr.Radio([REVERSE, FORWARD], value=default.keep, label="Keep", info="and generate, or encode")
    return {
        "images": images, "target": target, "source": source, "action": action, "part": part, "block": block, "layer": layer,
        "tokens": tokens, "strength": strength, "towards": towards, "keep": keep,
    }  # fmt: skip


def fit(run: rl.Run, view: InterveneView) -> dict[str, Any]:
    """Parts, images and classes of another run."""
    tap, last = tap_in(run, view.block, view.layer), len(test_images(run).x) - 1
    parts = part_choices(run)
    return {
        "target": gr.Slider(maximum=last, value=min(view.target, last)),
        "source": gr.Slider(maximum=last, value=min(view.source, last)),
        "part": gr.Dropdown(choices=parts, value=view.part if view.part in parts else parts[0]),
        "block": gr.Slider(maximum=run.flow.config.blocks, value=tap.block),
        "layer": gr.Slider(maximum=max(run.flow.config.depths), value=int(tap.layer)),
        "tokens": view.tokens if fits_tokens(run, view.tokens) else "",
        "towards": gr.Dropdown(choices=towards_choices(run), value=towards_of(run, view)),
    }
