"""Convolutional networks between pictures and small maps of latents."""

import math

import torch
from torch import Tensor, nn

MOST_DOUBLED = 8  # the width grows by this factor at most
GROUPS = 8  # of channels, which are normalized together


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) in the same shape."""
        return x + self.body(x)


def _widths(width: int, factor: int) -> list[int]:
    """Channels at each size, the largest map first."""
    return [width * min(2**halving, MOST_DOUBLED) for halving in range(int(math.log2(factor)))]


def _end(width: int, out: int) -> list[nn.Module]:
    return [nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)]


def encoder(channels: int, width: int, depth: int, factor: int, out: int) -> nn.Sequential:
    """Pictures (B, channels, H, W) -> (B, out, H / factor, W / factor).

    The first halving takes 2 x 2 pixels as channels, so that no convolution works at the size of the picture: that is where
    most of the cost of such networks lies. Each further halving doubles the width, up to eight times.
    """
    layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, width, 3, padding=1)]
    now = width
    for wider in _widths(width, factor)[1:]:
        layers += [*(Residual(now) for _ in range(depth)), nn.Conv2d(now, wider, 3, stride=2, padding=1)]
        now = wider
    return nn.Sequential(*layers, *(Residual(now) for _ in range(depth)), *_end(now, out))


def decoder(channels: int, width: int, depth: int, factor: int, given: int) -> nn.Sequential:
    """The way back: (B, given, H / factor, W / factor) -> pictures (B, channels, H, W); `width` is that of the last stage."""
    now, *narrower = reversed(_widths(width, factor))
    layers: list[nn.Module] = [nn.Conv2d(given, now, 3, padding=1), *(Residual(now) for _ in range(depth))]
    for next_ in narrower:
        layers += [nn.Conv2d(now, 4 * next_, 3, padding=1), nn.PixelShuffle(2), *(Residual(next_) for _ in range(depth))]
        now = next_
    return nn.Sequential(*layers, *_end(now, 4 * channels), nn.PixelShuffle(2))


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from N(mean, variance) to N(0, 1), in nats for each number, averaged -> ()."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2 c, H, W) -> mean and log variance (B, c, H, W), the latter within -30..20."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def sampled(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A sample of the posterior by standard normal noise of the same shape."""
    return mean + (0.5 * log_variance).exp() * noise


def psnr(pictures: Tensor, made: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture (B,), dB: 10 log10(4 / mean squared error), both being in [-1, 1].

    Example:
        >>> psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.2)).round().item()
        20.0
    """
    return 10 * torch.log10(4 / (pictures - made).square().flatten(1).mean(dim=1).clamp_min(1e-12))
