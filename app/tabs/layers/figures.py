"""Figures of the tab "Layers": heat maps, curves over layers, and curves over training; kept for the tables they show."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from server.shipped import table_stamp
from tabs.layers.studies import Choice, aligned_taps, chosen, rows_of, study_in
from tabs.layers.tables import shipped_rows

from rrepa_lab.studies.alignment import unguided
from rrepa_lab.viz.layers import layer_curves, layer_map
from rrepa_lab.viz.training import setting_curves


def shipped_figures(name: str, metric: str, direction: str, strategies: tuple[str, ...]) -> list[Any]:
    """Heat maps and curves of a shipped table; none where no layer was measured."""
    return _shipped_figures(name, metric, direction, strategies, table_stamp(name))


@lru_cache(maxsize=48)
def _shipped_figures(
    name: str, metric: str, direction: str, strategies: tuple[str, ...], _written: tuple[int, ...]
) -> list[Any]:
    rows, _ = shipped_rows(name, metric, direction, strategies)
    return known_figures(rows, metric)


def known_figures(rows: pd.DataFrame, metric: str) -> list[Any]:
    """Heat maps and curves of the rows; none where no layer was measured."""
    if rows.empty or not (rows["layer"] > 0).any():
        return []
    accuracy = metric.endswith("_accuracy")
    return [
        layer_map(rows, metric, "Which layer predicts the class best?" if accuracy else "Which layer is like the teacher?"),
        layer_curves(rows, metric, title="Are aligned flows better?"),
    ]


@lru_cache(maxsize=48)
def compared_figures(
    folder: Path | None, written: tuple[int, ...], metric: str, direction: str, choices: tuple[Choice, Choice]
) -> list[Any]:
    """Heat maps and curves of the settings A and B of a study, None for one that has no rows."""
    study = study_in(folder, written)
    settings = chosen(study, *choices)
    rows = rows_of(study.layers, settings)
    rows = unguided(rows, metric, direction) if len(rows) else rows
    figures: list[Any] = [None] * 2
    if len(rows):
        pinned = rows[rows["run"].str.startswith(("A: ", "B: "))]
        outlined = {name: [(tap.block, int(tap.layer)) for tap in aligned_taps(one)] for name, one in settings.items()}
        if len(pinned):
            figures[0] = layer_map(pinned, metric, "Which layers improve?", outlined)
        figures[1] = layer_curves(rows, metric, title="Do the other layers improve too?")
    return figures


@lru_cache(maxsize=48)
def training_figures(folder: Path | None, written: tuple[int, ...], choices: tuple[Choice, Choice]) -> list[Any]:
    """Curves over the training of A and B: likelihood, similarity, accuracy; None for one that was not recorded."""
    study = study_in(folder, written)
    curves = rows_of(study.curves, chosen(study, *choices))
    recorded = set(curves["metric"])
    names = ("held_out_nats_per_dim", "similarity", "held_out_accuracy")
    return [setting_curves(curves, name) if name in recorded else None for name in names]


def plots(figures: Sequence[Any], count: int) -> list[Any]:
    """Plots of these figures, filled up to `count`; those without a figure are hidden."""
    filled = [*figures, *[None] * (count - len(figures))]
    return [gr.Plot(visible=False) if figure is None else gr.Plot(figure, visible=True) for figure in filled]
