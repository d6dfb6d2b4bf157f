"""What a teacher costs in a training step, and what its kept features leave of that."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from os import environ

import pandas as pd
import torch

from rrepa_lab.bench.timing import alternate, summary
from rrepa_lab.data.images import TensorImages
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.pixels import to_integers, to_unit
from rrepa_lab.runs.presets import preset
from rrepa_lab.runs.run import build
from rrepa_lab.training.inputs import StepInputs
from rrepa_lab.training.objective import Objective

IMAGES, BATCH = 256, 32  # of the split that stands for the training split, and of a step
CASES = {"cifar10": (32, 4), "tinyimagenet": (64, 8)}  # sizes of the pictures and of the flow's patches


def teacher_costs(repeats: int = 3, device: str = "cpu") -> pd.DataFrame:
    """Seconds of a training step with flips: without the teacher, with its features on disk, in memory, and with its pass.

    The pictures are noise of the size of CIFAR-10 (32 pixels) and of Tiny-ImageNet (64): the time does not depend on them. The
    teacher is efficientnet-lite0 with random weights, at 128 and at 224 pixels; the flow is that of the preset
    imagefolder-tiny-reverse, 8 x 8 tokens.

    Returns: one row a case: what, case, images (of a step), seconds (median), fastest, slowest, ratio (to the step without
        a teacher in the same round).
    """
    tables = []
    with _own_cache():
        for name, (size, patch) in CASES.items():
            tables.append(_table(name, size, patch, 128 if size == 32 else 224, repeats, device))
    return pd.concat(tables, ignore_index=True)


def _table(name: str, size: int, patch: int, teacher_size: int, repeats: int, device: str) -> pd.DataFrame:
    config = preset("imagefolder-tiny-reverse")
    settings = {"data.image_size": size, "flow.image_size": size, "flow.patch_size": patch, "flow.classes": 2}
    teacher = {"encoder.model": "efficientnet-lite0", "encoder.weights": "random", "encoder.image_size": teacher_size}
    config = config.override(settings | teacher | {"train.batch": BATCH, "train.steps": 1000, "train.label_drop": 0.0})
    x = torch.rand(IMAGES, 3, size, size, generator=generator(0)) * 2 - 1
    images = TensorImages(to_unit(to_integers(x, 256), 256), torch.arange(IMAGES) % 2, ["a", "b"], 256)
    run = build(config, images.classes)
    objective, place = Objective(run.flow, run.projectors, run.config.align).to(device), torch.device(device)
    plain = Objective(run.flow, run.projectors, run.config.align.model_copy(update={"strategy": "none"})).to(device)
    steps = {}
    for case in ("no teacher", "features on disk", "features in memory", "teacher in every step"):
        targets = None if case == "no teacher" else run.targets()
        if targets is not None and "features" in case:
            targets.each[0].keep(images, 2, place, disk="disk" in case)
        inputs = StepInputs(run.config, run.space, targets, place)
        steps[case] = partial(_step, plain if targets is None else objective, inputs, images)
    times = alternate(steps, repeats, device)
    what = f"{name}, teacher at {teacher_size} px"
    rows = [
        {"what": what, "case": case, "images": BATCH} | summary(seconds, times["no teacher"]) for case, seconds in times.items()
    ]
    return pd.DataFrame(rows)


def _step(objective: Objective, inputs: StepInputs, images: TensorImages) -> None:
    rows = torch.randperm(IMAGES, generator=generator(1))[:BATCH].tolist()
    objective.zero_grad()
    objective(*inputs(images.__getitems__(rows), rows, 0)).total.backward()


@contextmanager
def _own_cache() -> Iterator[None]:
    """A folder of its own in place of the user's cache."""
    before = environ.get("RREPA_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        environ["RREPA_CACHE"] = folder
        try:
            yield
        finally:
            environ.pop("RREPA_CACHE")
            if before is not None:
                environ["RREPA_CACHE"] = before
