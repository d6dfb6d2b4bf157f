"""Weights away from the identity, for tests and for gradients."""

import torch
from torch import nn


def perturb(module: nn.Module, seed: int, std: float = 0.05) -> None:
    """Add normal noise to every parameter: a fresh flow is the identity, on which no test and no gradient says anything."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data += std * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
