"""Small flows and runs in float64 whose weights are drawn in float64: fresh ones are the identity, and float32 draws differ
from processor to processor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import rrepa_lab as rl
from rrepa_lab.runs.run import build

FLOWS = {
    "plain": rl.FlowConfig(classes=10, width=16, head_width=8, blocks=3, layers=2),
    "rotary-swiglu": rl.FlowConfig(classes=4, width=16, head_width=16, blocks=2, layers=3, positions="rotary", mlp="swiglu"),
    "unconditional": rl.FlowConfig(width=16, head_width=8, blocks=4, layers=1, patch_size=4, noise="uniform"),
    "volume-preserving": rl.FlowConfig(classes=4, width=16, head_width=8, blocks=2, layers=2, volume_preserving=True),
    "colour": rl.FlowConfig(
        classes=3, channels=3, image_size=12, patch_size=3, width=16, head_width=8, blocks=2, layers=1, mlp="swiglu",
        noise="uniform",
    ),
}  # fmt: skip

_SMALL = {
    "flow.width": 16, "flow.head_width": 8, "flow.blocks": 3, "flow.layers": 2, "align.blocks": [2], "align.layers": [1],
    "align.projector_width": 16, "data.shift": 0,
}  # fmt: skip


def drawn(module: nn.Module, seed: int) -> None:
    """Draw every parameter anew, and the variance of the prior.

    Matrices around 0, those that start at 0 (they scale and shift tokens) less widely, so that the inverse stays finite; the
    others (gains and offsets) around 1 or 0, where they start.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter.copy_(parameter.round() + 0.05 * noise)
            else:
                parameter.copy_(noise * (0.7 / parameter.shape[-1] ** 0.5 if parameter.any() else 0.05))
        for name, buffer in module.named_buffers():
            if name.endswith("prior_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=random, dtype=torch.float64))


def flow_named(name: str) -> rl.TarFlow:
    """One of FLOWS."""
    flow = rl.TarFlow(FLOWS[name]).double()
    drawn(flow, seed=1)
    return flow.requires_grad_(False)


def small_run(
    strategy: str = "reverse", seed: int = 1, dtype: torch.dtype = torch.float64, settings: Mapping[str, Any] | None = None
) -> rl.Run:
    """A run of the digits with a small flow."""
    changes = _SMALL | {"align.strategy": strategy, "name": f"small-{seed}"} | dict(settings or {})
    config = rl.preset("digits-reverse").override(changes)
    run = build(config, [str(k) for k in range(10)])
    for number, module in enumerate((run.flow, run.projectors)):
        drawn(module.double(), seed=10 * seed + number)
        module.to(dtype).requires_grad_(False)
    return run


def inputs(config: rl.FlowConfig, count: int = 3) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] and noise (B, T, P)."""
    random = torch.Generator().manual_seed(2)
    x = 2 * torch.rand(count, *config.image_shape, generator=random, dtype=torch.float64) - 1
    return x, torch.randn(count, config.tokens, config.token_size, generator=random, dtype=torch.float64)


def labels(config: rl.FlowConfig, count: int = 3) -> dict[str, Tensor | None]:
    """Every form of a label: none, ids of which one is dropped, class weights, class weights for each block."""
    if not config.classes:
        return {"no label": None}
    random = torch.Generator().manual_seed(3)
    scores = torch.randn(count, config.blocks, config.classes, generator=random, dtype=torch.float64)
    ids = torch.tensor([1, -1, config.classes - 1, 0])[:count]
    return {"no label": None, "ids": ids, "weights": scores[:, 0].softmax(1), "by block": scores.softmax(2)}
