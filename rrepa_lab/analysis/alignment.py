"""The alignment of a run, looked at from outside the training loop."""

from typing import Any, NamedTuple

from torch import Tensor

from rrepa_lab.align.projector import Projectors, alignment_loss, similarity
from rrepa_lab.align.strategies import STRATEGIES, features
from rrepa_lab.align.target import match_grid
from rrepa_lab.checks import whole_number
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.finite import NotFiniteError, cause
from rrepa_lab.flow.inputs import as_condition, as_images
from rrepa_lab.flow.taps import Tap, Taps
from rrepa_lab.runs.run import Run


class Alignment(NamedTuple):
    """How near a flow's features are to the encoder's."""

    loss: Tensor  # (), differentiable, minus the mean cosine, without lambda
    similarity: dict[str, float]  # tap -> mean cosine


def alignment(
    run: Run,
    x: Tensor,
    y: Any = None,
    strategy: str | None = None,
    taps: Taps | None = None,
    refinements: int | None = None,
    projectors: Projectors | None = None,
    clean: Tensor | None = None,
) -> Alignment:
    """The alignment loss of images (B, C, H, W) in [-1, 1], which the flow reads as they are.

    In training the flow reads images under noise, and the encoder the same images without: give the noised ones as `x` and
    the others as `clean` for the figures of the training log.

    Args:
        x: what the flow reads; types as in `flow.inputs`.
        y: labels as in `TarFlow.forward`, or class names.
        strategy: none, forward, detach, reverse or reverse-exact; the run's own if left out.
        taps: layer taps; the run's own aligned ones if left out.
        refinements: for reverse; the run's own if left out.
        projectors: others than the run's, for taps that it was not trained on.
        clean: (B, C, H, W) what the encoder reads; `x` itself if left out, which is right only where x holds no noise.

    A loaded run is frozen; `run.flow.requires_grad_()` makes the loss differentiable in its parameters.

    Raises: LabError for an unknown strategy or tap, a tap without a projector, a run without an encoder, images of another
        type or shape or not finite, or another number of clean ones; NotFiniteError where the loss is not finite.
    """
    x = as_images(run.flow, x)
    clean = x if clean is None else as_images(run.flow, clean)
    if len(clean) != len(x):
        raise LabError(f"{len(x)} images but {len(clean)} clean ones: give the same images with and without noise")
    y = as_condition(run.flow, y, len(x), run.classes)
    if refinements is not None:
        refinements = whole_number("refinements", refinements)
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
    target = match_grid(encoder(clean), encoder.grid, run.flow.config.side).to(x.dtype)
    _, aligned = features(run.flow, x, y, strategy, wanted, align.refinements if refinements is None else refinements)
    near = {tap: similarity(projectors.project(tap, states), target) for tap, states in aligned.items()}
    for tap, value in near.items():
        if not bool(value.detach().isfinite().all()):
            raise NotFiniteError(f"the similarity at {tap} is not finite: {cause(run.flow)}")
    return Alignment(alignment_loss(near), {tap: value.mean().item() for tap, value in near.items()})


def check_layers(taps: list[Tap]) -> None:
    """LabError for a tap that is not the output of a layer."""
    for tap in taps:
        if not isinstance(tap.layer, int):
            raise LabError(f"{tap.name} cannot be aligned: only the outputs of layers can, block.<t>.layer.<l>")
