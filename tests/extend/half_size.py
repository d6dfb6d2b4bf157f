"""A space: means of 2 x 2 pixels, and a picture of constant squares back."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.space.config import SPACES, SpaceConfig
from rrepa_lab.space.contract import Frame
from rrepa_lab.space.latents import LatentSpace


class Means:
    """The codec of pictures of C x H x W; it has no weights but a version."""

    def __init__(self, picture: tuple[int, int, int], version: Any) -> None:
        self.shape = (picture[0], picture[1] // 2, picture[2] // 2)
        self.statistics, self.quality = {"version": version}, {"psnr": 20.0}

    def encode(self, pictures: Tensor, noise: Tensor | None) -> Tensor:
        return F.avg_pool2d(pictures, 2)

    def decode(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2)

    def to(self, device: Any) -> None:
        pass


class HalfSize:
    def shape(self, config: SpaceConfig, picture: tuple[int, int, int]) -> tuple[int, int, int]:
        return Means(picture, None).shape

    def make(self, config: SpaceConfig, frame: Frame) -> LatentSpace:
        return LatentSpace(config, frame, lambda: Means(frame.picture, config.weights), "means of 2 x 2 pixels")


SPACES.register("half-size")(HalfSize())
