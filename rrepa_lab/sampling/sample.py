"""Noise becomes images, each from a seed of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rrepa_lab.errors import LabError
from rrepa_lab.flow.decoding import Progress
from rrepa_lab.flow.taps import Tap
from rrepa_lab.flow.tarflow import TarFlow
from rrepa_lab.runs import Run
from rrepa_lab.sampling.denoise import denoise_step


@dataclass(frozen=True)
class Samples:
    """Generated images and how to make them again."""

    images: Tensor  # (B, C, H, W), clipped to [-1, 1]
    labels: Tensor  # (B,) int64; -1 is no label
    seeds: list[int]
    path: list[Tensor]  # (B, C, H, W) not clipped: noise, then the tokens after each block, N..1, then the denoised image
    method: str = "cached"  # that they were decoded by
    error: float | None = None  # the largest of any decoding that measured it, see `TarFlow.inverse`


def noise(flow: TarFlow, seeds: Sequence[int]) -> Tensor:
    """Noise of the flow's prior (B, T, P), on the CPU, image i from seeds[i] alone, so that company changes nothing."""
    shape = (flow.config.tokens, flow.config.token_size)
    draws = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return draws if flow.prior_var is None else draws * flow.prior_var.sqrt().to(draws)


@torch.no_grad()
def sample(
    run: Run | TarFlow,
    seeds: Sequence[int],
    labels: int | Sequence[int] | None = None,
    guidance: float = 0.0,
    *,
    annealed: bool = False,
    temperature: float = 1.0,
    denoise: bool = True,
    method: str = "auto",
    batch: int = 256,
    precision: Literal["float32", "bfloat16"] = "float32",
    progress: Progress | None = None,
) -> Samples:
    """Draw images.

    Args:
        run: a run or its flow.
        seeds: one per image, each >= 0.
        labels: a class for all, one for each seed, or None; -1 is no label.
        guidance, annealed, temperature, method, precision, progress: as in `TarFlow.inverse`.
        denoise: finish with one step along the score, which removes the noise the flow was trained with.
        batch: images decoded at once, at most.

    Raises: LabError for no seeds, a negative seed, labels that do not match the seeds or are out of range.

    Example:
        >>> import rrepa_lab as rl
        >>> rl.sample(rl.load("digits-reverse"), seeds=[17, 18], labels=3).images.shape
        torch.Size([2, 1, 8, 8])
    """
    flow = run.flow if isinstance(run, Run) else run
    seeds = [int(seed) for seed in seeds]
    if not seeds or min(seeds) < 0:
        raise LabError(f"seeds must be a list of integers >= 0, not {seeds}")
    y = _labels(labels, len(seeds))
    like = next(flow.parameters())
    z = noise(flow, seeds).to(like)
    y_used = y.to(like.device) if flow.config.classes or bool((y != -1).any()) else None
    sides = [Tap(number, "in").name for number in range(flow.config.blocks, 0, -1)]
    paths, errors = [], []
    for part in range(0, len(seeds), batch):
        rows = slice(part, part + batch)
        y_part = None if y_used is None else y_used[rows]
        out = flow.inverse(
            z[rows], y_part, guidance, annealed, temperature, method, sides, precision=precision, progress=progress
        )
        errors += [] if out.error is None else [out.error]
        path = [flow.images(z[rows]), *(flow.images(out.states[name]) for name in sides)]
        if denoise:
            path.append(denoise_step(flow, path[-1], y_part))
        paths.append(path)
    path = [torch.cat(stages) for stages in zip(*paths, strict=True)]
    return Samples(path[-1].clamp(-1, 1), y, seeds, path, out.method, max(errors, default=None))


def _labels(labels: int | Sequence[int] | None, count: int) -> Tensor:
    if labels is None or isinstance(labels, int):
        return torch.full((count,), -1 if labels is None else labels)
    if len(labels) != count:
        raise LabError(f"{len(labels)} labels for {count} seeds: give one label, or one for each seed")
    return torch.tensor([int(label) for label in labels])
