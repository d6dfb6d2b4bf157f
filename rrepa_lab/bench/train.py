"""Training steps, side by side."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.align.projector import Projectors
from rrepa_lab.bench.timing import alternate, kept_bytes, summary
from rrepa_lab.data.loaders import generator, seeded
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.runs.config import RunConfig, complete
from rrepa_lab.training.objective import Objective


def step_costs(
    config: RunConfig, refinements: Sequence[int] = (0, 1, 4), images: int = 64, repeats: int = 5, device: str = "cpu"
) -> pd.DataFrame:
    """Time and memory of one training step (losses and their gradient, without the encoder) under every strategy.

    Args:
        config: sizes of the flow, aligned blocks and layers; the weights are random, the time does not depend on them.
        refinements: of `reverse`, a case each.
        images: of a step.

    Returns: columns strategy, refinements, seconds (median), fastest, slowest, ratio (to `none` in the same round,
        median), kept_mib (what the graph keeps for the backward pass, MiB, parameters not counted), images, repeats.
    """
    config = complete(config)  # as many classes as the data have, and blocks counted from 1
    align = config.align
    cases: dict[tuple[str, int], Callable[[], Any]] = {}
    shape, width = (images, *config.flow.image_shape), 64
    x = torch.randn(shape, generator=generator(0)).to(device)
    y = (torch.arange(images) % config.flow.classes).to(device) if config.flow.classes else None
    target = torch.randn(images, config.flow.tokens, width, generator=generator(1)).to(device)
    asked = [(name, 0) for name in ("none", "forward", "detach")] + [("reverse", count) for count in refinements]
    for name, count in [*asked, ("reverse-exact", 0)]:
        chosen = align.model_copy(update={"strategy": name, "refinements": count})
        with seeded(0):
            flow = TarFlow(config.flow)
            projectors = Projectors.of(chosen, config.flow, width)
        perturb(flow, 0)
        cases[name, count] = partial(step, Objective(flow, projectors, chosen).to(device), x, y, target)
    kept = {case: kept_bytes(call) for case, call in cases.items()}
    times = alternate(cases, repeats, device)
    rows = []
    for (name, count), seconds in times.items():
        row = {"strategy": name, "refinements": count} | summary(seconds, times["none", 0])
        rows.append(row | {"kept_mib": kept[name, count] / 2**20, "images": images, "repeats": repeats})
    return pd.DataFrame(rows)


def step(objective: Objective, x: Tensor, y: Tensor | None, target: Tensor | None) -> None:
    """Losses and their gradient."""
    objective.zero_grad()
    objective(x, y, target).total.backward()
