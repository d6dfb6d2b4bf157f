"""A teacher: differences between the halves of each quarter of an image."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.align.teacher import TEACHERS, EncoderConfig


class Edges:
    """Mean, horizontal and vertical difference on a grid of 4 x 4 patches."""

    dim, grid = 3, (4, 4)

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 16, 3)."""
        fine = F.adaptive_avg_pool2d(x.float().mean(dim=1, keepdim=True), 8)
        mean = F.avg_pool2d(fine, 2)
        across = F.avg_pool2d(fine, (2, 1))
        down = F.avg_pool2d(fine, (1, 2))
        parts = [mean, across[..., ::2] - across[..., 1::2], down[..., ::2, :] - down[..., 1::2, :]]
        return torch.cat(parts, dim=1).flatten(2).transpose(1, 2)

    def to(self, device: Any) -> "Edges":
        """It has no weights."""
        return self


TEACHERS.register("edges")(lambda config, download: Edges(config))
