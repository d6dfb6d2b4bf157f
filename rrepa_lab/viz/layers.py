"""Tables of measurements by layer become heat maps and curves; means over seeds are the only thing computed."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rrepa_lab.errors import LabError
from rrepa_lab.measurements.columns import PIXELS_TAP, is_baseline
from rrepa_lab.measurements.metrics import metric_of, title_of
from rrepa_lab.measurements.spread import mean_and_spread
from rrepa_lab.viz.charts import band
from rrepa_lab.viz.theme import COLOURS, INK, SCALE, SYMBOLS, one_of, styled


def layer_map(
    table: pd.DataFrame,
    metric: str = "linear_accuracy",
    title: str = "",
    outlined: Mapping[str, Iterable[tuple[int, int]]] | None = None,
) -> go.Figure:
    """Block x layer heat maps of one metric, one for each run, on one colour scale; a run's best layer is marked by a star.

    Several seeds of a run are averaged. `table` is one of `rl.probe` or `rl.similarity`, several put together, or a mean
    over seeds with columns `sd` and `train_seeds`. `title` stands instead of the metric, which then begins the caption;
    `outlined` are, by run, the (block, layer) that were aligned.
    """
    rows = _layers(table, metric)
    runs = list(dict.fromkeys(rows["series"]))
    across, down = min(2, len(runs)), -(-len(runs) // 2)  # two side by side fit a phone
    blocks, layers = (sorted(set(rows[name].astype(int))) for name in ("block", "layer"))
    tall = 42 * len(blocks)
    names = ["<br>".join(textwrap.wrap(run, 16)) for run in runs]
    figure = make_subplots(
        down, across, subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.04, vertical_spacing=50 / (down * tall + 50)
    )
    for number, run in enumerate(runs):
        own = rows[rows["series"] == run]
        cells = _cells(own)
        wide, paths = (
            cells.pivot(index="block", columns="layer", values=name).reindex(index=blocks, columns=layers)
            for name in ("mean", "module_path")
        )
        best = cells.iloc[int(cells["mean"].argmax())]
        text = wide.map(lambda value: "" if pd.isna(value) else f"{value:.3f}")
        text.loc[best["block"], best["layer"]] += " ★"
        figure.add_trace(
            go.Heatmap(
                z=wide.to_numpy(), x=[str(layer) for layer in wide.columns], y=[str(block) for block in wide.index],
                text=text.to_numpy(), texttemplate="%{text}" if wide.size <= 64 else None, customdata=paths.to_numpy(),
                coloraxis="coloraxis", xgap=2, ygap=2, name=run,
                hovertemplate=f"{run}<br>block %{{y}}, layer %{{x}}<br>%{{customdata}}<br>{metric} %{{z:.4f}}<extra></extra>",
            ),
            row=number // 2 + 1, col=number % 2 + 1,
        )  # fmt: skip
        for block, layer in (outlined or {}).get(own["run"].iloc[0], ()):
            if block in blocks and layer in layers:
                x, y = layers.index(layer), blocks.index(block)
                figure.add_shape(
                    type="rect", x0=x - 0.47, x1=x + 0.47, y0=y - 0.45, y1=y + 0.45, line={"color": COLOURS[1], "width": 4},
                    row=number // 2 + 1, col=number % 2 + 1,
                )  # fmt: skip
    figure.update_xaxes(type="category")
    figure.update_xaxes(title="layer", row=down)
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_yaxes(title="block", col=1)
    figure.update_layout(coloraxis={"colorscale": SCALE, "colorbar": {"title": {"text": ""}, "thickness": 12}})
    figure.update_annotations(font={"size": 12})
    height = 120 + down * (40 + tall)
    star = "★ best layer" if metric_of(metric).better else "★ highest value"
    marks = f"{star}; outlined where it was aligned" if outlined else star
    caption = f"blocks and layers count from 1 at the image; {marks}; {_caption(rows)}"
    title, caption = _headed(title, f"{title_of(metric)}, block by layer", metric, caption)
    return styled(figure, title, caption, height, legend=max(name.count("<br>") for name in names))


def layer_curves(
    table: pd.DataFrame, metric: str = "linear_accuracy", levels: Sequence[str] = ("gradient_accuracy",), title: str = ""
) -> go.Figure:
    """One curve over all layers for each run, with a band of one standard deviation over its seeds.

    Beside an accuracy, rows of classifiers (tap "", as `rl.probe(classifiers=["gradient"])` adds them) become dashed levels
    in the run's colour, and those of the baselines levels in grey, as is the floor of a cosine. With "gradient" this is
    Figure 4 of R-REPA (arXiv 2511.22345). `title` stands instead of the metric.
    """
    rows = _layers(table, metric)
    figure = go.Figure()
    accuracies = metric.endswith("_accuracy")  # a level belongs on an axis of its own kind
    runs, values = list(dict.fromkeys(rows["series"])), dict[str, list[str]]()
    for place, run in enumerate(runs):
        colour = COLOURS[place % len(COLOURS)]
        cells = _cells(rows[rows["series"] == run])
        x = [f"{block}.{layer}" for block, layer in zip(cells["block"], cells["layer"], strict=True)]
        band(figure, x, cells["mean"], cells["sd"], colour, run)
        figure.add_scatter(
            x=x, y=cells["mean"], name=run, legendgroup=run, mode="lines+markers", line={"color": colour},
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8},
            hovertemplate=f"{run}<br>block.layer %{{x}}<br>{metric} %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
        shown = table[(table["run"] == run) & (table["tap"] == "") & accuracies].groupby("metric")["value"].mean()
        for name, dash in zip(levels, ("dash", "dashdot", "longdash"), strict=False):
            if name in shown:
                _level(figure, x, shown[name], f"{run}: {title_of(name)}", colour, dash)
                values.setdefault(name, []).append(f"{run} {shown[name]:.3f}")
    for text, value in _floors(rows).items():
        _level(figure, x, value, f"floor: {text}", INK, "dot", f"floor, {text} {value:.3f}", left=True)
    for baseline, value in _baselines(table, metric).items():
        pixels = baseline == PIXELS_TAP  # named at the left end, the encoder at the right: the two may be close
        _level(figure, x, value, baseline, INK, "dot" if pixels else "solid", f"{baseline} {value:.3f}", left=pixels)
    notes = [f"{title_of(name).lower()} without a probe, dashed: {', '.join(parts)}" for name, parts in values.items()]
    caption = "; ".join([*notes, _caption(rows)])
    order = [f"{block}.{layer}" for block, layer in sorted(set(zip(rows["block"], rows["layer"], strict=True)))]
    figure.update_xaxes(
        title="block.layer, from the image to the noise", type="category", categoryorder="array", categoryarray=order
    )
    figure.update_yaxes(title=title_of(metric))
    title, caption = _headed(title, f"{title_of(metric)}, layer by layer", metric, caption)
    # on a phone two short names share a line
    lines = len(runs) if max(map(len, runs)) > 16 else min(len(runs), 1 - (-len(runs) // 2))
    # and the names of the layers stand upright
    return styled(figure, title, caption, height=400, legend=lines, below=65)


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
    # the names of the taps stand upright under the axis
    styled(figure, f"{title_of(metric)} between two runs", _caption(rows), height=540, legend=0, below=140)
    return figure.update_layout(margin={"l": 130})


def _cells(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a block and layer: mean and sd over training seeds, taken here or, where the table has `sd`, there."""
    keys = ["block", "layer", "module_path"]
    if "sd" in rows:
        return rows[[*keys, "value", "sd"]].rename(columns={"value": "mean"}).reset_index(drop=True)
    return (
        mean_and_spread(rows, keys)
        .rename(columns={"value": "mean"})
        .reset_index()
        .sort_values(["block", "layer"], ignore_index=True)
    )


def _layers(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    rows = table[(table["metric"] == metric) & (table["layer"] > 0)]
    if rows.empty:
        known = ", ".join(sorted(set(table.loc[table["layer"] > 0, "metric"])))
        raise LabError(f"the table has no layer measured by {metric!r}; it has: {known or 'none'}")
    rows = rows.assign(series=_by_encoder(rows))
    for column in ("direction", "label_fed", "guidance", "pool", "noise_std", "other"):
        if column == "other" and (rows["series"] != rows["run"]).any():
            continue
        if column in rows and rows[column].nunique() > 1:
            raise LabError(f"the table mixes {column} {one_of(rows[column])} for {metric}: choose one")
    return rows


def _by_encoder(rows: pd.DataFrame) -> "pd.Series[str]":
    """Names of what is drawn: the run, or where it was compared with several encoders of its own, the run and the encoder."""
    if "other" not in rows or (rows.groupby("run")["other"].nunique() <= 1).all():  # 0: probes beside similarities have none
        return rows["run"]
    return rows["run"] + ", " + _short(rows["other"])


def _baselines(table: pd.DataFrame, metric: str) -> dict[str, float]:
    """Levels of raw pixels and of each encoder, which is named where there are several: name -> mean over the rows."""
    rows = table[(table["metric"] == metric) & table["tap"].map(is_baseline)]
    names = rows["tap"]
    encoders = rows["encoder"].fillna("")[names != PIXELS_TAP] if "encoder" in rows else names[:0]
    if encoders.nunique() > 1:
        names = names.where(names == PIXELS_TAP, "encoder " + _short(encoders))
    return {str(name): float(value) for name, value in rows.groupby(names, sort=False)["value"].mean().items()}


def _short(words: "pd.Series[str]") -> "pd.Series[str]":
    """Encoders by their models alone, where these differ; else with weights and layer too."""
    models = words.str.split(",").str[0]
    return models if models.nunique() == words.nunique() else words


def _headed(title: str, otherwise: str, metric: str, caption: str) -> tuple[str, str]:
    """Title and caption: a title of one's own leaves the name of the metric to the caption."""
    return (title, f"{title_of(metric)}; {caption}") if title else (otherwise, caption)


def _level(
    figure: go.Figure, x: list[str], value: float, name: str, colour: str, dash: str, text: str = "", left: bool = False
) -> None:
    """A level across the figure, with `text` on it near its left or right end."""
    figure.add_scatter(
        x=[x[0], x[:2][-1] if left else x[-2:][0], x[-1]], y=[value] * 3, name=name, mode="lines+text", showlegend=False,
        text=["", text, ""], textposition="top center", textfont={"color": colour, "size": 11},
        line={"color": colour, "dash": dash, "width": 1.5}, hovertemplate=f"{name} %{{y:.4f}}<extra></extra>",
    )  # fmt: skip


def _floors(rows: pd.DataFrame) -> dict[str, float]:
    """Where a cosine has a floor: what that knows -> its mean over the rows."""
    if "floor" not in rows:
        return {}
    known = rows.dropna(subset=["floor"])
    return {str(name): float(value) for name, value in known.groupby("floor_of")["floor"].mean().items()}


def _caption(rows: pd.DataFrame) -> str:
    """n, seeds and protocol of the rows shown."""
    what = "real images" if one_of(rows["direction"]) == "forward" else "generated images"
    parts = [f"n = {one_of(rows['n'])} {what}"]
    if one_of(rows["pool"]):
        parts[0] += ", mean over tokens" if one_of(rows["pool"]) == "mean" else ", all tokens"
    parts.append("no label fed" if one_of(rows["label_fed"]) == "none" else "label fed")
    seeds = one_of(rows["train_seeds"]) if "train_seeds" in rows else str(rows["train_seed"].nunique())
    parts.append(f"training seed {one_of(rows['train_seed'])}" if seeds == "1" else f"{seeds} training seeds, mean ± sd")
    if (rows["guidance"] > 0).any():
        parts.append(f"guidance {one_of(rows['guidance'])}")
    if "probe" in rows and one_of(rows["probe"]):
        parts.append(f"fitted on {one_of(rows['n_train'])} images, {one_of(rows['probe'])}")
    if "other" in rows and one_of(rows["other"]):
        parts.append(f"compared with {one_of(rows['other'])}")
    parts += [f"{text} alone reaches {value:.3f} (floor)" for text, value in _floors(rows).items()]
    if "standard_error" in rows and rows["standard_error"].notna().any():
        parts.append(f"standard error at most {rows['standard_error'].max():.3f}")
    return "; ".join(parts)
