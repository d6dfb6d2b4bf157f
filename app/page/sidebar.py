"""The sidebar: the pickers of runs, the seed, and lines about the run and the machine."""

from typing import Any

import gradio as gr
import pandas as pd
import torch
from page.panels import Sidebar
from page.scripts import script
from page.views import NO_OTHER
from server.runs import (
    DEFAULT_OTHER,
    DEFAULT_RUN,
    N_SAMPLES,
    NO_RUN,
    get_run,
    latents_text,
    missing_data,
    parameters,
    run_names,
    scores_of,
)
from server.settings import server_settings

from rrepa_lab.measurements.metrics import family_of, present_metric, title_of


def build_sidebar() -> tuple[Sidebar, gr.Markdown]:
    """The controls of the sidebar, and the lines about the run."""
    run = gr.Dropdown(run_names(), value=DEFAULT_RUN, label="Run")
    about = gr.Markdown(about_run(DEFAULT_RUN), elem_id="about")
    other = gr.Dropdown(other_choices(), value=DEFAULT_OTHER, label="Compare with", info="on the same seed")
    with gr.Row():
        seed = gr.Number(0, precision=0, label="Seed", min_width=120)  # `views.checked_seed` reports its range
        roll = gr.Button("Roll", min_width=60, size="sm", elem_id="roll")
    roll.click(None, None, seed, js=script("random_seed"))
    return Sidebar(run, other, seed), about


def status_line() -> str:
    """The device that computes; during a computation the page shows seconds, and its place in the queue, in this line."""
    if server_settings.device != "cpu":
        return f"Ready. GPU: {torch.cuda.get_device_name(torch.device(server_settings.device))}"
    threads = torch.get_num_threads()
    words = "1 thread" if threads == 1 else f"{threads} threads"
    return f"Ready. CPU, {words}, torch {torch.__version__.split('+')[0]}"


def about_run(name: str) -> str:
    """What a run is, in a few lines: strategy, data, step, scores, device."""
    run = get_run(name)
    config = run.config
    align = config.align
    strategy = "not aligned" if align.strategy == "none" else "; ".join([f"**{align.strategy}** {align.place}", *align.recipe])
    lines = [
        f"{strategy}  ",
        f"{latents_text(run)}{config.data.words}, {config.flow.size}, {parameters(run)}  ",
        f"step {run.step:,} of {config.train.steps:,}, {'GPU' if run.device.type == 'cuda' else 'CPU'}",
    ]
    if missing_data(run):
        lines[-1] += "  "
        lines.append(f"{missing_data(run)}: {N_SAMPLES} samples stand for them  ")
    scores = scores_of(name)
    if scores is not None:
        lines[-1] += "  "
        lines += [f"{line}  " for line in score_lines(scores)]
    return "\n".join(lines)


def score_lines(scores: pd.DataFrame) -> list[str]:
    """A line for each metric of a run that is shown: "nats/dim: test 0.209, train 0.170"."""
    scores = scores.assign(metric=scores["metric"].map(present_metric))
    shown = {"nats_per_dim": "nats/dim", "gradient_accuracy": "one-step accuracy"}
    shown |= {name: title_of(name) for name in scores["metric"].unique() if family_of(name) in ("FD", "FID")}
    lines = []
    for metric, label in shown.items():
        rows = scores[scores["metric"] == metric].drop_duplicates("split").set_index("split")["value"]
        if len(rows):
            order = sorted(rows.index, key=lambda split: split != "test")
            lines.append(f"{label}: " + ", ".join(f"{split} {_number(rows[split])}" for split in order))
    return lines


def _number(value: float) -> str:
    """Three digits, without an exponent for thousands."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def other_choices() -> list[Any]:
    """What a run can be compared with."""
    return [(NO_OTHER, NO_RUN), *run_names()]


def refreshed_pickers() -> tuple[Any, Any]:
    """Updates of the pickers of the sidebar with all runs there are now."""
    return gr.Dropdown(choices=run_names()), gr.Dropdown(choices=other_choices())
