"""How strongly alignment pulls on the flow's parameters beside the likelihood."""

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.strategy import STRATEGIES
from rrepa_lab.analysis.gradients import double_copy, group_gradients
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.loaders import generator
from rrepa_lab.errors import LabError
from rrepa_lab.flow.contract import ParameterGroup
from rrepa_lab.flow.likelihood import flow_loss
from rrepa_lab.measurements.columns import about, average
from rrepa_lab.runs.run import Run

METRICS = ("likelihood_gradient", "alignment_gradient", "gradient_ratio", "gradient_cosine")


def gradient_ratio(
    run: Run,
    *,
    strategy: str | None = None,
    weight: float | None = None,
    batches: int = 8,
    batch: int | None = None,
    split: str = "train",
    seed: int = 0,
) -> pd.DataFrame:
    """How strongly alignment pulls beside the likelihood: norm of lambda * grad L_align over norm of grad L_nf.

    Both are gradients in the flow's parameters on the same batch of images, which the flow encodes under the training noise
    with their labels (none is dropped) and the teacher clean; in float64. The projectors, which the likelihood does not
    reach, are left out. A small ratio means that alignment has stopped to move the flow: either it is satisfied or lambda
    is small.

    Args:
        run: one with aligned layers.
        strategy, weight: others than the run's own.
        batches: how many, without repetition as far as the split reaches.
        batch: images in each; by default `train.batch`, since the norm of a gradient depends on it.
        seed: of the choice of images and of the noise.

    Returns: rows run, strategy, data, space, encoder, train_seed, group, block (0 for all), metric, value (mean over batches),
        standard_error (of that mean), n (images), parameters, weight, batch, split, seed. Groups: "all"; "block.<t>"; the
        groups of `routing`. Metrics: likelihood_gradient and alignment_gradient (norms, lambda included), gradient_ratio
        (mean of the ratios; nan where the likelihood's gradient is zero), gradient_cosine (between the two; nan where
        either is zero).

    Raises: LabError for a run that is not aligned, an unknown strategy, or no images.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.gradient_ratio(rl.load("digits-reverse"), batches=1, batch=4)
        >>> bool(table.query("group == 'all' and metric == 'gradient_ratio'").value.item() > 0)
        True
    """
    align = run.config.align
    strategy = align.strategy if strategy is None else strategy
    weight = align.weight if weight is None else weight
    if not align.taps or strategy == "none":
        raise LabError(f"run {run.name!r} with strategy {strategy!r} aligns nothing: there is no gradient to compare")
    STRATEGIES.check(strategy)
    if batches < 1:
        raise LabError(f"batches must be at least 1, not {batches}")
    images = run.images(split)
    size = min(run.config.train.batch if batch is None else batch, len(images))
    if size < 1:
        raise LabError(f"a gradient needs at least one image: batch {batch} of the {len(images)} images of {split}")
    copy = double_copy(run, seed).to(run.device)
    groups = _nested_groups(copy)
    found: dict[str, list[list[float]]] = {group.name: [] for group in groups}
    changed = align.model_copy(update={"strategy": strategy})
    for losses in _losses(run, copy, changed, _Batches(images, size, min(batches, len(images) // size), seed, split)):
        likelihood, alignment = (group_gradients(loss, groups, keep=True) for loss in losses)
        for group, a, b in zip(groups, likelihood, alignment, strict=True):
            found[group.name].append(_lengths(a, b, weight))
    named = about(run) | {"strategy": strategy}
    table = pd.DataFrame([named | row for group in groups for row in _rows(group, found[group.name], size)])
    return table.assign(weight=weight, batch=size, split=split, seed=seed)


class _Batches(NamedTuple):
    """Which images: `number` batches of `size`, drawn with `seed` from a set."""

    images: ImageSet
    size: int
    number: int
    seed: int
    split: str


def _losses(run: Run, copy: Run, align: AlignConfig, batches: _Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """L_nf and L_align, without lambda, of each batch; each can be differentiated any number of times."""
    classes, images = run.flow.config.classes, batches.images
    aligner = run.aligner(align, deepcopy(run.projectors).double())
    originals = run.teacher_images(batches.split, images)
    order = torch.randperm(len(images), generator=generator(batches.seed, 1)).split(batches.size)
    for number, rows in enumerate(order[: batches.number]):
        x, y = (part.to(run.device) for part in images.__getitems__(rows.tolist()))
        noised = run.space.add_noise(run.space.encode(x), generator(batches.seed, 2, number)).double()
        shown = x if originals is images else originals.__getitems__(rows.tolist()).x.to(run.device)
        target = aligner.target(shown).double()
        encoded, loss, _ = aligner(copy.flow, noised, y if classes else None, target, plain=True)
        yield flow_loss(encoded.z, encoded.logdet, copy.flow.prior_var), loss


def _lengths(likelihood: Tensor, alignment: Tensor, weight: float) -> list[float]:
    """The values of METRICS for one batch."""
    length, norm = float(likelihood.norm()), weight * float(alignment.norm())
    cosine = weight * float(alignment @ likelihood) / (norm * length) if norm and length else math.nan
    return [length, norm, norm / length if length else math.nan, cosine]


def _rows(group: ParameterGroup, values: list[list[float]], size: int) -> list[dict[str, Any]]:
    """Mean and standard error over batches of each metric of a group."""
    table = torch.tensor(values, dtype=torch.float64)
    n = {"n": len(table) * size, "parameters": sum(parameter.numel() for parameter in group.parameters)}
    return [
        {"group": group.name, "block": group.block, "metric": metric} | average(column) | n
        for column, metric in zip(table.T, METRICS, strict=True)
    ]


def _nested_groups(run: Run) -> list[ParameterGroup]:
    """All parameters of the flow, each block, and the groups of the atlas."""
    flow = run.flow
    numbers = range(1, flow.config.blocks + 1)
    blocks = [ParameterGroup(f"block.{number}", number, list(flow.block(number).parameters())) for number in numbers]
    return [ParameterGroup("all", 0, list(flow.parameters())), *blocks, *flow.parameter_groups()]
