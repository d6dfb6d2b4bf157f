"""Classifications become figures: the scores of an image, their race, and the answers over a set."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from rrepa_lab.analysis.classify import Classification
from rrepa_lab.analysis.report import ClassificationReport
from rrepa_lab.viz.theme import COLOURS, INK, METHOD_NAMES, SCALE, SYMBOLS, one_of, styled

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
    figure.update_xaxes(title="class", type="category")
    figure.update_yaxes(title=_UNITS.get(method, "score"))
    return styled(
        figure, f"Class scores by {METHOD_NAMES.get(method, method)}", f"{what}; outlined: the run's prediction", height=340
    )


def class_race(
    result: Classification, classes: Sequence[str], row: int = 0, truth: int | None = None, run: str = "", top: int = 10
) -> go.Figure:
    """The scores of one image's classes step by step (iterated) or draw by draw; the `top` best at the end are drawn.

    `truth` is the class it belongs to, drawn with a thicker line.
    """
    path = result.path[:, row].tolist()
    iterated = result.method == "iterated"
    steps = list(range(len(path))) if iterated else list(range(1, len(path) + 1))
    order = sorted(range(len(classes)), key=lambda k: -path[-1][k])[:top]
    figure = go.Figure()
    for place, k in enumerate(order):
        figure.add_scatter(
            name=classes[k], x=steps, y=[scores[k] for scores in path], mode="lines+markers",
            line={"color": COLOURS[place % len(COLOURS)], "width": 4 if k == truth else 1.5},
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 6},
        )  # fmt: skip
    figure.update_xaxes(title="gradient step" if iterated else "noise draws averaged", dtick=max(1, len(steps) // 10))
    figure.update_yaxes(title=_UNITS.get(result.method, "score"))
    right = "" if truth is None else f" (truth: {classes[truth]}, thick line)"
    caption = f"one image{right}, {len(order)} best of {len(classes)} classes, best first" + (f"; {run}" if run else "")
    winner = classes[order[0]]
    return styled(figure, f"Which class wins? {winner}, by {METHOD_NAMES[result.method]}", caption, height=350, legend=2)


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
    figure.update_xaxes(title="answer", type="category")
    figure.update_yaxes(title="class", type="category", autorange="reversed")
    accuracy = report.summary.iloc[0]
    caption = (
        f"{_who(report)}, {accuracy['n']} images, accuracy "
        f"{accuracy['value']:.3f} ± {accuracy['standard_error']:.3f} (binomial)"
    )
    return styled(figure, "What is taken for what?", caption, height=420, legend=0)


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
