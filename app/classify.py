"""The class of an image read off two flows without a classifier: one gradient step, twenty watched, or Bayes' rule."""

import sys
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import gradio as gr
import numpy as np
import torch
from frame import Bar, Code, Panel, serve
from PIL import Image
from shell import (
    FIRST,
    HIDDEN,
    QUIET,
    TESTED,
    computes,
    get_run,
    lock,
    only_uploads,
    pair,
    picture_field,
    test_code,
    test_images,
    told,
)
from torch import Tensor

import rrepa_lab as rl
from rrepa_lab.analysis.classify import Classification
from rrepa_lab.analysis.report import ClassificationReport, classification_report
from rrepa_lab.data.pixels import from_drawing
from rrepa_lab.data.prepare import prepare
from rrepa_lab.errors import LabError
from rrepa_lab.viz.classes import class_race, class_scores, confusion, evidence_map
from rrepa_lab.viz.html import picture_table
from rrepa_lab.viz.images import picture

NAME, TITLE = "classify", "Classify"
METHODS = {"one gradient step": "gradient", "twenty steps": "iterated", "Bayes' rule": "bayes"}
STEPS = 20
PACE = 0.25  # seconds a step of the film
AFTER = 0.25  # seconds by which charts let the verdict go first, and the twenty steps twice that
MOST = 60  # images shown in the browser of answers
ANY = "any"
# the pad opens with its hand tool; the brush is there a moment after the tab is
TAKE_BRUSH = """() => {
    const began = Date.now();
    const take = () => {
        const brush = document.querySelector("#pad button[title='Brush']");
        if (brush && !brush.classList.contains('highlight')) brush.click();
        if (!brush && Date.now() - began < 5000) setTimeout(take, 100);
    };
    take();
}"""
# what a visitor's session keeps of a drawing: the image as nested lists, where it came from, and the number of the test image
# that was chosen when it came: choosing another one puts the drawing away
Seen = tuple[list[Any], str, int]


# --- where the image comes from ---------------------------------------------------------------------------------------


def drawing(name: str, index: int, editor: dict[str, Any] | None) -> Seen | None:
    """What was drawn on the sketchpad: the opacity of its layers is the ink. None, the test image, for an empty pad."""
    layers = [layer for layer in (editor or {}).get("layers") or [] if layer is not None]
    ink = np.max([np.asarray(layer)[..., 3] for layer in layers], axis=0) / 255 if layers else np.zeros((8, 8))
    if not ink.any():
        return None
    return (
        _fitting(name, from_drawing(ink.astype(np.float32), get_run(name).flow.config.image_size)),
        "your drawing",
        int(index),
    )


def upload(name: str, index: int, image: Image.Image | None) -> Seen:
    """An uploaded picture, prepared as the command line and the endpoint do."""
    if image is None:
        raise LabError("no picture yet: drop one on the field")
    x, how = prepare(image, get_run(name).config.data)
    return _fitting(name, x), "your picture" + (f", {how}" if how else ""), int(index)


def _fitting(name: str, x: Tensor) -> list[Any]:
    get_run(name).flow.tokenize(x)  # an error here names both shapes
    return x[0].tolist()


def look_at(name: str, index: int, seen: Seen | None) -> tuple[Tensor, str, int | None]:
    """The image (1, C, H, W) to be classified, what it is, and its class if that is known: what was drawn, or a test image."""
    if seen is not None and seen[2] == int(index):
        return torch.tensor(seen[0])[None], seen[1], None
    x, y = test_images(get_run(name))
    row = int(index) % len(x)
    return x[row : row + 1].cpu(), f"test image {row}, a {get_run(name).classes[int(y[row])]}", int(y[row])


def has_classes(name: str) -> bool:
    """Whether there is anything to classify; the verdict says so where there is not."""
    return get_run(name).flow.config.classes > 0


# --- what the flows say -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def _classified(run: rl.Run, method: str, pixels: bytes, shape: tuple[int, ...]) -> Classification:
    x = torch.frombuffer(bytearray(pixels), dtype=torch.float32).view(shape).to(run.device)
    if method != "iterated":
        with lock:
            return rl.classify(run, x, method)
    time.sleep(2 * AFTER)
    path: list[Tensor] = []
    steps = rl.classify_steps(run, x, steps=STEPS)
    while True:  # many steps: whoever asks for one only comes between
        with lock:
            taken = next(steps, None)
        if taken is None:
            return Classification(path[-1], path[-1].argmax(dim=1), method, torch.stack(path))
        path.append(taken.scores)
        time.sleep(0.001)


def classified(run: rl.Run, method: str, x: Tensor) -> Classification:
    """`rl.classify` of one image, asked once."""
    return _classified(run, method, x.numpy().tobytes(), tuple(x.shape))


def judge(run: str, other: str, seed: int, index: int, seen: Seen | None) -> tuple[str, str]:
    """What the flow sees, and what one gradient step says."""
    x, what, truth = look_at(run, index, seen)
    lines = [f"Looking at {what}."]
    for name, one in pair(run, other).items():
        result = classified(one, "gradient", x)
        best, *others = (int(k) for k in result.top(2).labels[0])
        mark = "" if truth is None else " ✓" if best == truth else " ✗"
        ahead = f", {float(result.margin[0]):.2f} nats before {one.classes[others[0]]}" if others else ", its only class"
        lines.append(f"- **{name}** says **{one.classes[best]}**{mark}{ahead}")
    return picture_table({what: {"": x[0]}}, what="what the flow sees"), "\n".join(lines)


def weigh(run: str, other: str, seed: int, index: int, seen: Seen | None) -> Any:
    """The scores by one gradient step."""
    time.sleep(AFTER)
    if not has_classes(run):
        return None
    x, what, _ = look_at(run, index, seen)
    by_step = {name: classified(one, "gradient", x) for name, one in pair(run, other).items()}
    return class_scores(by_step, get_run(run).classes, "gradient", what=what)


def weigh_exactly(run: str, other: str, seed: int, index: int, seen: Seen | None) -> tuple[Any, Any, str]:
    """The scores by Bayes' rule, the evidence by block, and how sure Bayes' rule is."""
    time.sleep(AFTER)
    if not has_classes(run):
        return None, None, ""
    x, what, _ = look_at(run, index, seen)
    runs, classes = pair(run, other), get_run(run).classes
    by_bayes = {name: classified(one, "bayes", x) for name, one in runs.items()}
    with lock:
        parts = {name: rl.evidence(one, x.to(one.device))[0].cpu() for name, one in runs.items()}
    lines = [
        f"- **{name}** by Bayes' rule: {runs[name].classes[int(sure.label[0])]}, {float(sure.probability[0].max()):.1%} sure"
        for name, sure in by_bayes.items()
    ]
    return class_scores(by_bayes, classes, "bayes", what=what), evidence_map(parts, classes, what), "\n".join(lines)


def race(run: str, other: str, seed: int, step: int, index: int, seen: Seen | None) -> tuple[Any, Any]:
    """The scores of the classes up to a step of gradient ascent, for each run."""
    if not has_classes(run):
        return None, None
    x, what, truth = look_at(run, index, seen)
    plots = []
    for name, one in pair(run, other).items():
        result = classified(one, "iterated", x)
        plots.append(_named(class_race(result, one.classes, truth=truth, run=what, until=int(step)), name))
    return plots[0], plots[1] if len(plots) > 1 else None


def film() -> Iterator[int]:
    """The steps of the ascent, PACE seconds apart."""
    for step in range(STEPS + 1):
        yield step
        time.sleep(PACE)


# --- the answers over the test split ----------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def answers(run: rl.Run, method: str) -> ClassificationReport:
    """`rl.classification_report` of TESTED images of the test split, class-balanced."""
    return classification_report(run, method, limit=TESTED)


def chosen(report: ClassificationReport, of: str, taken_for: str, mistakes: bool) -> list[int]:
    """Rows of the test split by class and answer, least sure first."""
    table = report.images
    keep = (table["class"] == of) | (of == ANY)
    keep &= (table["predicted"] == taken_for) | (taken_for == ANY)
    if mistakes:
        keep &= ~table["right"].astype(bool)
    return [int(row) for row in table[keep].sort_values("margin")["image"]]


def browse(run: str, other: str, seed: int, by: str, of: str, taken_for: str, mistakes: bool) -> tuple[Any, Any, Any, str]:
    """The confusions of both runs, and the images of the first that were asked for."""
    if not has_classes(run):
        return None, None, gr.update(value=[]), ""
    runs = pair(run, other)
    reports = {name: answers(one, METHODS[by]) for name, one in runs.items()}
    report, x = reports[run], test_images(get_run(run)).x
    rows = chosen(report, of, taken_for, mistakes)
    table = report.images.set_index("image")
    items = [
        (picture(x[row], scale=max(1, 96 // x.shape[-1])), f"{table['class'][row]} as {table['predicted'][row]}")
        for row in rows[:MOST]
    ]
    plots = [_named(confusion(one), name) for name, one in reports.items()]
    of_other = (
        f"; {other} is wrong on {len(set(rows) & set(chosen(reports[other], ANY, ANY, True)))} of them" if len(runs) > 1 else ""
    )
    more = f", the {MOST} least sure shown" if len(rows) > MOST else ""
    note = f"**{len(rows)} of {len(table)}** test images by {run} and {by}{of_other}{more}. Choose one to see it above."
    return plots[0], plots[1] if len(plots) > 1 else None, gr.update(value=items, selected_index=None), note


def pick(run: str, by: str, of: str, taken_for: str, mistakes: bool, event: gr.SelectData) -> tuple[int, None]:
    """The test image that was chosen in the gallery."""
    return chosen(answers(get_run(run), METHODS[by]), of, taken_for, mistakes)[event.index], None


def _named(figure: Any, name: str) -> Any:
    """The figure with a run's name before its title, where two of a kind stand side by side."""
    title = figure.layout.title.text.split(", by")[0]
    return figure.update_layout(title_text=f"{name}: {title[0].lower()}{title[1:]}", title_font_size=14)


# --- the tab ----------------------------------------------------------------------------------------------------------


def code(run: str, other: str, seed: int, index: int, seen: Seen | None) -> Code:
    """The scores of the image, and those of the whole split by the command line."""
    first, source = "", f"{test_code(run)}.x[{int(index)}:{int(index) + 1}]"
    if seen is not None and seen[2] == int(index):
        first, source = "import torch\n", f"torch.tensor([{seen[0]}])  # {seen[1]}"
    python = (
        f'{first}import rrepa_lab as rl\n\nrun = rl.load("{run}")\nx = {source}\n'
        'for method in ("gradient", "iterated", "bayes"):\n'
        "    c = rl.classify(run, x, method)\n"
        "    print(method, run.classes[c.label[0]], c.scores)\n"
        "rl.evidence(run, x)  # by block\n"
    )
    return Code(f"rrepa-lab classify {run} --split test --method gradient", python)


def fit(run: rl.Run, index: int) -> dict[str, Any]:
    """The test images of another run."""
    most = len(test_images(run).x) - 1
    return {"image": gr.Slider(maximum=most, value=min(int(index), most))}


def fit_browser(run: rl.Run, by: str, of: str, taken_for: str, mistakes: bool) -> dict[str, Any]:
    """The classes of another run."""
    choices = [ANY, *run.classes]
    return {
        key: gr.Dropdown(choices=choices, value=value if value in choices else ANY)
        for key, value in (("of", of), ("said", taken_for))
    }


def build(bar: Bar) -> Sequence[Panel]:
    """The tab."""
    run = get_run(FIRST)
    gr.Markdown(
        "No classifier was trained. **Which label would have made this image more likely?** "
        "The flow is asked once, and the gradient answers for all classes."
    )
    seen = gr.State(None)
    with gr.Row():
        with gr.Column(min_width=300), gr.Tabs():
            with gr.Tab("Test image"):
                index = gr.Slider(
                    0, TESTED - 1, 3, step=1, label="Test image", info="none of them was trained on",
                    elem_id="index",
                )  # fmt: skip
            with gr.Tab("Draw") as draw_tab:
                gr.Markdown("Draw a digit with the mouse or a finger; it is classified after every stroke.")
                pad = only_uploads(gr.Sketchpad(
                    show_label=False, canvas_size=(280, 280), fixed_canvas=True, height=360, layers=False, transforms=(),
                    buttons=[], brush=gr.Brush(default_size=24, colors=["#000000"], color_mode="fixed"), elem_id="pad",
                ))  # fmt: skip
            with gr.Tab("Upload"):
                file = picture_field(sources=["upload", "clipboard"], label="Picture", height=240)
        with gr.Column(scale=2, min_width=300), gr.Row():
            shown = gr.HTML(elem_id="seen", min_height=150)
            with gr.Column(min_width=200):
                said = gr.Markdown(elem_id="verdict")
                sure = gr.Markdown(elem_id="verdict-bayes")
    with gr.Row():
        by_step, by_bayes = (
            gr.Plot(show_label=False, label=words, elem_id=place, min_width=300)
            for words, place in (("Scores by one gradient step", "by-step"), ("Scores by Bayes' rule", "by-bayes"))
        )
    evidence = gr.Plot(show_label=False, label="Evidence by block", elem_id="evidence")
    gr.Markdown("### Step by step\nThe same gradient, followed for twenty steps: the soft label climbs towards a class.")
    with gr.Row(equal_height=False):
        step = gr.Slider(0, STEPS, STEPS, step=1, label="Gradient steps", elem_id="step")
        play = gr.Button("Play", size="sm", scale=0, min_width=120)
        stop = gr.Button("Stop", size="sm", scale=0, min_width=120)
    with gr.Row():
        races = [gr.Plot(show_label=False, label=f"Race {n}", elem_id=f"race-{n}", min_width=300) for n in (1, 2)]
    gr.Markdown("### Where they are wrong\nThe whole test split, answer by answer.")
    with gr.Row():
        by = gr.Radio(list(METHODS), value=next(iter(METHODS)), label="Method", info="one pass, twenty, or one for each class")
        of = gr.Dropdown([ANY, *run.classes], value=ANY, label="Images of class")
        taken_for = gr.Dropdown([ANY, *run.classes], value=ANY, label="Taken for")
        mistakes = gr.Checkbox(True, label="Show mistakes", info="only the wrong answers", elem_id="mistakes")
    note = gr.Markdown(elem_id="browse-note")
    gallery = gr.Gallery(
        show_label=False, label="Test images", columns=8, height="auto", allow_preview=False, object_fit="contain",
        interactive=False, buttons=[], elem_id="mistakes-gallery",
    )  # fmt: skip
    with gr.Row():
        tables = [gr.Plot(show_label=False, label=f"Confusion {n}", elem_id=f"confusion-{n}", min_width=300) for n in (1, 2)]
    draw_tab.select(None, js=TAKE_BRUSH)
    for event, take, source in ((pad.change, drawing, pad), (file.upload, upload, file)):
        event(computes(take), [bar.run, index, source], seen, trigger_mode="always_last", **QUIET)
    gallery.select(told(pick), [bar.run, by, of, taken_for, mistakes], [index, seen], **HIDDEN)
    playing = play.click(film, None, step, concurrency_id="film", concurrency_limit=8, **HIDDEN)
    stop.click(None, cancels=playing)
    return [
        Panel({"image": index}, [shown, said], judge, code, fit, [seen]),
        Panel({}, [by_step], weigh, uses=[index, seen], locked=False),
        Panel({}, [by_bayes, evidence, sure], weigh_exactly, uses=[index, seen], locked=False),
        Panel({"step": step}, races, race, uses=[index, seen], locked=False),
        Panel(
            {"by": by, "of": of, "said": taken_for, "mistakes": mistakes},
            [*tables, gallery, note],
            browse,
            fit=fit_browser,
            slow=True,
        ),
    ]


if __name__ == "__main__":
    serve([sys.modules[__name__]])
