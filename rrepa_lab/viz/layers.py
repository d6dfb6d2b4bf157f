"""Tables of measurements by layer become heat maps and curves; means over seeds are the only thing computed."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rrepa_lab.errors import LabError
from rrepa_lab.viz.theme import COLOURS, INK, SCALE, SYMBOLS, one_of, styled

_NAMES = {
    "linear_accuracy": "accuracy of a linear probe", "knn_accuracy": "accuracy of a k-NN probe", "cknna": "CKNNA",
    "cka": "linear CKA", "mutual_knn": "mutual k-NN", "teacher_cosine": "cosine to the teacher",
    "gradient_accuracy": "one gradient step", "bayes_accuracy": "Bayes' rule", "iterated_accuracy": "gradient ascent",
}  # fmt: skip


def layer_map(table: pd.DataFrame, metric: str = "linear_accuracy") -> go.Figure:
    """Block x layer heat maps of one metric, one for each run, on one colour scale; a run's best layer is marked by a star.

    Several seeds of a run are averaged. `table` is one of `rl.probe` or `rl.similarity`, or several put together.
    """
    rows = _layers(table, metric)
    runs = list(dict.fromkeys(rows["run"]))
    figure = make_subplots(1, len(runs), subplot_titles=runs, shared_yaxes=True, horizontal_spacing=0.03)
    for column, run in enumerate(runs, start=1):
        cells = rows[rows["run"] == run].groupby(["block", "layer", "module_path"], as_index=False)["value"].mean()
        wide, paths = (cells.pivot(index="block", columns="layer", values=name) for name in ("value", "module_path"))
        best = cells.loc[cells["value"].idxmax()]
        text = wide.map(lambda value: "" if pd.isna(value) else f"{value:.3f}")
        text.loc[best["block"], best["layer"]] += " ★"
        figure.add_trace(
            go.Heatmap(
                z=wide.to_numpy(), x=[str(layer) for layer in wide.columns], y=[str(block) for block in wide.index],
                text=text.to_numpy(), texttemplate="%{text}" if wide.size <= 64 else None, customdata=paths.to_numpy(),
                coloraxis="coloraxis", xgap=2, ygap=2, name=run,
                hovertemplate=f"{run}<br>block %{{y}}, layer %{{x}}<br>%{{customdata}}<br>{metric} %{{z:.4f}}<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_yaxes(title="block, from the image (1) to the noise", col=1)
    figure.update_layout(coloraxis={"colorscale": SCALE, "colorbar": {"title": {"text": ""}, "thickness": 12}})
    figure.update_annotations(font={"size": 12})
    return styled(
        figure,
        f"{_name(metric)}, block by layer",
        _caption(rows, table),
        height=150 + 45 * rows["block"].nunique(),
        legend=False,
    )


def layer_curves(table: pd.DataFrame, metric: str = "linear_accuracy") -> go.Figure:
    """One curve over all layers for each run, with a band of one standard deviation over its seeds.

    Rows of classifiers (tap "", as `rl.probe(classifiers=["gradient"])` adds them) become levels in the run's colour, and
    those of the baselines levels in grey. With "gradient" this is Figure 4 of R-REPA (arXiv 2511.22345).
    """
    rows = _layers(table, metric)
    figure = go.Figure()
    runs = list(dict.fromkeys(rows["run"]))
    for place, run in enumerate(runs):
        colour = COLOURS[place % len(COLOURS)]
        own = rows[rows["run"] == run]
        cells = own.groupby(["block", "layer"])["value"].agg(["mean", "std"]).reset_index()
        x = [f"{block}.{layer}" for block, layer in zip(cells["block"], cells["layer"], strict=True)]
        if own["train_seed"].nunique() > 1:
            low, high = (cells["mean"] - cells["std"]).tolist(), (cells["mean"] + cells["std"]).tolist()
            figure.add_scatter(
                x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=colour, opacity=0.18, line={"width": 0},
                hoverinfo="skip", showlegend=False, legendgroup=run, mode="lines",
            )  # fmt: skip
        figure.add_scatter(
            x=x, y=cells["mean"], name=run, legendgroup=run, mode="lines+markers", line={"color": colour},
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8},
            hovertemplate=f"{run}<br>block.layer %{{x}}<br>{metric} %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
        levels = table[(table["run"] == run) & (table["tap"] == "")].groupby("metric")["value"].mean()
        at = x[round(place * (len(x) - 1) / max(1, len(runs)))]  # so that the words of two runs do not meet
        for (name, value), dash in zip(levels.items(), ("dash", "dot", "dashdot"), strict=False):
            _level(figure, x, at, value, f"{run}: {_name(str(name))}", colour, dash)
    baselines = table[(table["metric"] == metric) & table["tap"].isin(("pixels", "encoder"))]
    for name, value in baselines.groupby("tap")["value"].mean().items():
        _level(figure, x, x[-1], value, str(name), INK, "dot" if name == "pixels" else "solid")
    figure.update_xaxes(title="block.layer, from the image to the noise", type="category")
    figure.update_yaxes(title=_name(metric))
    return styled(figure, f"{_name(metric)}, layer by layer", _caption(rows, table), height=430)


def pair_map(table: pd.DataFrame, metric: str = "cka") -> go.Figure:
    """Every tap of one run against every tap of another: a heat map of `rl.similarity(run, other, other_taps=...)`."""
    rows = table[(table["metric"] == metric) & (table.get("other_tap", "") != "")]
    if rows.empty:
        raise LabError(f"the table compares no taps of two runs by {metric}")
    mine, theirs = (list(dict.fromkeys(rows[name])) for name in ("tap", "other_tap"))
    wide = rows.pivot(index="tap", columns="other_tap", values="value").loc[mine, theirs]
    figure = go.Figure(
        go.Heatmap(
            z=wide.to_numpy(), x=theirs, y=mine, colorscale=SCALE, colorbar={"thickness": 12},
            hovertemplate="%{y} with %{x}<br>" + metric + " %{z:.4f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title=one_of(rows["other"]), type="category", tickangle=-60)
    figure.update_yaxes(title=one_of(rows["run"]), type="category", autorange="reversed")
    styled(figure, f"{_name(metric)} between two runs", _caption(rows, table), height=540, legend=False)
    below = 90  # the names of the taps stand upright under the axis
    bottom = figure.layout.margin.b + below
    figure.update_annotations(yshift=-50 - below)
    return figure.update_layout(margin={"l": 130, "b": bottom}, height=figure.layout.height + below)


def _layers(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    rows = table[(table["metric"] == metric) & (table["layer"] > 0)]
    if rows.empty:
        known = ", ".join(sorted(set(table.loc[table["layer"] > 0, "metric"])))
        raise LabError(f"the table has no layer measured by {metric!r}; it has: {known or 'none'}")
    for column in ("direction", "label_fed", "guidance", "pool", "noise_std", "other"):
        if column in rows and rows[column].nunique() > 1:
            raise LabError(f"the table mixes {column} {one_of(rows[column])} for {metric}: choose one")
    return rows


def _name(metric: str) -> str:
    name = _NAMES.get(metric, metric)
    return name[0].upper() + name[1:]


def _level(figure: go.Figure, x: list[str], at: str, value: float, name: str, colour: str, dash: str) -> None:
    """A level across the figure, with its name and value written on it at one place."""
    figure.add_scatter(
        x=[x[0], x[-1]], y=[value, value], name=name, mode="lines", showlegend=False,
        line={"color": colour, "dash": dash, "width": 1.5}, hovertemplate=f"{name} %{{y:.4f}}<extra></extra>",
    )  # fmt: skip
    where = "right" if at == x[-1] else "left"
    figure.add_annotation(
        x=at, y=value, text=f"{name} {value:.3f}", xanchor=where, yanchor="bottom", showarrow=False,
        font={"color": colour, "size": 11},
    )  # fmt: skip


def _caption(rows: pd.DataFrame, table: pd.DataFrame) -> str:
    """n, seeds and protocol of the rows shown."""
    what = "real images" if one_of(rows["direction"]) == "forward" else "generated from fresh noise"
    if "pool" in rows:
        what += f", {'mean over tokens' if one_of(rows['pool']) == 'mean' else 'all tokens'}"
    label = "no label fed" if one_of(rows["label_fed"]) == "none" else "label fed"
    seeds = sorted(set(rows["train_seed"]))
    trained = f"{len(seeds)} training seeds, mean (band: standard deviation)" if len(seeds) > 1 else f"training seed {seeds[0]}"
    parts = [f"n = {one_of(rows['n'])} {what}", label, trained]
    if (rows["guidance"] > 0).any():
        parts.append(f"guidance {one_of(rows['guidance'])}")
    if "probe" in rows:
        parts.append(f"trained on {one_of(rows['n_train'])}: {one_of(rows['probe'])}")
    if "other" in rows:
        parts.append(f"compared with {one_of(rows['other'])}")
    if "standard_error" in rows and rows["standard_error"].notna().any():
        parts.append(f"binomial standard error at most {rows['standard_error'].max():.3f}")
    return "; ".join(parts)
