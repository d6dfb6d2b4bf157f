"""The small optimization loop that encoder, evaluator and probes share: AdamW, one loss, a cosine schedule."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rrepa_lab.errors import LabError
from rrepa_lab.training.schedule import learning_rate

T = TypeVar("T")


class FitReport(NamedTuple):
    """One step."""

    step: int  # steps done, from 1
    steps: int
    loss: float


@dataclass(frozen=True)
class FitSettings:
    """Steps and optimizer.

    Args:
        steps: how many batches there are.
        lr: peak learning rate; it ends at 0.
        warmup: steps of linear warm-up.
    """

    steps: int
    lr: float
    weight_decay: float = 1e-4
    warmup: int = 0


def minimize(
    parameters: Iterable[nn.Parameter],
    batches: Iterable[T],
    loss_of: Callable[[int, T], Tensor],
    settings: FitSettings,
    start: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[FitReport]:
    """Minimize a loss, a step for each batch, yielding after every step.

    Args:
        loss_of: step (from 0) and batch -> the loss, a scalar.
        start: steps that were taken before; `batches` begins after these.
        optimizer: one with a state, of parameters of its own; by default AdamW of `parameters`.

    Raises: LabError for a loss that is not finite.

    Example:
        >>> x = nn.Parameter(torch.ones(1))
        >>> reports = list(minimize([x], range(50), lambda step, batch: (x**2).sum(), FitSettings(50, 0.1)))
        >>> reports[-1].loss < reports[0].loss
        True
    """
    if optimizer is None:
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    for step, batch in enumerate(batches, start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr, warmup=settings.warmup)
        loss = loss_of(step, batch)
        if not math.isfinite(loss.item()):
            raise LabError(f"the loss is {loss.item()} at step {step + 1}: lower lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield FitReport(step + 1, settings.steps, loss.item())
