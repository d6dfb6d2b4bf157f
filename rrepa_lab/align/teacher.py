"""The configuration and the protocol of a teacher, and the teachers that are known by name beside timm's models."""

from collections.abc import Callable
from typing import Any, Protocol

from pydantic import Field
from torch import Tensor

from rrepa_lab.config import Config
from rrepa_lab.registry import Registry


class EncoderConfig(Config):
    """A teacher: a registered one or a timm model, where its weights come from, and the size of its input."""

    model: str = Field("vit_base_patch14_dinov2.lvd142m", description="a registered teacher, or a name from timm.list_models()")
    weights: str = Field("pretrained", description="pretrained | random[:<seed>] | bundled:<name> | a local weights file")
    image_size: int = Field(224, ge=1, description="images are resized to this edge")
    channels: int = Field(3, ge=1, description="channels the model takes; grey images are repeated")
    args: dict[str, Any] = Field({}, description="further arguments of timm.create_model")


class Teacher(Protocol):
    """A frozen vision encoder: images in, patch features out. It owns its resizing and normalization."""

    config: EncoderConfig
    dim: int  # E, numbers of a patch feature
    grid: tuple[int, int]  # rows and columns of patches

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of any size -> features (B, rows * columns, E), row-major, float32, no graph."""
        ...

    def to(self, device: Any) -> "Teacher":
        """Move it; returns itself."""
        ...


# (configuration, whether weights may be downloaded) -> teacher; `encoder.model` names one
TEACHERS: Registry[Callable[[EncoderConfig, bool], Teacher]] = Registry("teacher")
