"""The prior, and the one place where likelihoods change their unit.

Symbols: T tokens of P numbers; dims = T * P = C * H * W; nats are natural-log units summed over one image.
"""

import math

from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def prior_log_prob(z: Tensor, variance: Tensor | None = None) -> Tensor:
    """Log density of a normal with mean 0 and this variance (T, P), 1 if left out: (B, T, P) -> (B,) nats."""
    dims = z[0].numel()
    if variance is None:
        return -0.5 * z.square().sum(dim=(1, 2)) - dims * HALF_LOG_2PI
    return -0.5 * (z.square() / variance + variance.log()).sum(dim=(1, 2)) - dims * HALF_LOG_2PI


def flow_loss(z: Tensor, logdet: Tensor, variance: Tensor | None = None) -> Tensor:
    """The training loss of TARFlow, nats per dimension without the constant 0.5 * log(2 pi), () averaged over images.

    L_nf = 0.5 * mean(z^2) + sum over blocks of mean(alpha); `logdet` (B,) is minus that sum times dims. With a variance
    (T, P) of the prior the first term is 0.5 * mean(z^2 / variance + log(variance)).
    """
    dims = z[0].numel()
    prior = z.square() if variance is None else z.square() / variance + variance.log()
    return 0.5 * prior.mean() - logdet.mean() / dims


def nats_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """Negative log density per number, from (B,) nats: comparable only under the same noise."""
    return -log_prob / dims


def bits_per_dim(log_prob: Tensor, dims: int, levels: int) -> Tensor:
    """Code length per number of integer images that were dequantized by uniform noise and scaled to [-1, 1].

    Args:
        log_prob: (B,) nats of `pixels.dequantize(x, levels)`.
        dims: numbers in one image, C * H * W.
        levels: how many integer values a number can take: 256 for 8-bit images, 17 for digits.

    Raises: ValueError if dims < 1 or levels < 2. Source: Theis et al. 2015, arXiv 1511.01844.
    """
    if dims < 1 or levels < 2:
        raise ValueError(f"bits/dim needs dims >= 1 and levels >= 2, not dims={dims}, levels={levels}")
    return (nats_per_dim(log_prob, dims) + math.log(levels / 2)) / math.log(2)
