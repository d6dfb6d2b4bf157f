"""Frozen vision encoders: images in [-1, 1] in, patch features out.

An encoder owns its resizing, its normalisation and the trimming of its class and register tokens. Every encoder is
a timm model; the weights are timm's own (downloaded when they are needed), those of a Python package (`align.packages`), a
local file, bundled with this package, or drawn from a seed.
"""

import hashlib
import json
import re
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.align.hub import hub
from rrepa_lab.align.named import BUNDLED, NAMED, PACKAGE, timm_name
from rrepa_lab.align.packages import package_file, timm_names
from rrepa_lab.align.teacher import TEACHERS, EncoderConfig, Teacher
from rrepa_lab.align.weights import filled, read_tensors, strip_prefix
from rrepa_lab.checks import LARGEST_SEED
from rrepa_lab.data.loaders import seeded
from rrepa_lab.errors import LabError, LabWarning, unknown
from rrepa_lab.paths import assets


class Encoder(nn.Module):
    """A frozen vision encoder.

    Args:
        download: whether weights that are not on this machine may be fetched.

    Attributes: dim, E numbers per patch; grid, (rows, columns) of patches.

    The features are those of `config.layer`: the last one, a block of a Transformer, or a stage of a CNN. The final norm of
    a Transformer is applied to the features of any block, as DINOv2 does it for intermediate layers.

    A picture is resized to `config.image_size` as a whole, by the interpolation of the model (bicubic but for models that
    timm evaluates bilinearly) with antialiasing; no part is cropped.

    A model that does not read images of `config.image_size` is given its own size, with a warning.

    Raises: LabError for a model that timm does not have or that gives no feature maps, arguments that it does not take, a
        layer that it does not have, and weights that cannot be had or do not fill the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig, download: bool = True) -> None:
        super().__init__()
        self.config, self.model, self.norm = config, _timm_model(config, download), True
        self.indices: int | list[int] = 1  # of timm: so many of the last maps, or which
        try:
            example = self._example()
        except _SizeError as error:
            own = int(self.model.pretrained_cfg["input_size"][-1])
            if own == config.image_size:
                raise LabError(f"encoder {config.model} cannot read images of {own}x{own}: {error}") from error
            what = f"encoder {config.model} does not read images of {config.image_size}x{config.image_size}"
            warnings.warn(f"{what}: its own size, {own}, is used (set encoder.image_size={own})", LabWarning, stacklevel=2)
            self.config = config.override({"image_size": own})
            self.model = _timm_model(self.config, download)
            example = self._example()
        if config.layer != -1:
            self._choose_layer()
            example = self._example()
        self.model.eval().requires_grad_(False)
        for name in ("mean", "std"):
            values = torch.tensor(self.model.pretrained_cfg[name])
            values = values if len(values) == config.channels else values.mean().repeat(config.channels)
            self.register_buffer(name, values.view(1, -1, 1, 1), persistent=False)
        self.interpolation = "bilinear" if self.model.pretrained_cfg.get("interpolation") == "bilinear" else "bicubic"
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
        return x if x.shape[2:] == size else F.interpolate(x, size=size, mode=self.interpolation, antialias=True).clamp(0, 1)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of all that the features depend on: weights, preprocessing, layer and grid."""
        found = hashlib.sha256()
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        settings = {"model": timm_name(self.config.model), "weights": "", "norm": self.norm, "indices": self.indices}
        how = (
            self.config.to_dict()
            | settings
            | {"mean": mean, "std": std, "interpolation": self.interpolation, "grid": self.grid}
        )
        found.update(json.dumps(how, sort_keys=True).encode())
        for name, value in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    @cached_property
    def depth(self) -> int:
        """How many layers it has: blocks of a Transformer, or stages of a CNN."""
        size, like = self.config.image_size, next(self.model.parameters())
        x = torch.zeros(1, self.config.channels, size, size, device=like.device)
        with torch.inference_mode():
            return len(self.model.forward_intermediates(x, norm=self.norm, output_fmt="NCHW", intermediates_only=True))

    def _choose_layer(self) -> None:
        """Find `config.layer` among the maps that the model gives; LabError where it has no such layer."""
        config, depth = self.config, self.depth
        if not 1 <= abs(config.layer) <= depth:
            raise LabError(f"encoder.layer is {config.layer}, but {config.model} has layers 1..{depth} (-1 is the last)")
        self.indices = [(config.layer - 1) % depth if config.layer > 0 else depth + config.layer]

    def _example(self) -> Tensor:
        """Feature maps of one empty image; _SizeError where the model does not read images of this size."""
        size, model = self.config.image_size, self.model.eval()
        if not hasattr(model, "forward_intermediates"):
            raise LabError(f"encoder {self.config.model} gives no feature maps: timm has no forward_intermediates for it")
        x = torch.zeros(1, self.config.channels, size, size)
        try:
            with torch.inference_mode():
                try:
                    return self._features(x)
                except AssertionError:  # some of timm's models give no features of the final norm alone
                    self.norm = False
                    return self._features(x)
        except (AssertionError, RuntimeError, ValueError) as error:  # timm's models say it in many kinds
            if out_of_memory(error):
                raise
            raise _SizeError(first_line(error)) from error

    def _features(self, x: Tensor) -> Tensor:
        # timm drops class and register tokens itself
        early = {} if self.indices == 1 else {"stop_early": True}
        return self.model.forward_intermediates(
            x, indices=self.indices, norm=self.norm, output_fmt="NCHW", intermediates_only=True, **early
        )[-1]


class _SizeError(Exception):
    """A model does not read images of this size."""


def _timm_model(config: EncoderConfig, download: bool) -> Any:
    import timm

    name, source = timm_name(config.model), config.weights
    if not timm.is_model(name):
        raise unknown("timm model", name, [*NAMED, *timm.list_models(pretrained=True), *timm.list_models()])
    args: dict[str, Any] = {"num_classes": 0, "in_chans": config.channels, **config.args}
    empty, args = _empty(name, args, config.image_size)
    drawn = re.fullmatch(r"random(?::(\d{1,20}))?", source)
    if drawn:
        if int(drawn[1] or 0) > LARGEST_SEED:
            raise LabError(f"encoder.weights={source}: a seed is at most {LARGEST_SEED}")
        with seeded(int(drawn[1] or 0)):
            return timm.create_model(name, pretrained=False, **args)
    if source == "pretrained":
        return _pretrained(name, args, download)
    overlay: dict[str, Any] = {}
    if source.startswith(BUNDLED):
        path = assets() / "encoders" / source.removeprefix(BUNDLED) / "model.safetensors"
        overlay["input_size"] = (config.channels, config.image_size, config.image_size)  # timm need not adapt the first layer
    elif source.startswith(PACKAGE):
        path = package_file(source, config.model)
    else:
        path = Path(source).expanduser()
    if not path.is_file():
        raise LabError(f"no encoder weights at {path}: encoder.weights is {source!r}")
    what = f"{path} does not hold weights of {name} with {args}"
    try:
        tensors = read_tensors(path)
        expected = list(empty.state_dict())
        tensors = timm_names(tensors, expected) if source.startswith(PACKAGE) else strip_prefix(tensors, set(expected))

        def create() -> Any:
            given = {"state_dict": dict(tensors), **overlay}  # a copy: some of timm's models change the dictionary
            try:
                return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given, **args)
            except Exception as error:  # the empty model could be made, so that it is the tensors that do not fit
                if out_of_memory(error):
                    raise
                raise LabError(first_line(error)) from error

        model: Any = filled(create, set(tensors))
    except LabError as error:
        raise LabError(f"{what}: {error}") from error.__cause__
    for settings in (model.pretrained_cfg, model.default_cfg):
        settings["state_dict"] = None  # the weights are in the model: no second copy
    return model


def _empty(name: str, args: dict[str, Any], size: int) -> tuple[Any, dict[str, Any]]:
    """The model without memory, and the arguments with the image size where the model takes one."""
    import timm

    tried = [args] if "img_size" in args else [args | {"img_size": size}, args]
    for given in tried:
        try:
            with torch.device("meta"):
                return timm.create_model(name, pretrained=False, **given), given
        except (TypeError, ValueError, AssertionError) as error:  # an unknown argument, or a value that does not fit
            last = error
    raise LabError(f"timm cannot make {name} with encoder.args {args}: {first_line(last)}") from last


def _pretrained(name: str, args: dict[str, Any], download: bool) -> Any:
    """With timm's own weights, from its cache or from the network."""
    import timm

    if not timm.is_model_pretrained(name):
        raise LabError(f"timm has no weights of {name}: give a local file (--set encoder.weights=FILE.safetensors) or random")
    try:
        with hub(download):
            return timm.create_model(name, pretrained=True, **args)
    except OSError as error:  # the hub's errors, the network's, and a full disk
        raise LabError(
            f"weights of {name} cannot be fetched; give a local file: --set encoder.weights=FILE.safetensors, or train a "
            f"small encoder: rrepa-lab encoder train --data FOLDER --out DIR, then --encoder DIR ({first_line(error)})"
        ) from error


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out; torch has one kind for GPUs and a plain RuntimeError for the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def first_line(error: Exception) -> str:
    """Kind and first line of an error of another library."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def make_teacher(config: EncoderConfig, download: bool = True) -> Teacher:
    """The teacher of this configuration: one registered under the name `config.model`, else a timm model.

    Args:
        download: whether weights that are not on this machine may be fetched.
    """
    return TEACHERS[config.model](config, download) if config.model in TEACHERS else Encoder(config, download)
