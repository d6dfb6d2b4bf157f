"""Waiting for images: the part of a training step that an image folder costs, read from its files and from decoded pictures."""

import statistics
import tempfile
from pathlib import Path

import pandas as pd

from rrepa_lab.data.decoded import prepare
from rrepa_lab.data.splits import read_split
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.train import train
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.presets import preset

PRESET = "imagefolder-tiny-none"
STEPS = 30  # of a training that are measured
FIRST = 6  # steps before them: workers start, and memory is allocated
WORKERS = (0, 1)
CACHES = {"off": "files", "on": "decoded pictures"}


def data_waits(folder: str | Path | None, size: int, repeats: int, device: str = "cpu") -> pd.DataFrame:
    """Part of the training steps of `imagefolder-tiny-none` that waits for images (`data_wait`), one short training a case.

    The decoded pictures are made before anything is measured, and stay in the user's cache directory. A training is that of
    `rl.train`, its first steps are not counted. The cases of a round run one after another.

    Args:
        folder: an image folder.
        size: height and width of an image; the flow has 8x8 tokens at any size.
        repeats: rounds.

    Returns: columns data, size, case (files, decoded pictures), workers, data_wait (median), low, high (of the rounds), seconds
        (of a step, median), images (of a step), steps, flow.

    Raises: LabError for no folder, a size that 8 does not divide, or fewer than one round.
    """
    base = _settings(folder, size)
    if repeats < 1:
        raise LabError(f"repeats must be at least 1, not {repeats}")
    images = prepare(read_split(base.data, "train"))
    cases = [(cache, workers) for workers in WORKERS for cache in CACHES]
    rounds = [{case: _measure(base, *case, device) for case in cases} for _ in range(repeats)]
    rows = []
    for cache, workers in cases:
        waits, seconds = zip(*(found[cache, workers] for found in rounds), strict=True)
        row = {"data": Path(base.data.root).name, "size": size, "case": CACHES[cache], "workers": workers}
        row |= {"data_wait": statistics.median(waits), "low": min(waits), "high": max(waits)}
        rows.append(row | {"seconds": statistics.median(seconds)})
    flow = f"{PRESET}: 4 blocks x 3 layers, width 64, 64 tokens"
    return pd.DataFrame(rows).assign(images=min(base.train.batch, len(images)), steps=STEPS, flow=flow)


def _settings(folder: str | Path | None, size: int) -> RunConfig:
    if folder is None:
        raise LabError("an image folder is required: add --data FOLDER")
    if size < 8 or size % 8:
        raise LabError(f"a flow of 8x8 tokens takes an image size that 8 divides, not {size}")
    return preset(PRESET).override(
        {
            "data.path": str(Path(folder).expanduser().absolute()), "data.image_size": size, "data.cache": "on",
            "flow.image_size": size, "flow.patch_size": size // 8, "train.steps": FIRST + STEPS, "train.log_every": FIRST,
            "train.eval_every": FIRST + STEPS, "train.save_every": FIRST + STEPS, "train.precision": "float32",
        }
    )  # fmt: skip


def _measure(base: RunConfig, cache: str, workers: int, device: str) -> tuple[float, float]:
    """data_wait and seconds of a step, of one training whose first report is left out."""
    settings = {"data.cache": cache, "train.num_workers": workers}
    with tempfile.TemporaryDirectory() as out:
        first, *reports = train(base, out, settings=settings, device=device)
    waits = [report.data_wait for report in reports if report.data_wait is not None]
    return statistics.mean(waits), (reports[-1].seconds - first.seconds) / STEPS
