"""The gradient atlas: which parameters the alignment loss of each strategy reaches."""

from collections.abc import Iterable

import pandas as pd

from rrepa_lab.align.strategy import STRATEGIES, strategy_names
from rrepa_lab.analysis.gradients import AlignedBatch
from rrepa_lab.flow.contract import ParameterGroup
from rrepa_lab.flow.taps import Taps
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.run import Run


def routing(
    source: Run | RunConfig,
    strategies: Iterable[str] | None = None,
    taps: Taps | None = None,
    images: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """The gradient atlas: what the alignment loss of each strategy and tap reaches, from real gradients in float64.

    Args:
        source: a run, or a configuration, whose fresh weights are then perturbed (std 0.05): a fresh flow is the
            identity and would show zeros that mean nothing.
        strategies: all but none by default.
        taps: layer taps; by default the aligned ones, or layer 1 of every block if none is.
        images: from the test split, without noise, with their labels.
        seed: of the perturbation and of the projectors, which are fresh ones for every tap.

    Returns: one row for each strategy, tap and parameter group (projector, block.t.in, block.t.layer.l, block.t.out);
        columns strategy, tap, group, block (0 for the projector), gradient_norm, cosine_with_exact (of this gradient
        with that of reverse-exact, nan where either is zero), parameters, n, seed.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.routing(rl.load("digits-reverse"), ["detach"], "block.3.layer.2", images=2)
        >>> sorted(set(table.query("gradient_norm > 0").block))  # the projector, and block 3 alone
        [0, 3]
    """
    strategies = [STRATEGIES.check(name) for name in (strategy_names()[1:] if strategies is None else strategies)]
    batch = AlignedBatch.of(source, taps, images, seed)
    rows = []
    for tap in batch.taps:
        projectors = batch.projectors(tap)
        groups = [ParameterGroup("projector", 0, list(projectors.parameters())), *batch.run.flow.parameter_groups()]
        exact = batch.gradients("reverse-exact", tap, projectors, groups)
        for strategy in strategies:
            vectors = batch.gradients(strategy, tap, projectors, groups)
            for group, vector, reference in zip(groups, vectors, exact, strict=True):
                norm, length = float(vector.norm()), float(reference.norm())
                cosine = float(vector @ reference) / (norm * length) if norm and length else float("nan")
                row = {"strategy": strategy, "tap": tap.name, "group": group.name, "block": group.block, "gradient_norm": norm}
                rows.append(row | {"cosine_with_exact": cosine, "parameters": len(vector), "n": len(batch.x), "seed": seed})
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

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.refinement_errors(rl.load("digits-reverse"), [0, 15], "block.3.layer.2", images=2)
        >>> bool((table[table.refinements == 15].relative_error < 1e-9).all())
        True
    """
    batch = AlignedBatch.of(source, taps, images, seed)
    flow, rows = batch.run.flow, []
    for tap in batch.taps:
        projectors = batch.projectors(tap)
        blocks = range(tap.block, flow.config.blocks + 1)
        groups = [ParameterGroup(f"block.{number}", number, list(flow.block(number).parameters())) for number in blocks]
        exact = batch.gradients("reverse-exact", tap, projectors, groups)
        for count in refinements:
            found = batch.gradients("reverse", tap, projectors, groups, count)
            for group, vector, reference in zip(groups, found, exact, strict=True):
                cosine = float(vector @ reference / (vector.norm() * reference.norm()))
                error = float((vector - reference).norm() / reference.norm())
                row = {"refinements": count, "tap": tap.name, "block": group.block, "cosine": cosine, "relative_error": error}
                rows.append(row | {"n": len(batch.x), "seed": seed})
    return pd.DataFrame(rows)
