"""Classification of an image by two flows without a classifier: one gradient step, gradient ascent, or Bayes' rule."""

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
from gradio.blocks import Block
from page.panels import Code, Panel, Sidebar, Tab, Values
from server.handlers import model_lock, show_errors
from server.runs import DEFAULT_RUN, answering, by_run, get_run, image_word, missing_data, test_code, test_images
from server.settings import PRIVATE
from tabs.classify.input import NOT_TRAINED_ON, build_input, connect_input, subject_of
from tabs.classify.results import ANY, CHART_DELAY_SECONDS, METHODS, STEPS, classified, matching_rows, report_of
from tabs.classify.view import ANSWERS, IMAGE, ClassifyView

import rrepa_lab as rl
from rrepa_lab.analysis.noise import CLEAN, image_noise
from rrepa_lab.viz.classes import class_race, class_scores, confusion, evidence_map
from rrepa_lab.viz.html import picture_table
from rrepa_lab.viz.images import picture

NAME, TITLE = "classify", "Classify"
SECONDS_PER_STEP = 0.25  # of Play
MAX_GALLERY = 60  # images in the gallery of answers


def has_classes(name: str) -> bool:
    """Whether there is anything to classify; the verdict reports it where there is not."""
    return get_run(name).flow.config.classes > 0


# --- one image --------------------------------------------------------------------------------------------------------


def draw_verdict(view: ClassifyView) -> tuple[str, str]:
    """The image as the flow reads it, and the answers of one gradient step."""
    subject = subject_of(view.run, view.index, view.picture)
    runs, left_out = answering(view.run, view.other)
    inputs = {name: image_noise(run).words for name, run in runs.items()}
    lines = [f"Image: {subject.name}." + ("" if {*inputs.values()} == {CLEAN} else f" Input: {by_run(inputs)}.")]
    for name, run in runs.items():
        result = classified(run, "gradient", subject.x)
        best, *others = (int(k) for k in result.top(2).labels[0])
        mark = "" if subject.label is None else " ✓" if best == subject.label else " ✗"
        ahead = f", {float(result.margin[0]):.2f} nats before {run.classes[others[0]]}" if others else ", its only class"
        lines.append(f"- **{name}** says **{run.classes[best]}**{mark}{ahead}")
    lines += ["", left_out] if left_out else []
    return picture_table({subject.name: {"": subject.x[0]}}, what="input of the flow"), "\n".join(lines)


def draw_gradient(view: ClassifyView) -> Any:
    """The scores by one gradient step."""
    time.sleep(CHART_DELAY_SECONDS)
    if not has_classes(view.run):
        return None
    subject = subject_of(view.run, view.index, view.picture)
    results = {name: classified(run, "gradient", subject.x) for name, run in answering(view.run, view.other)[0].items()}
    return class_scores(results, get_run(view.run).classes, "gradient", what=subject.name)


def draw_bayes(view: ClassifyView) -> tuple[Any, Any, str]:
    """The scores by Bayes' rule, the evidence by block, and the posterior of the best class."""
    time.sleep(CHART_DELAY_SECONDS)
    if not has_classes(view.run):
        return None, None, ""
    subject = subject_of(view.run, view.index, view.picture)
    (runs, _), classes = answering(view.run, view.other), get_run(view.run).classes
    results = {name: classified(run, "bayes", subject.x) for name, run in runs.items()}
    with model_lock:
        parts = {name: rl.evidence(run, subject.x.to(run.device))[0].cpu() for name, run in runs.items()}
    lines = []
    for name, result in results.items():
        best, posterior = runs[name].classes[int(result.label[0])], float(result.probability[0].max())
        lines.append(f"- **{name}** by Bayes' rule: {best}, {posterior:.1%} sure")
    charts = class_scores(results, classes, "bayes", what=subject.name), evidence_map(parts, classes, subject.name)
    return *charts, "\n".join(lines)


def draw_ascent(view: ClassifyView) -> tuple[Any, Any]:
    """The scores of the classes up to a step of gradient ascent, for each run."""
    if not has_classes(view.run):
        return None, None
    subject = subject_of(view.run, view.index, view.picture)
    plots = []
    for name, run in answering(view.run, view.other)[0].items():
        result = classified(run, "iterated", subject.x)
        plots.append(_named(class_race(result, run.classes, truth=subject.label, run=subject.name, until=view.step), name))
    return plots[0], plots[1] if len(plots) > 1 else None


def play_steps() -> Iterator[int]:
    """The steps of the ascent, SECONDS_PER_STEP apart."""
    for step in range(STEPS + 1):
        yield step
        time.sleep(SECONDS_PER_STEP)


# --- the answers over the test split ----------------------------------------------------------------------------------


def draw_answers(view: ClassifyView) -> tuple[Any, Any, Any, str]:
    """The confusions of both runs, and the images of the first that match the choice."""
    if not has_classes(view.run):
        return None, None, gr.update(value=[]), ""
    runs, _ = answering(view.run, view.other)
    if missing := missing_data(get_run(view.run)):
        return None, None, gr.update(value=[]), f"Nothing to show: {missing}."
    reports = {name: report_of(run, METHODS[view.method]) for name, run in runs.items()}
    report, x = reports[view.run], test_images(get_run(view.run)).x
    rows = matching_rows(report, view.of, view.taken_for, view.mistakes)
    table = report.images.set_index("image")
    items = [
        (picture(x[row], scale=max(1, 96 // x.shape[-1])), _breakable(f"{table['class'][row]} as {table['predicted'][row]}"))
        for row in rows[:MAX_GALLERY]
    ]
    plots = [_named(confusion(one), name) for name, one in reports.items()]
    note = f"**{len(rows)} of {len(table)}** test images by {view.run} and {view.method}"
    if len(runs) > 1:
        shared = set(rows) & set(matching_rows(reports[view.other], ANY, ANY, True))
        note += f"; {view.other} is wrong on {len(shared)} of them"
    if len(rows) > MAX_GALLERY:
        note += f", the {MAX_GALLERY} least sure shown"
    note += ". Choose one to classify it above."
    return plots[0], plots[1] if len(plots) > 1 else None, gr.update(value=items, selected_index=None), note


def _breakable(text: str) -> str:
    """A caption that may also be wrapped after an underscore."""
    return text.replace("_", "_\u200b")


def pick(view: ClassifyView, place: int) -> tuple[int, None]:
    """The test image at a place of the gallery, and no own picture."""
    return matching_rows(report_of(get_run(view.run), METHODS[view.method]), view.of, view.taken_for, view.mistakes)[
        place
    ], None


def _named(figure: Any, name: str) -> Any:
    """The figure with a run's name before its title, where two of a kind stand side by side."""
    title = figure.layout.title.text.split(", by")[0]
    return figure.update_layout(title_text=f"{name}: {title[0].lower()}{title[1:]}", title_font_size=14)


# --- the tab ----------------------------------------------------------------------------------------------------------


def code(view: ClassifyView) -> Code:
    """The scores of the image, and those of the whole split by the command line."""
    imports, source = "", f"{test_code(view.run)}[{view.index}:{view.index + 1}]"
    if view.picture is not None and view.picture.test_image == view.index:
        imports, source = "import torch\n", f"torch.tensor([{view.picture.values}])  # {view.picture.source}"
    python = (
        f'{imports}import rrepa_lab as rl\n\nrun = rl.load("{view.run}")\nx = {source}\n'
        'for method in ("gradient", "iterated", "bayes"):\n'
        "    c = rl.classify(run, x, method)\n"
        "    print(method, run.classes[c.label[0]], c.scores)\n"
        "rl.evidence(run, x)  # by block\n"
    )
    return Code(f"rrepa-lab classify {view.run} --split test --method gradient", python)


def fit(run: rl.Run, view: ClassifyView) -> dict[str, Any]:
    """The test images and the classes of another run."""
    last, choices = len(test_images(run).x) - 1, [ANY, *run.classes]
    info = "of this run, whose test images are not at hand" if missing_data(run) else NOT_TRAINED_ON
    slider = gr.Slider(maximum=last, value=min(view.index, last), label=image_word(run).capitalize(), info=info)
    updates: dict[str, Any] = {"index": slider}
    for name in ("of", "taken_for"):
        value = getattr(view, name)
        updates[name] = gr.Dropdown(choices=choices, value=value if value in choices else ANY)
    return updates


def build(sidebar: Sidebar) -> Tab:
    """The tab."""
    default = ClassifyView()
    gr.Markdown(
        "No classifier was trained. **Which label would have made this image more likely?** "
        "One pass through the flow gives a gradient with a score for every class."
    )
    entry, shown, verdict, bayes_line = build_input(default.index)
    with gr.Row():
        gradient_chart, bayes_chart = (
            gr.Plot(show_label=False, label=label, elem_id=place, min_width=300)
            for label, place in (("Scores by one gradient step", "by-step"), ("Scores by Bayes' rule", "by-bayes"))
        )
    evidence = gr.Plot(show_label=False, label="Evidence by block", elem_id="evidence")
    gr.Markdown("### Step by step\nThe same gradient, followed for twenty steps: gradient ascent on the soft label.")
    with gr.Row(equal_height=False):
        step = gr.Slider(0, STEPS, default.step, step=1, label="Gradient steps", elem_id="step")
        play = gr.Button("Play", size="sm", scale=0, min_width=120)
        stop = gr.Button("Stop", size="sm", scale=0, min_width=120)
    with gr.Row():
        ascents = [gr.Plot(show_label=False, label=f"Ascent {n}", elem_id=f"race-{n}", min_width=300) for n in (1, 2)]
    playing = play.click(play_steps, None, step, concurrency_id="film", concurrency_limit=8, **PRIVATE)
    stop.click(None, cancels=playing)
    answers, outputs = _build_answers(default)
    tab = Tab(
        ClassifyView, sidebar, {"index": entry["index"], "step": step, **answers, "picture": entry["picture"]},
        [
            Panel([shown, verdict], draw_verdict, IMAGE),
            Panel([gradient_chart], draw_gradient, IMAGE, locked=False),
            Panel([bayes_chart, evidence, bayes_line], draw_bayes, IMAGE, locked=False),
            Panel(ascents, draw_ascent, ("step", *IMAGE), locked=False),
            Panel(outputs, draw_answers, ANSWERS, slow=True),
        ],
        code, fit,
    )  # fmt: skip
    connect_input(tab, entry)
    _connect_gallery(tab, outputs[2])
    return tab


def _build_answers(default: ClassifyView) -> tuple[dict[str, Any], list[Any]]:
    """The controls of the answers over the test split, and what is drawn: two confusions, the gallery and a note."""
    gr.Markdown("### Where they are wrong\nThe whole test split, answer by answer.")
    choices = [ANY, *get_run(DEFAULT_RUN).classes]
    with gr.Row():
        method = gr.Radio(list(METHODS), value=default.method, label="Method", info="one pass, twenty, or one for each class")
        of = gr.Dropdown(choices, value=default.of, label="Images of class")
        taken_for = gr.Dropdown(choices, value=default.taken_for, label="Taken for")
        mistakes = gr.Checkbox(default.mistakes, label="Show mistakes", info="only the wrong answers", elem_id="mistakes")
    note = gr.Markdown(elem_id="browse-note")
    gallery = gr.Gallery(
        show_label=False, label="Test images", columns=8, height="auto", allow_preview=False, object_fit="contain",
        interactive=False, buttons=[], elem_id="mistakes-gallery",
    )  # fmt: skip
    with gr.Row():
        tables = [gr.Plot(show_label=False, label=f"Confusion {n}", elem_id=f"confusion-{n}", min_width=300) for n in (1, 2)]
    return {"method": method, "of": of, "taken_for": taken_for, "mistakes": mistakes}, [*tables, gallery, note]


def _connect_gallery(tab: Tab, gallery: gr.Gallery) -> None:
    """Classify the image that was chosen in the gallery."""

    @show_errors
    def choose(values: Values, event: gr.SelectData) -> tuple[int, None]:
        return pick(tab.view_of(values), event.index)

    inputs: set[Block] = {tab.sidebar.run, *(tab.controls[name] for name in ANSWERS)}
    gallery.select(choose, inputs, [tab.controls["index"], tab.controls["picture"]], **PRIVATE)
