"""Quantities that change with the step, as pure functions of it."""

import math

import torch
from torch import Tensor


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, floor: float = 0.0) -> float:
    """Linear warm-up, then a cosine from `peak` to `floor * peak`; `step` counts from 0 to steps - 1."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def ema_decay(step: int, limit: float) -> float:
    """min(limit, (1 + step) / (10 + step)): short memory at first, so that the average forgets the fresh weights."""
    return min(limit, (1 + step) / (10 + step))


def ema_update(averages: list[Tensor], values: list[Tensor], updates: Tensor, limit: float) -> None:
    """An update of an exponential moving average, for torch's `AveragedModel`, which counts the updates before it."""
    torch._foreach_lerp_(averages, values, 1 - ema_decay(int(updates), limit))
