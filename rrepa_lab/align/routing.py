"""The gradient atlas: which parameters the alignment loss of each strategy reaches."""

from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from rrepa_lab.align.encoder import match_grid
from rrepa_lab.align.measure import check_layers
from rrepa_lab.align.projector import Projectors, alignment_loss, similarity
from rrepa_lab.align.strategies import STRATEGIES, features
from rrepa_lab.data.datasets import class_names
from rrepa_lab.data.loaders import seeded
from rrepa_lab.errors import unknown
from rrepa_lab.flow.taps import Tap
from rrepa_lab.flow.tarflow import Taps
from rrepa_lab.runs import Run, RunConfig, build


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
    fresh = build(source.override({"align.strategy": "none", "train.seed": seed}), class_names(source.data))
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
    with seeded(seed):
        return Projectors([tap], width, hidden, dim).double()
