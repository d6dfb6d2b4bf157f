"""What one cell of a study records of its run: scores under two readings, samples at checkpoints, and the training curve."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from rrepa_lab.evaluation.evaluate import USUAL, evaluate
from rrepa_lab.evaluation.protocols import FD, KD, choose
from rrepa_lab.evaluation.reference import find_reference
from rrepa_lab.evaluation.run_samples import RunSamples, Sampling
from rrepa_lab.evaluation.scores import score_pictures
from rrepa_lab.files import write_text
from rrepa_lab.readers import MIB, MissingFileError, read_table
from rrepa_lab.runs.records import Records
from rrepa_lab.runs.run import Run

CLEAN = "gradient_accuracy[clean]"
AT_CHECKPOINTS = (FD, KD)  # of the scores of samples, those that a curve is drawn of
VALIDATED = ("held_out_nats_per_dim", "held_out_accuracy", "train_nats_per_dim", "train_accuracy")
_COLUMNS = ("step", "metric", "value", "unit", "n", "protocol", "seconds")


def score_run(
    run: Run, samples: int = 2000, limit: int | None = None, parts: str | Sequence[str] = USUAL, clean: bool = False
) -> pd.DataFrame:
    """The table of `rl.evaluate` on the test split.

    Args:
        samples, limit, parts: of `rl.evaluate`; a limit of 0 is none.
        clean: also the accuracy of one gradient step on clean images, as gradient_accuracy[clean], where the accuracies are
            under noise (`config.read`), so that both readings have a name.

    Raises: LabError as `rl.evaluate` does.
    """
    table = evaluate(run, samples=samples, limit=limit or None, parts=parts)
    if not clean or not run.config.flow.classes or not run.config.read.n_noise_samples:
        return table
    plain = replace(run, config=run.config.override({"read.n_noise_samples": 0, "read.noise_std": None}))
    again = evaluate(plain, samples=0, limit=limit or None, parts=["gradient"])
    again = again[again["metric"] == "gradient_accuracy"].assign(metric=CLEAN)
    return pd.concat([table, again.dropna(axis="columns", how="all")], ignore_index=True)


def score_checkpoint(run: Run, samples: int, path: Path) -> pd.DataFrame:
    """Fréchet and kernel distance of a run's samples to the test split, kept in a CSV file beside those at other steps.

    A step that the file has is not measured again; a resumed training goes on with the same file.

    Args:
        samples: generated, unguided and denoised, labels in turn; 0 measures nothing.

    Returns: all steps so far, with the columns step, metric, value, unit, n, protocol, seconds (that the step took to score);
        an empty table where there are none.
    """
    try:
        known = read_table(path, _COLUMNS, limit=16 * MIB)
    except MissingFileError:
        known = pd.DataFrame(columns=list(_COLUMNS))
    if not samples or run.step in set(known["step"]):
        return known
    began = time.perf_counter()
    pictures = RunSamples(run, Sampling.of(samples))
    (chosen,) = choose(None, run)
    chosen = chosen._replace(protocol=chosen.protocol._replace(metrics=AT_CHECKPOINTS))  # the others take longer than these
    pair = (chosen, find_reference("test", run))
    (scored,) = score_pictures(pictures, [pair], device=run.device, intervals=False)
    measured = {"step": run.step, "seconds": time.perf_counter() - began}
    listed = [
        row | measured | {"protocol": f"{pictures.words}, against {row['n_reference']} real images"} for row in scored.rows
    ]
    rows = pd.DataFrame(listed)[list(_COLUMNS)]
    table = (pd.concat([known, rows], ignore_index=True) if len(known) else rows).sort_values("step", kind="stable")
    write_text(path, table.to_csv(index=False, float_format="%.6g"))
    return table


def training_curve(run_folder: Path, checkpoints: pd.DataFrame | None = None) -> list[dict[str, Any]]:
    """Steps and values of a training, as plain values for `write_result`.

    Args:
        run_folder: of the run, with its metrics.jsonl.
        checkpoints: of `score_checkpoint`.

    Returns: dictionaries with step, metric and value. Of the steps at which the training was validated: those of VALIDATED,
        and `similarity`, the mean cosine over the aligned taps; of the checkpoints their distances. Values that do not exist
        are left out.
    """
    table = Records(run_folder).table()
    tables = []
    if not table.empty:
        table = table.drop_duplicates("step", keep="last")
        recorded = [name for name in VALIDATED if name in table]
        validated = table[table[recorded].notna().any(axis=1)] if recorded else table.iloc[:0]
        taps = [column for column in table if str(column).startswith("similarity.")]
        if taps:
            validated = validated.assign(similarity=validated[taps].mean(axis=1))
        named = [*recorded, *(["similarity"] if taps else [])]
        tables.append(validated.melt(id_vars="step", value_vars=named, var_name="metric"))
    if checkpoints is not None and len(checkpoints):
        tables.append(checkpoints[["step", "metric", "value"]])
    rows = pd.concat(tables, ignore_index=True).dropna().to_dict("records") if tables else []
    return [{"step": int(row["step"]), "metric": str(row["metric"]), "value": float(row["value"])} for row in rows]


def training_seconds(run_folder: Path, checkpoints: pd.DataFrame | None = None) -> float:
    """Seconds that a training took, those before an interruption included.

    A report counts them since its call of `train` began; where they fall, another call began.

    Args:
        checkpoints: of `score_checkpoint`; the time that the scores before the last step took is subtracted.
    """
    rows = Records(run_folder).rows()
    total = last = 0.0
    for row in rows:
        seconds = row.get("seconds") or 0.0
        total += last if seconds < last else 0.0
        last = seconds
    if rows and checkpoints is not None and len(checkpoints):
        steps = checkpoints.drop_duplicates("step")
        last -= float(steps[steps["step"] < rows[-1]["step"]]["seconds"].sum())
    return max(0.0, total + last)
