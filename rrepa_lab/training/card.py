"""card.md: what a run is, how it was trained and how it scores, for a reader who finds the folder."""

from pathlib import Path

import pandas as pd

from rrepa_lab.align.selfsup import EncoderTrainConfig
from rrepa_lab.files import write_text
from rrepa_lab.runs import Run, describe_config
from rrepa_lab.training.records import Records


def write_card(run: Run, metrics: pd.DataFrame, scores: pd.DataFrame | None = None) -> None:
    """Write (or replace) card.md in the run's directory; scores are the table of `rl.evaluate`."""
    assert run.directory is not None
    facts = describe_config(run.config)
    trained = [f"A TARFlow trained by rrepa_lab, step {run.step} of {run.config.train.steps}."]
    imported = [
        "A TARFlow that was trained elsewhere and imported. How it was trained is not on file: the `train` settings in",
        "config.json are defaults and say nothing about it.",
    ]
    lines = [f"# {run.name}", "", *(imported if run.config.origin else trained), "", "| | |", "|---|---|"]
    for key, value in facts.items():
        shown = "<br>".join(value) if isinstance(value, list) else value
        lines.append(f"| {key} | {shown} |")
    if len(metrics):
        last = metrics.iloc[-1]
        lines += [
            "",
            "## Training",
            "",
            f"Last report, step {last['step']:.0f}: {last['nats_per_dim']:.4f} nats/dim on training images",
        ]
        lines[-1] += f" under the training noise, {last['seconds']:.0f} s since the start or the last resume."
        for name in metrics.columns[metrics.columns.str.startswith("similarity.")]:
            lines.append(f"Cosine with the encoder at {name.removeprefix('similarity.')}: {last[name]:.3f}.")
        lines.append("Curves: metrics.jsonl.")
    if scores is not None:
        lines += ["", "## Scores", "", *score_lines(scores)]
    lines += ["", "Load it: `rl.load(<this folder>)`; command line: `rrepa-lab sample <this folder>`.", ""]
    write_text(Path(run.directory) / "card.md", "\n".join(lines))


def save_scores(run: Run, scores: pd.DataFrame) -> None:
    """Keep the table of `rl.evaluate` in the run's directory: scores.csv, and in the card."""
    assert run.directory is not None
    write_text(run.directory / "scores.csv", scores.to_csv(index=False))
    write_card(run, Records(run.directory).table(), scores)


def score_lines(scores: pd.DataFrame) -> list[str]:
    """A Markdown table of an evaluation, protocol included."""
    lines = ["| metric | value | unit | n | protocol |", "|---|---|---|---|---|"]
    for row in scores.itertuples():
        lines.append(f"| {row.metric} | {row.value:.4f} | {row.unit} | {row.n} | {row.protocol} |")
    return lines


def write_encoder_card(folder: Path, config: EncoderTrainConfig, loss: float, scores: pd.DataFrame) -> None:
    """Write card.md beside an encoder's weights; scores are the table of `knn_table`."""
    text = f"""# An encoder of {config.data.name}, trained without labels

{config.encoder.model} of timm with {config.encoder.args}, weights in bfloat16.

SimCLR on the training split: {config.steps} steps of {config.batch} images, seed {config.seed}; last loss {loss:.3f} nats.

k-NN accuracy on the test split, neighbours from the training split, cosine, features averaged over patches:

{scores.to_markdown(index=False, floatfmt=".4f")}

All settings: config.json.
"""
    write_text(folder / "card.md", text)
