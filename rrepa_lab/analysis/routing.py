"""The gradient atlas: which parameters the alignment loss of each strategy reaches."""

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from rrepa_lab.align.projector import Projectors, alignment_loss, similarity
from rrepa_lab.align.strategies import STRATEGIES, features, plain_features
from rrepa_lab.align.target import match_grid
from rrepa_lab.analysis.alignment import check_layers
from rrepa_lab.data.loaders import generator, seeded
from rrepa_lab.data.pixels import training_noise
from rrepa_lab.data.splits import class_names
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.likelihood import flow_loss
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.flow.taps import Tap, Taps
from rrepa_lab.runs.config import RunConfig, complete
from rrepa_lab.runs.run import Run, build


class Group(NamedTuple):
    """Parameters that are looked at together."""

    name: str  # projector, block.<t>.in, block.<t>.layer.<l>, block.<t>.out
    block: int  # 0 for the projector
    parameters: list[nn.Parameter]


def routing(
    source: Run | RunConfig,
    strategies: Iterable[str] = STRATEGIES[1:],
    taps: Taps | None = None,
    images: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """The gradient atlas: what the alignment loss of each strategy and tap reaches, from real gradients in float64.

    Args:
        source: a run, or a configuration, whose fresh weights are then perturbed (std 0.05): a fresh flow is the
            identity and would show zeros that mean nothing.
        taps: layer taps; by default the aligned ones, or layer 1 of every block if none is.
        images: from the test split, without noise, with their labels.
        seed: of the perturbation and of the projectors, which are fresh ones for every tap.

    Returns: one row for each strategy, tap and parameter group (projector, block.t.in, block.t.layer.l, block.t.out);
        columns strategy, tap, group, block (0 for the projector), gradient_norm, cosine_with_exact (of this gradient
        with that of reverse-exact, nan where either is zero), parameters, n, seed.
    """
    strategies = list(strategies)
    for strategy in strategies:
        if strategy not in STRATEGIES:
            raise unknown("strategy", strategy, STRATEGIES)
    run, wanted, x, labels, target, dim = _prepare(source, taps, images, seed)
    rows = []
    for tap in wanted:
        projectors = _projectors(tap.name, run.flow.config.width, run.config.align.projector_width, dim, seed)
        groups = [Group("projector", 0, list(projectors.parameters())), *parameter_groups(run)]
        exact = _gradients("reverse-exact", run, tap, projectors, groups, x, labels, target)
        for strategy in strategies:
            vectors = _gradients(strategy, run, tap, projectors, groups, x, labels, target)
            for group, vector, reference in zip(groups, vectors, exact, strict=True):
                norm, length = float(vector.norm()), float(reference.norm())
                rows.append(
                    {
                        "strategy": strategy,
                        "tap": tap.name,
                        "group": group.name,
                        "block": group.block,
                        "gradient_norm": norm,
                        "cosine_with_exact": float(vector @ reference) / (norm * length) if norm and length else float("nan"),
                        "parameters": len(vector),
                        "n": len(x),
                        "seed": seed,
                    }
                )
    return pd.DataFrame(rows)


def refinement_errors(
    source: Run | RunConfig,
    refinements: Iterable[int] = (0, 1, 2, 4, 8),
    taps: Taps | None = None,
    images: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """How far the gradient of the pseudo-reverse is from that of the exact, token-by-token pass, in float64.

    Args:
        source, taps, images, seed: as in `routing`.
        refinements: Jacobi steps; with as many as there are tokens but one the gradient is exact.

    Returns: one row for each number of refinements, tap and block that the alignment loss reaches; columns refinements, tap,
        block, cosine (with the exact gradient of the block's parameters), relative_error (distance from it by its norm),
        n, seed.
    """
    run, wanted, x, labels, target, dim = _prepare(source, taps, images, seed)
    rows = []
    for tap in wanted:
        projectors = _projectors(tap.name, run.flow.config.width, run.config.align.projector_width, dim, seed)
        blocks = range(tap.block, run.flow.config.blocks + 1)
        groups = [Group(f"block.{number}", number, list(run.flow.block(number).parameters())) for number in blocks]
        exact = _gradients("reverse-exact", run, tap, projectors, groups, x, labels, target)
        for count in refinements:
            found = _gradients("reverse", run, tap, projectors, groups, x, labels, target, count)
            for group, vector, reference in zip(groups, found, exact, strict=True):
                cosine = float(vector @ reference / (vector.norm() * reference.norm()))
                error = float((vector - reference).norm() / reference.norm())
                row = {"refinements": count, "tap": tap.name, "block": group.block, "cosine": cosine, "relative_error": error}
                rows.append(row | {"n": len(x), "seed": seed})
    return pd.DataFrame(rows)


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

    Both are gradients in the flow's parameters on the same batch of images, which the flow reads under the training noise
    with their labels (none is dropped) and the teacher clean; in float64. The projectors, which the likelihood does not
    reach, are left out. A small ratio means that alignment has stopped to move the flow: either it is satisfied or lambda
    is small.

    Args:
        run: one with aligned layers.
        strategy, weight: others than the run's own.
        batches: how many, without repetition as far as the split reaches.
        batch: images in each; by default `train.batch`, since the norm of a gradient depends on it.
        seed: of the choice of images and of the noise.

    Returns: rows run, strategy, train_seed, group, block (0 for all), metric, value (mean over batches), standard_error (of
        that mean), n (images read), parameters, weight, batch, split, seed. Groups: "all"; "block.<t>"; the groups of
        `routing`. Metrics: likelihood_gradient and alignment_gradient (norms, lambda included), gradient_ratio (mean of
        the ratios; nan where the likelihood's gradient is zero), gradient_cosine (between the two; nan where either is
        zero).

    Raises: LabError for a run that is not aligned, an unknown strategy, or no images.
    """
    align = run.config.align
    strategy = align.strategy if strategy is None else strategy
    weight = align.weight if weight is None else weight
    if not align.taps or strategy == "none":
        raise LabError(f"run {run.name!r} with strategy {strategy!r} aligns nothing: there is no gradient to compare")
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES[1:])
    if batches < 1:
        raise LabError(f"batches must be at least 1, not {batches}")
    copy, projectors = _double_copy(run, seed).to(run.device), deepcopy(run.projectors).double()
    groups, config = _nested_groups(copy), run.flow.config
    images, encoder = run.images(split), run.encoder()
    size = min(run.config.train.batch if batch is None else batch, len(images))
    if size < 1:
        raise LabError(f"a gradient needs at least one image: batch {batch} of the {len(images)} images of {split}")
    found: dict[str, list[list[float]]] = {group.name: [] for group in groups}
    order = torch.randperm(len(images), generator=generator(seed, 1)).split(size)
    for number, rows in enumerate(order[: min(batches, len(images) // size)]):
        x, y = (part.to(run.device) for part in images.__getitems__(rows.tolist()))
        noised = training_noise(x, config.noise, config.noise_std, images.levels, generator(seed, 2, number)).double()
        target = match_grid(encoder(x), encoder.grid, config.side).double()
        losses = _two_losses(copy, projectors, noised, y if config.classes else None, target, strategy)
        likelihood, alignment = (_gradient_by_parameter(loss, groups[0].parameters) for loss in losses)
        for group in groups:
            a, b = (torch.cat([by[one].flatten() for one in group.parameters]) for by in (likelihood, alignment))
            found[group.name].append(_lengths(a, b, weight))
    told = {"run": run.name, "strategy": strategy, "train_seed": run.config.train.seed}
    table: list[dict[str, Any]] = []
    for group in groups:
        values = torch.tensor(found[group.name], dtype=torch.float64)
        beside = {"n": len(values) * size, "parameters": sum(parameter.numel() for parameter in group.parameters)}
        for column, metric in zip(values.T, RATIO_METRICS, strict=True):
            error = float(column.std()) / math.sqrt(len(column)) if len(column) > 1 else math.nan
            row = {"group": group.name, "block": group.block, "metric": metric, "value": float(column.mean())}
            table.append(told | row | {"standard_error": error} | beside)
    return pd.DataFrame(table).assign(weight=weight, batch=size, split=split, seed=seed)


RATIO_METRICS = ("likelihood_gradient", "alignment_gradient", "gradient_ratio", "gradient_cosine")


def _two_losses(
    run: Run, projectors: Projectors, x: Tensor, y: Tensor | None, target: Tensor, strategy: str
) -> tuple[Tensor, Tensor]:
    """L_nf and L_align, without lambda, of one pass; each can be differentiated any number of times."""
    taps = run.flow.resolve(run.config.align.taps)
    encoded, aligned = plain_features(run.flow, x, y, strategy, taps, run.config.align.refinements)
    near = {tap: similarity(projectors.project(tap, states), target) for tap, states in aligned.items()}
    return flow_loss(encoded.z, encoded.logdet, run.flow.prior_var), alignment_loss(near)


def _gradient_by_parameter(loss: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def _lengths(likelihood: Tensor, alignment: Tensor, weight: float) -> list[float]:
    """The values of RATIO_METRICS for one batch."""
    length, norm = float(likelihood.norm()), weight * float(alignment.norm())
    cosine = weight * float(alignment @ likelihood) / (norm * length) if norm and length else math.nan
    return [length, norm, norm / length if length else math.nan, cosine]


def _nested_groups(run: Run) -> list[Group]:
    """All parameters of the flow, each block, and the groups of the atlas."""
    numbers = range(1, run.flow.config.blocks + 1)
    blocks = [Group(f"block.{number}", number, list(run.flow.block(number).parameters())) for number in numbers]
    return [Group("all", 0, list(run.flow.parameters())), *blocks, *parameter_groups(run)]


def _prepare(
    source: Run | RunConfig, taps: Taps | None, images: int, seed: int
) -> tuple[Run, list[Tap], Tensor, Tensor | None, Tensor, int]:
    """A float64 run, the taps, images with labels and targets, and the width of the encoder."""
    run = _double_copy(source, seed)
    wanted = run.flow.resolve(taps or run.config.align.taps or "block.*.layer.1")
    check_layers(wanted)
    x, y = run.data("test", images)
    x, labels = x.double(), y if run.flow.config.classes else None
    encoder = run.encoder()
    target = match_grid(encoder(x), encoder.grid, run.flow.config.side).double()
    return run, wanted, x, labels, target, encoder.dim


def _gradients(
    strategy: str,
    run: Run,
    tap: Tap,
    projectors: Projectors,
    groups: list[Group],
    x: Tensor,
    labels: Tensor | None,
    target: Tensor,
    refinements: int = 0,
) -> list[Tensor]:
    """Gradient of the alignment loss at one tap: a flat vector for each group, zero where the graph does not reach."""
    parameters = [parameter for group in groups for parameter in group.parameters]
    _, aligned = features(run.flow, x, labels, strategy, [tap], refinements)
    if aligned:
        loss = alignment_loss({tap.name: similarity(projectors.project(tap.name, aligned[tap.name]), target)})
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    else:
        found = tuple(torch.zeros_like(parameter) for parameter in parameters)
    flat = torch.cat([gradient.flatten() for gradient in found])
    return list(flat.split([sum(parameter.numel() for parameter in group.parameters) for group in groups]))


def parameter_groups(run: Run) -> list[Group]:
    """The flow's parameters in its order: what enters a block, each of its layers, and what leaves it."""
    groups: list[Group] = []
    for number in range(1, run.flow.config.blocks + 1):
        block = run.flow.block(number)
        tables = [p for p in (block.pos_embed, block.class_embed) if p is not None]
        groups.append(Group(f"block.{number}.in", number, [*block.proj_in.parameters(), *tables]))
        for index, layer in enumerate(block.transformer.layers, start=1):
            groups.append(Group(f"block.{number}.layer.{index}", number, list(layer.parameters())))
        groups.append(Group(f"block.{number}.out", number, list(block.proj_out.parameters())))
    return groups


def _double_copy(source: Run | RunConfig, seed: int) -> Run:
    """A float64 run with gradients switched on; a loaded one is copied, a fresh one perturbed."""
    if isinstance(source, Run):
        run = build(source.config.override({"align.strategy": "none"}), source.classes)
        run.flow.load_state_dict(source.flow.state_dict())
        run.flow.double()
        return Run(run.flow, source.config, source.classes, run.projectors)
    classes = class_names(source.data)
    source = complete(source, classes)
    fresh = build(source.override({"align.strategy": "none", "train.seed": seed}), classes)
    fresh.flow.double()
    perturb(fresh.flow, seed)
    return Run(fresh.flow, source, fresh.classes, fresh.projectors)


def _projectors(tap: str, width: int, hidden: int, dim: int, seed: int) -> Projectors:
    with seeded(seed):
        return Projectors([tap], width, hidden, dim).double()
