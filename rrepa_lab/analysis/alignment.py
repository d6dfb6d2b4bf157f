"""The alignment loss of a run on any images, outside the training loop."""

from typing import Any, NamedTuple

from torch import Tensor

from rrepa_lab.align.aligner import layer_taps
from rrepa_lab.align.projector import Projectors
from rrepa_lab.align.strategy import STRATEGIES
from rrepa_lab.checks import whole_number
from rrepa_lab.errors import LabError
from rrepa_lab.flow.finite import NotFiniteError, cause
from rrepa_lab.flow.inputs import as_condition, as_images
from rrepa_lab.flow.taps import Taps
from rrepa_lab.runs.inputs import as_pictures, encoded
from rrepa_lab.runs.run import Run


class Alignment(NamedTuple):
    """How near a flow's features are to the encoder's.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> found = rl.alignment(run, *run.data("test", 4))
        >>> sorted(found.similarity), found.loss.shape
        (['block.3.layer.2', 'block.4.layer.2'], torch.Size([]))
    """

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
    """The alignment loss of images (B, C, H, W) in [-1, 1], which the flow encodes as they are.

    In training the flow encodes images under noise, and the teacher the same images without: give the noised ones as `x` and
    the others as `clean` for the figures of the training log.

    Args:
        x: what the flow encodes; types as in `flow.inputs`.
        y: labels as in `TarFlow.forward`, or class names.
        strategy: none, forward, detach, reverse, reverse-exact or reverse-cached; the run's own if left out.
        taps: layer taps; the run's own aligned ones if left out.
        refinements: for reverse; the run's own if left out.
        projectors: others than the run's, for taps that it was not trained on.
        clean: (B, C, H, W) what the teacher encodes; `x` itself if left out, which is right only where x holds no noise, and
            the teacher sees the flow's pictures. With `data.teacher_size` they may be of that size, as in training.

    A loaded run is frozen; `run.flow.requires_grad_()` makes the loss differentiable in its parameters.

    Raises: LabError for an unknown strategy or tap, a tap without a projector, a run without an encoder, images of another
        type or shape or not finite, or another number of clean ones; NotFiniteError where the loss is not finite.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-none")  # no projectors: fresh ones are needed for its layers
        >>> from rrepa_lab.align.projector import Projectors
        >>> fresh = Projectors(["block.4.layer.2"], 64, 32, run.encoder().dim)
        >>> found = rl.alignment(run, *run.data("test", 2), strategy="detach", taps="block.4.layer.2", projectors=fresh)
        >>> list(found.similarity)
        ['block.4.layer.2']
    """
    given = as_pictures(run, x)
    x = encoded(run, given)
    clean = given if clean is None else _for_teacher(run, clean)
    if len(clean) != len(x):
        raise LabError(f"{len(x)} images but {len(clean)} clean ones: give the same images with and without noise")
    condition = as_condition(run.flow, y, len(x), classes=run.classes)
    if refinements is not None:
        refinements = whole_number("refinements", refinements)
    changes = {"strategy": strategy, "refinements": refinements}
    align = run.config.align.model_copy(update={key: value for key, value in changes.items() if value is not None})
    projectors = run.projectors if projectors is None else projectors
    STRATEGIES.check(align.strategy)
    wanted = layer_taps(run.flow.resolve(run.config.align.taps if taps is None else taps))
    if align.strategy == "none" or not wanted:
        return Alignment(x.new_zeros(()), {})
    missing = [tap.name for tap in wanted if tap.name not in projectors.taps]
    if missing:
        has = ", ".join(projectors.taps) or "none"
        raise LabError(f"run {run.name!r} has no projector for {missing[0]} (it has: {has}); pass projectors=")
    aligner = run.aligner(align, projectors)
    _, loss, near = aligner(run.flow, x, condition, aligner.target(clean).to(x.dtype), [tap.name for tap in wanted])
    for tap, value in near.items():
        if not bool(value.detach().isfinite().all()):
            raise NotFiniteError(f"the similarity at {tap} is not finite: {cause(run.flow)}")
    return Alignment(loss, {tap: value.mean().item() for tap, value in near.items()})


def _for_teacher(run: Run, clean: Tensor) -> Tensor:
    """Pictures of the flow's size or of the teacher's, checked."""
    size, channels = run.config.data.teacher_size, run.config.data.channels
    if size is None or tuple(getattr(clean, "shape", ()))[-1:] != (size,):
        return as_pictures(run, clean)
    return as_images(run.flow, clean, (channels, size, size))
