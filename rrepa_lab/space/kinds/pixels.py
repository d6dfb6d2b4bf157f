"""The space of pixels: a flow models the picture itself."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from rrepa_lab.data.pixels import bin_centres, from_dequantized, training_noise
from rrepa_lab.data.streams import Draws
from rrepa_lab.space.config import SPACES, SpaceConfig
from rrepa_lab.space.contract import Frame, Shape


@dataclass(frozen=True)
class Pixels:
    """Pixels in [-1, 1], under Gaussian noise as they are, under uniform noise as dequantized integers.

    Args:
        shape: (C, H, W).
        levels: integer values that a number can take: 256 for 8-bit pictures, 17 for digits.
        noise: of the training, "gaussian" or "uniform".
        noise_std: sigma of gaussian noise.

    Example:
        >>> space = Pixels((1, 8, 8), levels=17, noise="uniform", noise_std=0.0)
        >>> pictures = torch.zeros(2, 1, 8, 8)
        >>> bool((space.decode(space.encode(pictures)) == pictures).all())
        True
    """

    shape: Shape
    levels: int
    noise: str
    noise_std: float
    name: str = "pixels"
    stage_words: str = ""

    @property
    def picture_shape(self) -> Shape:
        """That of x."""
        return self.shape

    @property
    def unit(self) -> str:
        """Pixels, or dequantized integers on the same scale."""
        return "pixels in [-1, 1]" if self.noise == "gaussian" else f"dequantized pixels in [-1, 1], {self.levels} levels"

    @property
    def statistics(self) -> dict[str, Any]:
        """None: x is the picture."""
        return {}

    @property
    def quality(self) -> dict[str, Any]:
        """None: nothing is lost."""
        return {}

    def encode(self, pictures: Tensor, draws: Draws = None) -> Tensor:
        """The pictures themselves; under uniform noise the centres of their bins, the mean of the dequantized values."""
        return pictures if self.noise == "gaussian" else bin_centres(pictures, self.levels)

    def decode(self, x: Tensor) -> Tensor:
        """The pictures themselves; under uniform noise the integer whose bin holds the value."""
        return x if self.noise == "gaussian" else from_dequantized(x, self.levels)

    def show(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def add_noise(self, x: Tensor, draws: Draws = None) -> Tensor:
        """x + sigma * eps, or (integer + u) / levels * 2 - 1; the noise is drawn on the CPU."""
        return training_noise(x, self.noise, self.noise_std, self.levels, draws)

    def to(self, device: torch.device | str) -> Self:
        """Itself: there are no weights."""
        return self


class _Kind:
    def shape(self, config: SpaceConfig, picture: Shape) -> Shape:
        return picture

    def make(self, config: SpaceConfig, frame: Frame) -> Pixels:
        return Pixels(frame.x, frame.levels, frame.noise, frame.noise_std)


SPACES.register("pixels")(_Kind())
