"""Settings side by side, and the report they go into."""

import html
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from rrepa_lab import __version__
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.measurements.claims import VERDICT_RULE, verdict_table
from rrepa_lab.measurements.compare import protocols, settings_in, wide
from rrepa_lab.viz.theme import COLOURS, SYMBOLS, styled


def spread(table: pd.DataFrame, metric: str) -> go.Figure:
    """Mean and standard deviation over training seeds of every setting, one below the other; colours by the first setting.

    `table` is one of `rl.compare`.
    """
    rows = table[table["metric"] == metric]
    if rows.empty:
        raise unknown("metric", metric, dict.fromkeys(table["metric"]))
    rows = rows.dropna(subset=["value"])
    if rows.empty:
        raise LabError(f"{metric} has no value: it is empty or not a number for every setting")
    keys = settings_in(table)
    names = _names(keys, rows)
    kinds = list(dict.fromkeys(rows[keys[0]])) if keys else ["all"]
    figure = go.Figure()
    for place, kind in enumerate(kinds):
        part = rows[rows[keys[0]] == kind] if keys else rows
        figure.add_scatter(
            x=part["value"], y=_names(keys, part), mode="markers", name=str(kind),
            marker={"color": COLOURS[place % len(COLOURS)], "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 10},
            error_x={"type": "data", "array": part["sd"].fillna(0), "thickness": 1.5, "width": 4},
            customdata=part[["sd", "seeds"]],
            hovertemplate="%{y}<br>" + metric + " %{x:.4f} ± %{customdata[0]:.4f}, %{customdata[1]} seeds<extra></extra>",
        )  # fmt: skip
    first = rows.iloc[0]
    figure.update_xaxes(title=f"{metric}, {first['unit']}" if first["unit"] else metric)
    figure.update_yaxes(
        type="category", dtick=1, autorange="reversed", categoryorder="array", categoryarray=names, automargin=True
    )
    seeds = "one seed" if rows["seeds"].max() == 1 else f"mean ± sd over {rows['seeds'].max()} training seeds at most"
    caption = f"{seeds}; n = {first['n']}; {first['protocol']}"
    return styled(figure, metric.replace("_", " ").capitalize(), caption, 120 + 26 * len(names), legend=1)


def _names(keys: Sequence[str], rows: pd.DataFrame) -> list[str]:
    """ "reverse, blocks 3,4, layers 2" for each row, without what does not apply."""
    names = []
    for row in rows.to_dict("records"):
        parts = [str(row[key]) if key == keys[0] else f"{key.rsplit('.', 1)[-1]} {row[key]}" for key in keys if row[key] != "-"]
        names.append(", ".join(parts) or "all")
    return names


def report(
    table: pd.DataFrame,
    title: str,
    notes: str = "",
    verdicts: pd.DataFrame | None = None,
    beside: Mapping[str, pd.DataFrame] | None = None,
) -> str:
    """A page that stands alone, plotly included (about 5 MB): table, a figure for each metric, protocols, and verdicts.

    Args:
        table: of `rl.compare`.
        verdicts: of `measurements.claims.verdicts`.
        beside: other tables to be shown below it, by their titles.
    """
    import plotly.io

    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(notes)}</p>" if notes else "", _html_table(wide(table))]
    for name, other in (beside or {}).items():
        parts += [f"<h2>{html.escape(name)}</h2>", _html_table(other)]
    if verdicts is not None and len(verdicts):
        rule = f"<p>{html.escape(VERDICT_RULE)}</p>"
        parts += ["<h2>Verdicts on the paper's claims</h2>", rule, _html_table(verdict_table(verdicts))]
    scripts: bool | str = True
    for metric in dict.fromkeys(table.dropna(subset=["value"])["metric"]):
        figure = spread(table, metric)
        parts.append(plotly.io.to_html(figure, include_plotlyjs=scripts, full_html=False, config={"displaylogo": False}))
        scripts = False
    lines = "".join(f"<li>{html.escape(line.removeprefix('- '))}</li>" for line in protocols(table).splitlines())
    parts.append(f"<h2>Protocols</h2><ul>{lines}</ul><footer>rrepa_lab {__version__}</footer>")
    return _PAGE.format(title=html.escape(title), body="\n".join(part for part in parts if part))


def _html_table(table: pd.DataFrame) -> str:
    return f'<div class="scroll">{table.to_html(index=False, border=0)}</div>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }}
.scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ text-align: left; padding: .25rem .75rem; border-bottom: 1px solid #8884; vertical-align: top }}
td {{ font-variant-numeric: tabular-nums }}
footer {{ color: #808080; margin-top: 2rem }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
