"""Noise becomes images, each from a seed of its own."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rrepa_lab.checks import real_number, seed_list, seed_number
from rrepa_lab.errors import LabWarning
from rrepa_lab.flow.condition import Guidance
from rrepa_lab.flow.contract import FlowModel, InverseOutput
from rrepa_lab.flow.decode.plan import Decoding, Progress
from rrepa_lab.flow.finite import NotFiniteError, cause, listed
from rrepa_lab.flow.inputs import as_labels
from rrepa_lab.flow.taps import Tap
from rrepa_lab.runs.inputs import space_of
from rrepa_lab.runs.run import Run, flow_of
from rrepa_lab.sampling.denoise import finish
from rrepa_lab.space.contract import Space

BATCH = 256  # images decoded at once, at most
FAR = 10.0  # generated numbers beyond this are a warning: images lie in [-1, 1]
FAR_LATENTS = 20.0  # the same for latents, whose standard deviation is about 1


@dataclass(frozen=True)
class Samples:
    """Generated images and how to make them again.

    Example:
        >>> import rrepa_lab as rl
        >>> made = rl.sample(rl.load("digits-reverse"), seeds=[17, 18], labels=3)
        >>> made.images.shape, made.labels.tolist(), len(made.path), made.finish
        (torch.Size([2, 1, 8, 8]), [3, 3], 6, 'denoised')
    """

    images: Tensor  # (B, C, H, W), clipped to [-1, 1]
    labels: Tensor  # (B,) int64; -1 is no label
    seeds: list[int]
    x: list[Tensor]  # (B, *shape) of the space: noise, then the tokens after each block, N..1
    finished: Tensor | None  # (B, C, H, W) `images` before clipping; None where x is not denoised
    space: Space = field(repr=False)  # of x
    method: str = "cached"  # that they were decoded by
    error: float | None = None  # the largest of any decoding that measured it, see `TarFlow.inverse`
    finish: str = "denoised"  # what the last step was, see `sampling.denoise.finish`

    @cached_property
    def path(self) -> list[Tensor]:
        """Pictures to look at, (B, C, H, W), not clipped: of the noise, after each block, N..1, then the finished image.

        Of pixels they are x itself; of latents each stage is decoded, see `space.stage_words`.
        """
        return [*map(self.space.show, self.x), *([] if self.finished is None else [self.finished])]


class SamplesNotFiniteError(NotFiniteError):
    """Some of the samples overflowed; `rows` are theirs, in the order of the seeds."""


def noise(flow: FlowModel, seeds: Sequence[int] | int) -> Tensor:
    """Noise of the flow's prior (B, T, P), on the CPU, image i from seeds[i] alone, so that company changes nothing.

    Raises: LabError for no seeds, or seeds that are not integers in 0..2^63 - 1.
    """
    shape = (flow.config.tokens, flow.config.token_size)
    draws = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seed_list(seeds)])
    return draws if flow.prior_var is None else draws * flow.prior_var.sqrt().to(draws)


@dataclass(frozen=True)
class _Settings:
    """What all images of a call are drawn with."""

    run: Run | FlowModel
    guidance: Guidance
    decoding: Decoding
    denoise: bool
    strength: float
    progress: Progress | None


@torch.no_grad()
def sample(
    run: Run | FlowModel,
    seeds: Sequence[int] | int,
    labels: Any = None,
    guidance: float | Guidance = 0.0,
    *,
    denoise: bool = True,
    strength: float = 1.0,
    method: str | Decoding = "auto",
    progress: Progress | None = None,
) -> Samples:
    """Draw images.

    Args:
        run: a run or its flow.
        seeds: one per image, each in 0..2^63 - 1; an integer is one seed.
        labels: a class for all, one for each seed, or None: ids or class names, see `flow.inputs.as_labels`; -1 is no label.
        guidance: classifier-free guidance weight, or `Guidance(scale, annealed, temperature)`. It has an effect on images
            with a label only, and its temperature with a scale only.
        denoise: finish with one step along the score, which removes the noise the flow was trained with. The images of a run
            trained under uniform noise always go back to pixel values; `Samples.finish` says what was done.
        strength: of the denoising step.
        method: of decoding, or all its settings: see `Decoding`. At most 256 images are decoded at once unless it says so.
        progress: called after each block, with a `BlockReport`.

    Raises: LabError for no seeds, a seed out of range, labels that do not match the seeds or are out of range, a number out
        of range; SamplesNotFiniteError, naming seeds, labels and block, where samples overflow. Warns of samples far outside
        [-1, 1], and of guidance or a temperature that has no effect.

    Example:
        >>> import rrepa_lab as rl
        >>> rl.sample(rl.load("digits-reverse"), seeds=[17, 18], labels=3, guidance=2.0).images.shape
        torch.Size([2, 1, 8, 8])
    """
    flow = flow_of(run)
    seeds = seed_list(seeds)
    y = as_labels(flow, labels, len(seeds), run.classes if isinstance(run, Run) else None)
    rule, decoding = Guidance.of(guidance), Decoding.of(method, run.plan if isinstance(run, Run) else None)
    settings = _Settings(run, rule, decoding, denoise, real_number("strength", strength), progress)
    check_guided(rule, y)
    like = next(flow.parameters())
    z = noise(flow, seeds).to(like)
    labels_used = y.to(like.device) if flow.config.classes else None
    parts, bad, batch = list[_Part](), list[tuple[int, int | None]](), decoding.batch or BATCH
    for start in range(0, len(seeds), batch):
        rows = slice(start, start + batch)
        part, failed = _decode(settings, z[rows], None if labels_used is None else labels_used[rows])
        bad += [(start + row, block) for row, block in failed]
        parts += [] if part is None else [part]
    if bad:
        raise _overflow(flow, sorted(bad), seeds, y, rule)
    x = [torch.cat(stages) for stages in zip(*(part.x for part in parts), strict=True)]
    images, space = torch.cat([part.images for part in parts]), space_of(run)
    _warn_far(space, x[-1], images, rule.scale)
    errors = [part.out.error for part in parts if part.out.error is not None]
    made = Samples(images.clamp(-1, 1), y, seeds, x, images if denoise else None, space, parts[0].out.method)
    return replace(made, error=max(errors, default=None), finish=parts[0].how)


def check_guided(guidance: Guidance, y: Tensor | None) -> None:
    """Warn of settings without effect: guidance where no image has a label, and a temperature without guidance."""
    if guidance.scale and (y is None or (not y.is_floating_point() and bool((y == -1).all()))):
        text = f"guidance {guidance.scale:g} has no effect without a label: give labels, or leave guidance out"
        warnings.warn(text, LabWarning, stacklevel=3)
    if guidance.temperature != 1.0 and not guidance.scale:
        what = f"temperature {guidance.temperature:g} has no effect without guidance"
        warnings.warn(f"{what}: it is that of the unconditional branch", LabWarning, stacklevel=3)


class _Part(NamedTuple):
    x: list[Tensor]
    images: Tensor  # not clipped
    how: str
    out: InverseOutput


def _decode(settings: _Settings, z: Tensor, y: Tensor | None) -> tuple[_Part | None, list[tuple[int, int | None]]]:
    """A batch, and the rows that overflow with the block where they do: they are taken out, and the others tried again."""
    flow = flow_of(settings.run)
    sides = [Tap(number, "in").name for number in range(flow.config.blocks, 0, -1)]
    left, failed = torch.arange(len(z), device=z.device), list[tuple[int, int | None]]()
    while len(left):
        y_left = None if y is None else y[left]
        condition = flow.condition(y_left, len(left), settings.guidance)
        try:
            out = flow.inverse(z[left], condition, method=settings.decoding, taps=sides, progress=settings.progress)
            x = [flow.untokenize(z[left]), *(flow.untokenize(out.states[name]) for name in sides)]
            done = finish(settings.run, x[-1], y_left, denoise=settings.denoise, strength=settings.strength)
        except NotFiniteError as error:
            failed += [(int(left[row]), error.block) for row in error.rows]
            kept = torch.ones(len(left), dtype=torch.bool, device=z.device)
            kept[error.rows] = False
            left = left[kept]
            continue
        return _Part(x, done.images, done.how, out), failed
    return None, failed


def _overflow(
    flow: FlowModel, bad: list[tuple[int, int | None]], seeds: list[int], y: Tensor, guidance: Guidance
) -> SamplesNotFiniteError:
    rows = [row for row, _ in bad]
    at = [block for _, block in bad if block is not None]
    where = f"first in block {max(at)}" if at else "in the denoising step"
    which = [f"{seeds[row]}" if int(y[row]) < 0 else f"{seeds[row]} (label {int(y[row])})" for row in rows]
    text = f"{len(rows)} of {len(seeds)} samples are not finite, {where}, seeds {listed(which)}"
    return SamplesNotFiniteError(f"{text}: {cause(flow, guidance)}", rows, max(at, default=None))


def _warn_far(space: Space, generated: Tensor, finished: Tensor, guidance: float) -> None:
    largest = generated.abs().flatten(1).amax(dim=1)
    if space.name == "pixels":
        largest = torch.maximum(largest, finished.abs().flatten(1).amax(dim=1))
    far = int((largest > (FAR if space.name == "pixels" else FAR_LATENTS)).sum())
    if far:
        left = "left [-1, 1] by far" if space.name == "pixels" else f"are far from any latents of {space.name}"
        text = f"{far} of {len(finished)} samples {left} (numbers up to {float(largest.max()):.3g})"
        text += " and are clipped" if space.name == "pixels" else ""
        advice = f"; guidance {guidance:g} is the likely cause" if guidance else ""
        warnings.warn(text + advice, LabWarning, stacklevel=3)


def seed_range(seed: int, count: int) -> range:
    """Seeds from `seed` on, one for each of `count` images; LabError where the last leaves the range."""
    first = seed_number(seed)
    seed_number(first + count - 1)
    return range(first, first + count)
