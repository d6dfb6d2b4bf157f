"""Alignment looked at from outside the training loop: one loss, or the whole atlas of where its gradient goes."""

from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from rrepa_lab.align.encoder import match_grid
from rrepa_lab.align.projector import Projectors, alignment_loss, similarity
from rrepa_lab.align.strategies import STRATEGIES, features
from rrepa_lab.data.datasets import load_split, whole
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.taps import Tap
from rrepa_lab.flow.tarflow import Taps
from rrepa_lab.runs import Run, RunConfig, build

Groups = list[tuple[str, int, list[nn.Parameter]]]


class Alignment(NamedTuple):
    """How near a flow's features are to the encoder's."""

    loss: Tensor  # (), differentiable, minus the mean cosine, without lambda
    similarity: dict[str, float]  # tap -> mean cosine


def alignment(
    run: Run,
    x: Tensor,
    y: Tensor | None = None,
    strategy: str | None = None,
    taps: Taps | None = None,
    refinements: int | None = None,
    projectors: Projectors | None = None,
) -> Alignment:
    """The alignment loss of images (B, C, H, W) in [-1, 1], which the flow reads as they are: add noise to taste.

    Args:
        y: labels as in `TarFlow.forward`.
        strategy: none, forward, detach, reverse or reverse-exact; the run's own if left out.
        taps: layer taps; the run's own aligned ones if left out.
        refinements: for reverse; the run's own if left out.
        projectors: others than the run's, for taps that it was not trained on.

    A loaded run is frozen; `run.flow.requires_grad_()` makes the loss differentiable in its parameters.

    Raises: LabError for an unknown strategy or tap, a tap without a projector, or a run without an encoder.
    """
    align = run.config.align
    strategy = align.strategy if strategy is None else strategy
    projectors = run.projectors if projectors is None else projectors
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    wanted = run.flow.resolve(align.taps if taps is None else taps)
    if strategy == "none" or not wanted:
        return Alignment(x.new_zeros(()), {})
    _check_layers(wanted)
    missing = [tap.name for tap in wanted if tap.name not in projectors.taps]
    if missing:
        has = ", ".join(projectors.taps) or "none"
        raise LabError(f"run {run.name!r} has no projector for {missing[0]} (it has: {has}); pass projectors=")
    encoder = run.encoder()
    target = match_grid(encoder(x), encoder.grid, run.flow.config.side).to(x.dtype)
    _, aligned = features(run.flow, x, y, strategy, wanted, align.refinements if refinements is None else refinements)
    near = {tap: similarity(projectors.project(tap, states), target) for tap, states in aligned.items()}
    return Alignment(alignment_loss(near), {tap: value.mean().item() for tap, value in near.items()})


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
    run = _double_copy(source, seed)
    config = run.flow.config
    wanted = run.flow.resolve(taps or run.config.align.taps or "block.*.layer.1")
    _check_layers(wanted)
    x, y = whole(load_split(run.config.data, "test"), images)
    x = x.double()
    encoder = run.encoder()
    target = match_grid(encoder(x), encoder.grid, config.side).double()
    rows = []
    for tap in wanted:
        projectors = _projectors(tap.name, config.width, run.config.align.projector_width, encoder.dim, seed)
        groups = [("projector", 0, list(projectors.parameters())), *parameter_groups(run)]

        def gradient(
            strategy: str, tap: Tap = tap, projectors: Projectors = projectors, groups: Groups = groups
        ) -> list[Tensor]:
            """One flat vector a group, zero where the graph does not reach."""
            parameters = [p for _, _, group in groups for p in group]
            _, aligned = features(run.flow, x, y if config.classes else None, strategy, [tap])
            if not aligned:
                found = [torch.zeros_like(p) for p in parameters]
            else:
                loss = alignment_loss({tap.name: similarity(projectors.project(tap.name, aligned[tap.name]), target)})
                found = list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
            ends = iter(found)
            return [torch.cat([next(ends).flatten() for _ in group]) for _, _, group in groups]

        exact = gradient("reverse-exact")
        for strategy in strategies:
            for (group, block, parameters), vector, reference in zip(groups, gradient(strategy), exact, strict=True):
                norm, length = float(vector.norm()), float(reference.norm())
                cosine = float(vector @ reference) / (norm * length) if norm and length else float("nan")
                rows.append({
                    "strategy": strategy, "tap": tap.name, "group": group, "block": block, "gradient_norm": norm,
                    "cosine_with_exact": cosine, "parameters": sum(p.numel() for p in parameters), "n": len(x), "seed": seed,
                })  # fmt: skip
    return pd.DataFrame(rows)


def parameter_groups(run: Run) -> Groups:
    """(name, block, parameters) in flow order: what enters a block, each of its layers, and what leaves it."""
    groups: Groups = []
    for number in range(1, run.flow.config.blocks + 1):
        block = run.flow.block(number)
        tables = [p for p in (block.pos_embed, block.class_embed) if p is not None]
        groups.append((f"block.{number}.in", number, [*block.proj_in.parameters(), *tables]))
        for index, layer in enumerate(block.transformer.layers, start=1):
            groups.append((f"block.{number}.layer.{index}", number, list(layer.parameters())))
        groups.append((f"block.{number}.out", number, list(block.proj_out.parameters())))
    return groups


def _double_copy(source: Run | RunConfig, seed: int) -> Run:
    """A float64 run with gradients switched on; a loaded one is copied, a fresh one perturbed."""
    if isinstance(source, Run):
        run = build(source.config.override({"align.strategy": "none"}), source.classes)
        run.flow.load_state_dict(source.flow.state_dict())
        run.flow.double()
        return Run(run.flow, source.config, source.classes, run.projectors)
    fresh = build(source.override({"align.strategy": "none", "train.seed": seed}), load_split(source.data, "test").classes)
    fresh.flow.double()
    perturb(fresh.flow, seed)
    return Run(fresh.flow, source, fresh.classes, fresh.projectors)


def perturb(module: nn.Module, seed: int, std: float = 0.05) -> None:
    """Add normal noise to every parameter: a fresh flow is the identity, on which no test and no gradient says anything."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data += std * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)


def _projectors(tap: str, width: int, hidden: int, dim: int, seed: int) -> Projectors:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Projectors([tap], width, hidden, dim).double()


def _check_layers(taps: list[Tap]) -> None:
    for tap in taps:
        if not isinstance(tap.layer, int):
            raise LabError(f"{tap.name} cannot be aligned: only the outputs of layers can, block.<t>.layer.<l>")
