"""The clean-up step after sampling."""

import torch
from torch import Tensor

from rrepa_lab.flow.tarflow import TarFlow


def denoise_step(flow: TarFlow, x: Tensor, y: Tensor | None = None, strength: float = 1.0) -> Tensor:
    """One step along the score: x + strength * sigma^2 * grad_x log p(x | y), the posterior mean under Gaussian noise.

    Args:
        x: (B, C, H, W), as generated.
        y: the label that was asked for; guidance plays no part here.

    A flow trained with uniform noise has no sigma to remove: x comes back as it is.
    Source: TARFlow, arXiv 2412.06329, section 3.3 (Tweedie's formula).
    """
    if flow.config.noise != "gaussian":
        return x
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        (score,) = torch.autograd.grad(flow.log_prob(at, y).sum(), at)
    return x + strength * flow.config.noise_std**2 * score
