"""What a flow models: the stage between pictures and the numbers that the flow transforms."""

from typing import Protocol

import torch
from torch import Tensor


class Space(Protocol):
    """An invertible or lossy map between pictures and the flow's input, with the noise of the training.

    Pictures are (B, C, H, W) in [-1, 1]; x is (B, *shape).
    """

    @property
    def name(self) -> str:
        """pixels, vae, small-vae, features."""
        ...

    @property
    def unit(self) -> str:
        """The unit of x and of the noise, for protocols: "pixels in [-1, 1]"."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x."""
        ...

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures -> x, without noise."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """x -> pictures."""
        ...

    def add_noise(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures -> x under the noise that the flow is trained under."""
        ...
