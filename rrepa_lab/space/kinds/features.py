"""The patch features of a frozen encoder, reduced by PCA, with a small decoder that brings them back to pictures.

A flow of a representation encoder's features, in place of a VAE's latents, is the idea of SRC-Flow (arXiv 2605.18267) and of
RAE (arXiv 2510.11690). Here the features of a patch are reduced to a few numbers by PCA over training patches, each of unit
variance, and `rrepa-lab vae train DATA --kind features` trains the decoder. A decoder that learns under noise
(`noise_std`, as RAE's does) takes what a flow generates better.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.align.encoder import make_teacher
from rrepa_lab.align.teacher import Teacher
from rrepa_lab.data.fingerprint import digest, fingerprint_of_tensors
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.loaders import stream
from rrepa_lab.data.subset import limited
from rrepa_lab.errors import LabError
from rrepa_lab.space.autoencoder import AutoencoderConfig, folder_of, is_autoencoder, numbers, read_autoencoder, read_tensors
from rrepa_lab.space.config import SPACES, SpaceConfig, check_channels
from rrepa_lab.space.contract import Frame, Shape
from rrepa_lab.space.latents import LatentSpace
from rrepa_lab.space.networks import decoder

KIND = "features"
CHUNK = 128  # pictures in one pass of the encoder for the PCA
SMALLEST = 1e-8  # variance of a component by that of the largest, below which it holds rounding only


class Features(nn.Module):
    """A frozen encoder, the principal components of its patch features, and a decoder.

    x is (d, rows, columns): at each patch the components of its feature, less their mean and by their standard deviation.
    """

    centre: Tensor
    axes: Tensor
    std: Tensor

    def __init__(self, config: AutoencoderConfig, teacher: Teacher) -> None:
        super().__init__()
        rows, columns = teacher.grid
        if rows != columns:
            raise LabError(f"the encoder {teacher.config.model} has {rows}x{columns} patches: a flow takes square maps")
        if config.channels > teacher.dim:
            raise LabError(f"channels is {config.channels}, but the encoder {teacher.config.model} has {teacher.dim} features")
        self._teacher = [teacher]  # in a list: its weights are not among those of this module
        self.shape: Shape = (config.channels, rows, columns)
        self.size = config.data.image_size
        c, factor = config.data.channels, 2
        while rows * factor < self.size:
            factor *= 2
        self.decoder = decoder(c, config.width, config.depth, factor, config.channels)
        self.register_buffer("centre", torch.zeros(teacher.dim))
        self.register_buffer("axes", torch.zeros(config.channels, teacher.dim))
        self.register_buffer("std", torch.ones(config.channels), persistent=False)
        self.statistics: dict[str, Any] = {}
        self.quality: dict[str, Any] = {}

    @property
    def teacher(self) -> Teacher:
        """The frozen encoder."""
        return self._teacher[0]

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] -> x; nothing is drawn."""
        self.teacher.to(pictures.device)
        x = (self.teacher(pictures) - self.centre) @ self.axes.T / self.std
        return x.transpose(1, 2).unflatten(2, self.shape[1:])

    def decode(self, x: Tensor) -> Tensor:
        """x -> pictures, not clipped."""
        made: Tensor = self.decoder(x)
        size = (self.size, self.size)
        return made if made.shape[2:] == size else F.interpolate(made, size=size, mode="bilinear", antialias=True)

    @torch.no_grad()
    def fit(self, images: ImageSet) -> None:
        """The PCA of the patches of these images, from sums over batches."""
        total = torch.zeros(len(self.centre), dtype=torch.float64)
        products = torch.zeros(len(self.centre), len(self.centre), dtype=torch.float64)
        count = 0
        for x, _ in stream(images, [part.tolist() for part in torch.arange(len(images)).split(CHUNK)]):
            patches = self.teacher(x).flatten(0, 1).double().cpu()
            total, products, count = total + patches.sum(dim=0), products + patches.T @ patches, count + len(patches)
        centre = total / count
        variances, vectors = torch.linalg.eigh(products / count - torch.outer(centre, centre))
        kept, everything = variances.flip(0)[: self.shape[0]], variances.clamp_min(0).sum()
        if not bool((kept > SMALLEST * variances[-1]).all()) or variances[-1] <= 0:
            held = int((variances > SMALLEST * variances[-1]).sum())
            raise LabError(f"channels is {self.shape[0]}, but the features of these pictures vary along {held} directions only")
        axes = vectors.flip(1)[:, : self.shape[0]].T
        axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()  # an axis has no sign of its own: fix one
        self.centre.copy_(centre)
        self.axes.copy_(axes)
        self.statistics = {
            "std": kept.sqrt().tolist(), "explained": float(kept.sum() / everything), "images": len(images),
            "teacher": teacher_words(self.teacher),
        }  # fmt: skip
        self.std.copy_(kept.sqrt())


def teacher_words(teacher: Teacher) -> str:
    """Which encoder: its model and 16 hex digits of its settings and weights."""
    config = teacher.config.to_dict() | {"weights": ""}
    tensors = list(teacher.state_dict().values()) if isinstance(teacher, nn.Module) else []
    return f"{teacher.config.model} [{digest(str(sorted(config.items())), fingerprint_of_tensors(tensors, ()))}]"


def fresh(config: AutoencoderConfig, images: ImageSet) -> Features:
    """An untrained decoder of the PCA of these training images."""
    assert config.encoder is not None
    model = Features(config, make_teacher(config.encoder))
    model.fit(limited(images, config.statistics_images))
    return model


def load_features(config: SpaceConfig) -> Features:
    """The encoder, PCA and decoder of a folder."""
    folder = folder_of(config)
    stored = read_autoencoder(folder, KIND)
    assert stored.config.encoder is not None
    model = Features(stored.config, make_teacher(stored.config.encoder))
    tensors, weights = read_tensors(folder, model.state_dict())
    model.load_state_dict(tensors)
    model.std.copy_(numbers(stored.statistics, "std", model.shape[0], folder))
    now, then = teacher_words(model.teacher), stored.statistics.get("teacher")
    if now != then:
        raise LabError(f"the encoder of {folder} is {now}, and its PCA was made with {then}: use the weights of that time")
    pca = fingerprint_of_tensors([model.centre, model.axes], ())
    model.statistics = {"pca": pca, "std": stored.statistics["std"], "teacher": now, "weights": weights}
    model.quality = stored.quality
    return model.eval().requires_grad_(False)


class _Kind:
    def shape(self, config: SpaceConfig, picture: Shape) -> Shape | None:
        if config.weights is None or not is_autoencoder(folder_of(config)):
            return None
        stored = read_autoencoder(folder_of(config), KIND)
        check_channels(config, stored.config.data.channels, picture)
        if picture != stored.config.picture_shape:
            own, given = stored.config.data.image_size, picture[1]
            raise LabError(f"{folder_of(config)} decodes to pictures of {own}x{own}, and data.image_size is {given}")
        return stored.latents

    def make(self, config: SpaceConfig, frame: Frame) -> LatentSpace:
        folder_of(config)
        return LatentSpace(config, frame, lambda: load_features(config), "principal components of unit variance (features)")


SPACES.register(KIND)(_Kind())
