"""Frozen vision encoders: images in [-1, 1] in, patch features out.

An encoder owns its resizing, its normalisation and the trimming of its class and register tokens. Every encoder is
a timm model; the weights are timm's own (downloaded when asked for), a local file, or bundled with this package.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.align.weights import filled, read_tensors, strip_prefix
from rrepa_lab.config import Config
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.places import assets

BUNDLED = "bundled:"


class EncoderConfig(Config):
    """A timm model, where its weights come from, and the size it looks at."""

    model: str = Field("vit_base_patch14_dinov2.lvd142m", description="a name from timm.list_models()")
    weights: str = Field("pretrained", description="pretrained | random | bundled:<name> | a local weights file")
    image_size: int = Field(224, ge=1, description="images are resized to this edge")
    channels: int = Field(3, ge=1, description="channels the model takes; grey images are repeated")
    args: dict[str, Any] = Field({}, description="further arguments of timm.create_model")


class Encoder(nn.Module):
    """A frozen vision encoder.

    Attributes: dim, E numbers per patch; grid, (rows, columns) of patches.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _timm_model(config).eval().requires_grad_(False)
        for name in ("mean", "std"):
            values = torch.tensor(self.model.pretrained_cfg[name])
            values = values if len(values) == config.channels else values.mean().repeat(config.channels)
            self.register_buffer(name, values.view(1, -1, 1, 1), persistent=False)
        with torch.inference_mode():
            example = self._features(torch.zeros(1, config.channels, config.image_size, config.image_size))
        self.dim: int = example.shape[1]
        self.grid: tuple[int, int] = (example.shape[2], example.shape[3])

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in evaluation mode: a teacher does not learn."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> patch features (B, n, E) in row-major order, float32, without gradient."""
        with torch.inference_mode():
            features = self.map(x).flatten(2).transpose(1, 2)
        return features.clone()  # an ordinary tensor: one of inference mode cannot be saved for a backward pass

    def map(self, x: Tensor) -> Tensor:
        """As `forward`, as feature maps (B, E, rows, columns) and with a graph if the parameters ask for one."""
        return self._features((self.prepare(x) - self.mean) / self.std).float()

    def prepare(self, x: Tensor) -> Tensor:
        """Images in [-1, 1] of any size -> (B, channels, image_size, image_size) in [0, 1]."""
        x = (x.float() + 1) / 2
        if x.shape[1] == 1 and self.config.channels > 1:
            x = x.expand(-1, self.config.channels, -1, -1)
        if x.shape[1] != self.config.channels:
            raise LabError(f"encoder {self.config.model} takes {self.config.channels} channels, the images have {x.shape[1]}")
        size = (self.config.image_size, self.config.image_size)
        return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 1)

    def _features(self, x: Tensor) -> Tensor:
        # the last map, after the final norm; timm drops class and register tokens itself
        return self.model.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[-1]


def _timm_model(config: EncoderConfig) -> Any:
    import timm

    name = config.model
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models(pretrained=True) + timm.list_models())
    args: dict[str, Any] = {"num_classes": 0, "in_chans": config.channels, **config.args}
    if "vit" in name or "img_size" in args:
        args["img_size"] = config.image_size
    source = config.weights
    if source == "random":
        return timm.create_model(name, pretrained=False, **args)
    if source == "pretrained":
        with _explained(f"weights of {name} cannot be fetched; give a local file: --set encoder.weights=FILE.safetensors"):
            return timm.create_model(name, pretrained=True, **args)
    overlay: dict[str, Any] = {}
    if source.startswith(BUNDLED):
        path = assets() / "encoders" / source.removeprefix(BUNDLED) / "model.safetensors"
        overlay["input_size"] = (config.channels, config.image_size, config.image_size)  # timm need not adapt the first layer
    else:
        path = Path(source).expanduser()
    if not path.is_file():
        raise LabError(f"no encoder weights at {path}: encoder.weights is {source!r}")
    with torch.device("meta"):
        expected = set(timm.create_model(name, pretrained=False, **args).state_dict())
    what = f"{path} does not hold weights of {name} with {args}"
    try:
        tensors = strip_prefix(read_tensors(path), expected)

        def create() -> Any:
            with _explained(what):
                given = {"state_dict": dict(tensors), **overlay}  # a copy: some of timm's models change the dictionary
                return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given, **args)

        model: Any = filled(create, set(tensors))
    except LabError as error:
        raise LabError(str(error) if str(error).startswith(what) else f"{what}: {error}") from None
    for settings in (model.pretrained_cfg, model.default_cfg):
        settings["state_dict"] = None  # the weights are in the model: no second copy
    return model


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever goes wrong while weights are read (network, format, shapes) into one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise LabError(f"{what} ({type(error).__name__}: {reason[0] if reason else 'no message'})") from error


def match_grid(features: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Resample patch features (B, n, E) from the encoder's grid to the flow's (B, side * side, E).

    Averages where the encoder is finer, interpolates where it is coarser; the same tensor when the grids agree.
    """
    if grid == (side, side):
        return features
    maps = features.transpose(1, 2).unflatten(2, grid)
    if min(grid) >= side:
        maps = F.adaptive_avg_pool2d(maps, side)
    else:
        maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)
