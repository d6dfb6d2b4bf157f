"""Classifications become figures: the scores of an image, their race, and the answers over a set."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from rrepa_lab.analysis.classify import Classification
from rrepa_lab.analysis.report import ClassificationReport
from rrepa_lab.measurements.metrics import metric_of
from rrepa_lab.viz.theme import COLOURS, INK, SCALE, SYMBOLS, class_axis, legend_lines, one_of, styled

_UNITS = {"gradient": "d log p / d logit, nats", "bayes": "log posterior, nats", "iterated": "logit of the soft label"}


def class_scores(
    results: Mapping[str, Classification], classes: Sequence[str], method: str, row: int = 0, what: str = "one image"
) -> go.Figure:
    """Bars of the class scores of one image for several runs, each run's prediction outlined; `what` names the image."""
    figure = go.Figure()
    for (name, result), colour in zip(results.items(), COLOURS, strict=False):
        scores, best = result.scores[row].tolist(), int(result.label[row])
        lines = [2.5 if k == best else 0 for k in range(len(scores))]
        figure.add_bar(name=name, x=list(classes), y=scores, marker={"color": colour, "line": {"width": lines, "color": INK}})
    below = class_axis(figure, classes)
    figure.update_yaxes(title=_UNITS.get(method, "score"))
    caption = f"{what}; outlined: the run's prediction"
    return styled(figure, f"Class scores by {_method(method)}", caption, height=340, below=below)


def class_race(
    result: Classification,
    classes: Sequence[str],
    row: int = 0,
    truth: int | None = None,
    run: str = "",
    top: int = 10,
    until: int | None = None,
) -> go.Figure:
    """The scores of one image's classes step by step (iterated) or draw by draw; the `top` best at the end are drawn.

    `truth` is the class it belongs to, drawn with a thicker line. `until` ends the curves after that many steps, on the axes
    of the whole race.
    """
    path = result.path[:, row].tolist()
    shown = path if until is None else path[: until + 1]
    iterated = result.method == "iterated"
    steps = list(range(len(path))) if iterated else list(range(1, len(path) + 1))
    order = sorted(range(len(classes)), key=lambda k: -path[-1][k])[:top]
    figure = go.Figure()
    for place, k in enumerate(order):
        figure.add_scatter(
            name=classes[k], x=steps[: len(shown)], y=[scores[k] for scores in shown], mode="lines+markers",
            line={"color": COLOURS[place % len(COLOURS)], "width": 4 if k == truth else 1.5},
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 6},
        )  # fmt: skip
    figure.update_xaxes(title="gradient step" if iterated else "noise draws averaged", dtick=max(1, len(steps) // 10))
    figure.update_yaxes(title=_UNITS.get(result.method, "score"))
    right = "" if truth is None else f" (truth: {classes[truth]}, thick line)"
    caption = f"one image{right}, {len(order)} best of {len(classes)} classes, best first" + (f"; {run}" if run else "")
    if len(shown) < len(path):
        low, high = min(map(min, path)), max(map(max, path))
        figure.update_xaxes(range=[steps[0] - 0.5, steps[-1] + 0.5])
        figure.update_yaxes(range=[low - 0.05 * (high - low), high + 0.05 * (high - low)])
    winner = classes[max(range(len(classes)), key=lambda k: shown[-1][k])]
    title = f"Highest score {'at the end' if len(shown) == len(path) else 'so far'}: {winner}, by {_method(result.method)}"
    return styled(figure, title, caption, height=350, legend=legend_lines([classes[k] for k in order]))


def evidence_map(parts: Mapping[str, Tensor], classes: Sequence[str], what: str = "one image") -> go.Figure:
    """The class scores of each block: one image's `rl.evidence` (N, K) of several runs, on one scale around zero."""
    figure = make_subplots(1, len(parts), subplot_titles=list(parts), shared_yaxes=True, horizontal_spacing=0.04)
    most = max(float(values.abs().max()) for values in parts.values())
    for column, (name, values) in enumerate(parts.items(), start=1):
        blocks = [str(number) for number in range(1, len(values) + 1)]
        figure.add_heatmap(
            z=values.numpy(), x=list(classes), y=blocks, coloraxis="coloraxis", xgap=1, ygap=2, name=name, row=1, col=column,
            hovertemplate=f"{name}<br>block %{{y}}, class %{{x}}: %{{z:.3f}} nats per logit<extra></extra>",
        )  # fmt: skip
    below = class_axis(figure, classes, columns=len(parts))
    figure.update_yaxes(type="category")
    figure.update_yaxes(title="block", col=1)
    figure.update_layout(
        coloraxis={
            "colorscale": "PuOr", "cmin": -most, "cmax": most, "colorbar": {"thickness": 12, "title": {"text": "nats"}},
        }
    )  # fmt: skip
    figure.update_annotations(font={"size": 12})
    caption = f"{what}; the one-step score split by block, nats per logit; a column sums to the class's score"
    return styled(figure, "Class scores by block", caption, height=260, legend=0, below=below)


def confusion(report: ClassificationReport) -> go.Figure:
    """Counts of answers by class, coloured by their part of the class."""
    table = report.confusion
    counts = table.pivot(index="class", columns="predicted", values="count")
    names = list(dict.fromkeys(table["class"]))
    counts = counts.loc[names, names]
    parts = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    figure = go.Figure(
        go.Heatmap(
            z=parts.to_numpy(), x=names, y=names, text=counts.to_numpy(), texttemplate="%{text}" if len(names) <= 20 else None,
            colorscale=SCALE, zmin=0, zmax=1, xgap=1, ygap=1, colorbar={"title": {"text": "part of<br>the class"}},
            hovertemplate="class %{y}, answered %{x}: %{text} images, %{z:.3f} of the class<extra></extra>",
        )
    )  # fmt: skip
    below = class_axis(figure, names, "answer")
    figure.update_yaxes(title="class", type="category", autorange="reversed")
    accuracy = report.summary.iloc[0]
    caption = (
        f"{_who(report)}, {accuracy['n']} images, accuracy "
        f"{accuracy['value']:.3f} ± {accuracy['standard_error']:.3f} (binomial)"
    )
    return styled(figure, "Class against answer", caption, height=420, legend=0, below=below)


def calibration(report: ClassificationReport) -> go.Figure:
    """Accuracy against confidence, bin by bin; on the diagonal the confidence is honest."""
    table = report.calibration
    figure = go.Figure()
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", name="honest", line={"color": INK, "dash": "dot"})
    figure.add_scatter(
        x=table["confidence"], y=table["accuracy"], mode="lines+markers", name=one_of(table["run"]), customdata=table["n"],
        marker={"size": 8 + 24 * (table["n"] / table["n"].sum()) ** 0.5}, line={"color": COLOURS[0]},
        hovertemplate="confidence %{x:.3f}, accuracy %{y:.3f}, %{customdata} images<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title="confidence of the answer", range=[0, 1.02])
    figure.update_yaxes(title="accuracy", range=[0, 1.04])
    error = report.summary.set_index("metric")["value"]["expected_calibration_error"]
    caption = (
        f"{_who(report)}, {table['n'].sum()} images; expected calibration error "
        f"{error:.3f}; areas show how many images a bin holds"
    )
    return styled(figure, "How far can its confidence be trusted?", caption, height=360)


def _who(report: ClassificationReport) -> str:
    about = report.summary.iloc[0]
    return f"{about['run']} (training seed {about['train_seed']}), {about['method']}, {about['split']} split"


def _method(name: str) -> str:
    """How a classification method is called in a title."""
    return metric_of(f"{name}_accuracy").label
