"""The alignment of a run, looked at from outside the training loop."""

from typing import NamedTuple

from torch import Tensor

from rrepa_lab.align.encoder import match_grid
from rrepa_lab.align.projector import Projectors, alignment_loss, similarity
from rrepa_lab.align.strategies import STRATEGIES, features
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.taps import Tap
from rrepa_lab.flow.tarflow import Taps
from rrepa_lab.runs import Run


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
    check_layers(wanted)
    missing = [tap.name for tap in wanted if tap.name not in projectors.taps]
    if missing:
        has = ", ".join(projectors.taps) or "none"
        raise LabError(f"run {run.name!r} has no projector for {missing[0]} (it has: {has}); pass projectors=")
    encoder = run.encoder()
    target = match_grid(encoder(x), encoder.grid, run.flow.config.side).to(x.dtype)
    _, aligned = features(run.flow, x, y, strategy, wanted, align.refinements if refinements is None else refinements)
    near = {tap: similarity(projectors.project(tap, states), target) for tap, states in aligned.items()}
    return Alignment(alignment_loss(near), {tap: value.mean().item() for tap, value in near.items()})


def check_layers(taps: list[Tap]) -> None:
    """LabError for a tap that is not the output of a layer."""
    for tap in taps:
        if not isinstance(tap.layer, int):
            raise LabError(f"{tap.name} cannot be aligned: only the outputs of layers can, block.<t>.layer.<l>")
