"""A convolutional VAE that the kit trains in minutes (`rrepa-lab vae train`): latents of unit variance in each channel."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rrepa_lab.space.autoencoder import (
    AutoencoderConfig,
    folder_of,
    is_autoencoder,
    latents_of,
    numbers,
    read_autoencoder,
    read_tensors,
)
from rrepa_lab.space.config import SPACES, SpaceConfig, check_channels
from rrepa_lab.space.contract import Frame, Shape
from rrepa_lab.space.latents import LatentSpace
from rrepa_lab.space.networks import decoder, encoder, posterior, sampled

KIND = "small-vae"


class SmallVae(nn.Module):
    """Encoder and decoder; x is (latent - mean) / std, by the statistics of the training split."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        c, _, _ = config.picture_shape
        self.encoder = encoder(c, config.width, config.depth, config.factor, 2 * config.channels)
        self.decoder = decoder(c, config.width, config.depth, config.factor, config.channels)
        self.register_buffer("mean", torch.zeros(config.channels), persistent=False)
        self.register_buffer("std", torch.ones(config.channels), persistent=False)
        self.shape: Shape = config.latent_shape
        self.statistics: dict[str, Any] = {}
        self.quality: dict[str, Any] = {}

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, C, H, W) in [-1, 1] -> mean and log variance of the latents, not scaled."""
        return posterior(self.encoder(pictures))

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures -> x, the mean of the posterior; with standard normal noise a sample of it."""
        mean, log_variance = self.moments(pictures)
        latents = mean if noise is None else sampled(mean, log_variance, noise)
        return (latents - self.mean[:, None, None]) / self.std[:, None, None]

    def decode(self, x: Tensor) -> Tensor:
        """x -> pictures, not clipped."""
        found: Tensor = self.decoder(x * self.std[:, None, None] + self.mean[:, None, None])
        return found

    def scale(self, statistics: dict[str, Any], folder: Path) -> None:
        """Take the statistics of the latents over training pictures."""
        self.mean.copy_(numbers(statistics, "mean", self.shape[0], folder))
        self.std.copy_(numbers(statistics, "std", self.shape[0], folder))


def load_small_vae(config: SpaceConfig, picture: Shape) -> SmallVae:
    """The autoencoder of a folder for pictures of this size, which may be another than that of its training."""
    folder = folder_of(config)
    stored = read_autoencoder(folder, KIND)
    vae = SmallVae(stored.config)
    tensors, digest = read_tensors(folder, vae.state_dict())
    vae.load_state_dict(tensors)
    vae.scale(stored.statistics, folder)
    vae.shape = latents_of(picture, stored.config.factor, stored.config.channels)
    vae.statistics = {"weights": digest, **{name: stored.statistics[name] for name in ("mean", "std")}}
    vae.quality = stored.quality
    return vae.eval().requires_grad_(False)


class _Kind:
    def shape(self, config: SpaceConfig, picture: Shape) -> Shape | None:
        if config.weights is None or not is_autoencoder(folder_of(config)):
            return None
        stored = read_autoencoder(folder_of(config), KIND).config
        check_channels(config, stored.data.channels, picture)
        return latents_of(picture, stored.factor, stored.channels)

    def make(self, config: SpaceConfig, frame: Frame) -> LatentSpace:
        folder_of(config)
        return LatentSpace(config, frame, lambda: load_small_vae(config, frame.picture), "latents of unit variance (small-vae)")


SPACES.register(KIND)(_Kind())
