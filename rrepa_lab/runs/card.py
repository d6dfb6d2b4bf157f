"""card.md: what a run is, how it was trained and how it scores, for a reader who finds the folder."""

import re
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from PIL import Image, UnidentifiedImageError

from rrepa_lab.errors import LabError
from rrepa_lab.files import write_text
from rrepa_lab.readers import MIB, MissingFileError, read_table
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.describe import describe_config
from rrepa_lab.runs.names import BEST, CARD, DESCRIPTION, SAMPLES, SCORES
from rrepa_lab.runs.records import Records

# columns of metrics.jsonl that hold a floor of the similarity -> what its constants know
FLOORS = {"floors.label_position": "label and position", "floors.position": "position"}
# columns that say how samples were read and compared
READ_BY = ("network", "network_sha256", "reference", "reference_sha256", "resize", "bytes", "probe", "decoding")
# before the images of a split, in a protocol
_SCORED = re.compile(r", (?=\d+ of \d+, class-balanced|(?:train|val|test) = )")


class Described(Protocol):
    """What a card needs of a run."""

    config: RunConfig
    step: int
    directory: Path | None

    @property
    def name(self) -> str:
        """Of the run."""
        ...

    @property
    def data_words(self) -> str:
        """The data set, with the fingerprint of the training images where it is known."""
        ...


def write_card(run: Described, metrics: pd.DataFrame, scores: pd.DataFrame | None = None) -> None:
    """Write (or replace) card.md in the run's directory; scores are the table of `rl.evaluate`."""
    assert run.directory is not None
    last = "Load it: `rl.load(<this folder>)`; command line: `rrepa-lab sample <this folder>`."
    title, *rest = card_lines(run, metrics, scores)
    write_text(run.directory / CARD, "\n".join([title, *_picture_lines(run.directory), *rest, "", last, ""]))


def _picture_lines(directory: Path) -> list[str]:
    """The picture of samples that lies in the folder of a run, with its description."""
    try:
        with Image.open(directory / SAMPLES) as picture:
            caption = str(picture.info.get(DESCRIPTION, "samples"))
    except (FileNotFoundError, UnidentifiedImageError):
        return []
    return ["", f"![{caption}]({SAMPLES})", "", f"{caption}."]


def card_lines(run: Described, metrics: pd.DataFrame, scores: pd.DataFrame | None = None) -> list[str]:
    """The lines of a card in Markdown, the title first: facts, training, scores."""
    facts = describe_config(run.config) | {"data": run.data_words}
    trained = [f"A TARFlow trained by rrepa_lab, step {run.step} of {run.config.train.steps}."]
    imported = [
        "A TARFlow that was trained elsewhere and imported. How it was trained is not on file: the `train` settings in",
        "config.json are defaults and say nothing about it.",
    ]
    lines = [f"# {run.name}", "", *(imported if run.config.origin else trained), *_init_lines(run), "", "| | |", "|---|---|"]
    for key, value in facts.items():
        shown = "<br>".join(value) if isinstance(value, list) else str(value)
        lines.append(f"| {key} | {shown.replace('|', chr(92) + '|')} |")
    if len(metrics):
        last = metrics.iloc[-1]
        lines += [
            "",
            "## Training",
            "",
            f"Last report, step {last['step']:.0f}: {last['nats_per_dim']:.4f} nats/dim on training images",
        ]
        lines[-1] += f" under the training noise, {last['seconds']:.0f} s since the start or the last resume."
        lines += similarity_lines(last)
        if "precision" in metrics:
            lines.append(f"Matrix products in {last['precision']}.")
        if isinstance(last.get("hardware"), str):
            lines.append(f"Trained on {last['hardware']}.")
        if "data_wait" in metrics and metrics["data_wait"].notna().any():
            lines.append(f"Part of a step that waited for images: {metrics['data_wait'].mean():.1%} (mean of the reports).")
        lines += _best_line(run, metrics)
        lines.append("Curves: metrics.jsonl.")
    if scores is not None:
        lines += ["", "## Scores", "", *score_lines(scores)]
    return lines


def _init_lines(run: Described) -> list[str]:
    """Whose weights the training began with."""
    init = run.config.init
    if init is None:
        return []
    lines = [f"Began with the weights of {init.name} at step {init.step} (fingerprint {init.weights}) and a fresh optimizer."]
    return lines + ([f"Those were imported: {init.origin}."] if init.origin else [])


def similarity_lines(report: "pd.Series[Any]") -> list[str]:
    """A line for each aligned tap of a report of training: its cosine with the encoder and, where the floors were recorded
    (`floors.position`, `floors.label_position`, see `align.floors`), by how much it is above them.
    """
    floors = {text: float(report[key]) for key, text in FLOORS.items() if pd.notna(report.get(key))}
    lines = []
    for name in report.index[report.index.str.startswith("similarity.")]:
        if pd.notna(report[name]):
            lines.append(f"Cosine with the encoder at {name.removeprefix('similarity.')}: {report[name]:.3f}")
            lines[-1] += "".join(f", {report[name] - floor:+.3f} above {text} alone" for text, floor in floors.items()) + "."
    if lines and floors:
        known = ", ".join(f"{text} {floor:.3f}" for text, floor in floors.items())
        lines.append(f"Floors, reached by constants without reading the image: {known}.")
    return lines


def _best_line(run: Described, metrics: pd.DataFrame) -> list[str]:
    """The validation at which the kept weights were best, in words."""
    metric = run.config.train.keep
    column = f"held_out_{metric}"
    if metric == "last" or column not in metrics or metrics[column].isna().all():
        return []
    best = metrics.iloc[int(metrics[column].argmin() if metric == "nats_per_dim" else metrics[column].argmax())]
    parts = [f"{column.replace('_', ' ')} {best[column]:.4f}"]
    if pd.notna(best.get(f"train_{metric}")):
        parts.append(f"{best[f'train_{metric}']:.4f} on as many training images")
    assert run.directory is not None
    file = BEST if (run.directory / BEST).is_file() else "model.safetensors"
    return [f"Best on the validation split at step {best['step']:.0f}: {', '.join(parts)}. Those weights are {file}."]


def read_scores(directory: Path) -> pd.DataFrame | None:
    """The table that `save_scores` wrote; None if the run was not evaluated, LabError for a damaged file."""
    path = directory / SCORES
    try:
        table = read_table(path, ("split", "metric", "value", "unit", "n", "protocol"), limit=MIB)
    except MissingFileError:
        return None
    numbers = pd.to_numeric(table["value"], errors="coerce")
    if numbers.isna().any():
        raise LabError(f"{path}: a value is not a number")
    texts = {name: table[name].fillna("").astype(str) for name in ("split", "metric", "unit", "protocol")}
    return table.assign(value=numbers.astype(float), **texts)


def save_scores(run: Described, scores: pd.DataFrame) -> None:
    """Keep the table of `rl.evaluate` in the run's directory: scores.csv, and in the card."""
    assert run.directory is not None
    write_text(run.directory / SCORES, scores.to_csv(index=False))
    write_card(run, Records(run.directory).table(), scores)


def protocol_words(row: dict[Any, Any]) -> str:
    """The protocol of a row of scores in words, with the columns that say how samples were read and compared."""
    named = [(name.replace("_", " "), str(row.get(name, ""))) for name in READ_BY]
    return "; ".join([str(row["protocol"]), *(f"{name} {text}" for name, text in named if text not in ("", "nan"))])


def score_lines(scores: pd.DataFrame) -> list[str]:
    """A Markdown table of an evaluation, protocol included; the splits of a metric side by side where there are several.

    A metric that one split alone has, or that was measured under another protocol there, has "-" in the other column; which
    images of each split were scored is no difference of protocol.
    """
    scores = scores.assign(protocol=[protocol_words(row) for row in scores.to_dict("records")])
    splits = list(dict.fromkeys(scores["split"])) if "split" in scores else []
    if len(splits) < 2:
        lines = ["| metric | value | unit | n | protocol |", "|---|---|---|---|---|"]
        for row in scores.itertuples():
            lines.append(f"| {row.metric} | {row.value:.4f} | {row.unit} | {row.n} | {row.protocol} |")
        return lines
    lines = [f"| metric | {' | '.join(splits)} | unit | n | protocol |", f"|---|{'---|' * len(splits)}---|---|---|"]
    parts = [_SCORED.split(protocol, maxsplit=1) for protocol in scores["protocol"]]
    scores = scores.assign(protocol=[part[0] for part in parts], scored=["".join(part[1:]) for part in parts])
    for (metric, unit, protocol), rows in scores.groupby(["metric", "unit", "protocol"], sort=False, dropna=False):
        by_split = rows.drop_duplicates("split").set_index("split")
        values = [f"{by_split.loc[split, 'value']:.4f}" if split in by_split.index else "-" for split in splits]
        counts = " / ".join(str(by_split.loc[split, "n"]) if split in by_split.index else "-" for split in splits)
        scored = "".join(f"; {split}: {which}" for split, which in by_split["scored"].items() if which)
        lines.append(f"| {metric} | {' | '.join(values)} | {unit} | {counts} | {protocol}{scored} |")
    return lines
