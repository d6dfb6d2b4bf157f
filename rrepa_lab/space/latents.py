"""Spaces of latents: a codec between pictures and latents, with everything else that a space is."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from rrepa_lab.data.pixels import add_noise
from rrepa_lab.data.streams import Draws, normal_rows
from rrepa_lab.space.config import SpaceConfig, check_shape, check_statistics
from rrepa_lab.space.contract import Frame, Shape

PIXELS_AT_ONCE = 2**18  # of a batch that is encoded or decoded in one pass: 64 pictures of 64 x 64, 4 of 256 x 256


class Codec(Protocol):
    """The weights of a space of latents: two maps, and all that they depend on.

    Attributes:
        shape: (C, H, W) of the latents of one picture.
        statistics: fingerprint of the weights, scaling and the like, as plain JSON values.
        quality: as in `Space`.
    """

    shape: Shape
    statistics: dict[str, Any]
    quality: dict[str, Any]

    def encode(self, pictures: Tensor, noise: Tensor | None) -> Tensor:
        """Pictures (B, C, H, W) float32 in [-1, 1] -> latents of about unit variance: their mean, or with
        standard normal noise (B, *shape) a sample of them."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, *shape) float32 -> pictures."""
        ...

    def to(self, device: torch.device | str) -> Any:
        """Move the weights."""
        ...


class LatentSpace:
    """The space of a codec, which is loaded at its first use and checked against the run.

    Args:
        config: the settings of the space, with what the run stored of it.
        load: makes the codec.
        unit: of x, for protocols.

    Raises: LabError at the first use, for weights that are missing, are not those of the training, or give another shape than
        the flow takes.
    """

    def __init__(self, config: SpaceConfig, frame: Frame, load: Callable[[], Codec], unit: str) -> None:
        self.config, self.frame, self.unit, self._load = config, frame, unit, load
        self.device: torch.device = torch.device("cpu")

    @property
    def name(self) -> str:
        """The kind."""
        return self.config.kind

    @property
    def shape(self) -> Shape:
        """(C, H, W) of x, that of the flow; compared with the codec's when it is loaded."""
        return self.frame.x

    @property
    def picture_shape(self) -> Shape:
        """(C, H, W) of a picture."""
        return self.frame.picture

    @cached_property
    def codec(self) -> Codec:
        """The weights, loaded on first use."""
        with torch.inference_mode(False):
            codec = self._load()
        check_shape(self.name, codec.shape, self.frame)
        check_statistics(self.config, codec.statistics)
        codec.to(self.device)
        return codec

    @property
    def statistics(self) -> dict[str, Any]:
        """Those of the codec."""
        return self.codec.statistics

    @property
    def quality(self) -> dict[str, Any]:
        """That of the codec."""
        return self.codec.quality

    stage_words = "decoded from the latents of this stage"

    @torch.no_grad()
    def encode(self, pictures: Tensor, draws: Draws = None) -> Tensor:
        """Latents without noise; with `draws` samples of them, where `space.sample` is set."""
        if draws is None or not self.config.sample:
            return self._in_parts(lambda part, _: self.codec.encode(part, None), pictures, self.shape)
        noise = normal_rows((len(pictures), *self.shape), draws)
        return self._in_parts(lambda part, rows: self.codec.encode(part, noise[rows].to(part)), pictures, self.shape)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures, not clipped."""
        return self._in_parts(lambda part, _: self.codec.decode(part), x, self.picture_shape)

    def show(self, x: Tensor) -> Tensor:
        """As `decode`, back on the device of x."""
        return self.decode(x).to(x.device)

    def add_noise(self, x: Tensor, draws: Draws = None) -> Tensor:
        """x + sigma * eps; the noise is drawn on the CPU."""
        return add_noise(x, self.frame.noise_std, draws)

    def to(self, device: torch.device | str) -> Self:
        """Move it; returns itself."""
        device = torch.device(device)
        if device != self.device:
            self.device = device
            if "codec" in self.__dict__:
                self.codec.to(device)
        return self

    def _in_parts(self, map_: Callable[[Tensor, slice], Tensor], given: Tensor, shape: Shape) -> Tensor:
        """The map over parts of the batch, with their rows, in float32; the result in the dtype that was given."""
        count = max(1, PIXELS_AT_ONCE // (self.picture_shape[1] * self.picture_shape[2]))
        if not len(given):
            return given.new_zeros(0, *shape)
        with torch.autocast(self.device.type, enabled=False):  # latents do not depend on the precision of the training
            starts = range(0, len(given), count)
            parts = [
                map_(given[start : start + count].to(self.device, torch.float32), slice(start, start + count))
                for start in starts
            ]
        return torch.cat(parts).to(given.dtype)
