"""Autoencoders that the kit trains, and the folders they lie in.

A folder holds config.json (settings, statistics of the latents, quality), model.safetensors and card.md. config.json is written
last: without it the folder is not an autoencoder yet.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rrepa_lab.align.named import BUNDLED
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.checks import LARGEST_SEED
from rrepa_lab.config import Config
from rrepa_lab.data.config import DataConfig, named_data
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.files import sha256, write_atomically, write_text
from rrepa_lab.paths import assets
from rrepa_lab.readers import MIB, MissingFileError, check_file, read_json, validate
from rrepa_lab.space.contract import Shape
from rrepa_lab.space.networks import GROUPS

FORMAT = 1  # of config.json
TRAINED_HERE = ("small-vae", "features")  # kinds of spaces that such folders hold
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "card.md"
LARGEST_CONFIG = 4 * MIB


class AutoencoderConfig(Config):
    """How an autoencoder is built and trained.

    Example:
        >>> AutoencoderConfig(factor=2, channels=4).latent_shape
        (4, 4, 4)
    """

    kind: Literal["small-vae", "features"] = Field("small-vae", description="small-vae, or features of a frozen encoder by PCA")
    data: DataConfig = DataConfig()
    factor: Literal[2, 4, 8] = Field(4, description="edge of a picture by that of its latents; of features the encoder's grid")
    channels: int = Field(4, ge=1, le=1024, description="numbers of a latent at each place; of features: principal components")
    width: int = Field(32, ge=GROUPS, le=2048, description="channels of the convolutions at the largest map")
    depth: int = Field(1, ge=1, le=16, description="residual blocks at each size")
    loss: Literal["l1", "l2"] = Field("l1", description="distance of a picture from its reconstruction")
    kl_weight: float = Field(1e-3, ge=0, description="weight of the KL divergence of the latents, in nats for each number")
    noise_std: float = Field(
        0.0, ge=0, description="sigma of the noise on latents of unit variance that the decoder learns under"
    )
    encoder: EncoderConfig | None = Field(None, description="the frozen encoder of kind features")
    steps: int = Field(2000, ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-3, gt=0, description="peak; linear warm-up over a twentieth of the steps, then a cosine to 0")
    weight_decay: float = Field(1e-4, ge=0)
    statistics_images: int = Field(10_000, ge=2, description="training pictures, class-balanced, that the statistics come from")
    save_every: int = Field(500, ge=1, description="steps between states that --resume goes on from")
    seed: int = Field(0, ge=0, le=LARGEST_SEED)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % GROUPS:
            raise ValueError(f"width {self.width} is not divisible by {GROUPS}, the groups of a normalization")
        if self.kind == "features" and self.encoder is None:
            raise ValueError(
                "kind features needs an encoder: --encoder DIR, or --set encoder.model=NAME encoder.weights=WEIGHTS"
            )
        if self.kind == "small-vae":
            latents_of(self.picture_shape, self.factor, self.channels)
        return self

    @property
    def fingerprint(self) -> str:
        """The kind with a hash of all settings, "small-vae-1a2b3c4d": a folder for this configuration alone."""
        return f"{self.kind}-{hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:8]}"

    @property
    def picture_shape(self) -> Shape:
        """(C, H, W)."""
        return self.data.channels, self.data.image_size, self.data.image_size

    @property
    def latent_shape(self) -> Shape:
        """(C, H, W) of the latents of a small VAE."""
        return latents_of(self.picture_shape, self.factor, self.channels)


def latents_of(picture: Shape, factor: int, channels: int) -> Shape:
    """(C, H, W) of the latents; LabError where the factor does not divide the picture, or leaves less than 2 x 2."""
    if picture[1] % factor or picture[1] < 2 * factor:
        size = f"{picture[1]}x{picture[2]}"
        raise LabError(
            f"factor {factor} must divide the edge of a picture and leave 2x2 latents at least, and pictures are {size}"
        )
    return channels, picture[1] // factor, picture[2] // factor


def data_settings(name: str, size: int | None = None) -> dict[str, Any]:
    """Settings for a data set by name, or for the pictures of a folder: `AutoencoderConfig.from_dict(data_settings("digits"))`.

    Args:
        size: height and width of a picture; 32 by default, and 8 for digits.
    """
    sizes = {"factor": 2, "channels": 2} if name == "digits" else {}
    return sizes | {"data": named_data(name, size)}


class Stored(NamedTuple):
    """What config.json of an autoencoder's folder says."""

    config: AutoencoderConfig
    statistics: dict[str, Any]  # of the latents over training pictures
    quality: dict[str, Any]  # of the reconstructions
    latents: Shape


def write_autoencoder(out: Path, stored: Stored, tensors: Mapping[str, Tensor], card: str) -> None:
    """Write model.safetensors, card.md and config.json, the last one at the end."""
    weights = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in tensors.items()}
    write_atomically(out / WEIGHTS, lambda temporary: save_file(weights, temporary))
    write_text(out / CARD, card)
    about = {
        "format": FORMAT, "kind": stored.config.kind, "latents": list(stored.latents), "config": stored.config.to_dict(),
        "statistics": stored.statistics, "quality": stored.quality,
    }  # fmt: skip
    write_text(out / CONFIG, json.dumps(about, indent=2) + "\n")


def copy_autoencoder(source: Path, target: Path) -> None:
    """Copy the files of an autoencoder, config.json last."""
    for name in (WEIGHTS, CARD, CONFIG):
        if (source / name).is_file():
            write_atomically(target / name, partial(shutil.copyfile, source / name))


def is_autoencoder(folder: Path) -> bool:
    """Whether a folder holds an autoencoder that was trained to its end."""
    return (folder / CONFIG).is_file()


def read_autoencoder(folder: Path, kind: str) -> Stored:
    """The configuration of a folder; LabError where it is missing, damaged, or of another kind."""
    path = folder / CONFIG
    try:
        about = read_json(path, LARGEST_CONFIG)
    except MissingFileError:
        raise LabError(f"{folder} holds no {kind}: train one with `rrepa-lab vae train DATA --out DIR --kind {kind}`") from None
    if not {"format", "kind", "latents", "config", "statistics", "quality"} <= about.keys():
        raise LabError(f"{path} is not the configuration of an autoencoder of this kit{_diffusers_hint(about)}")
    if about["format"] != FORMAT:
        raise LabError(f"{path} has format {str(about['format'])[:40]}; this version reads format {FORMAT}")
    if about["kind"] != kind:
        raise LabError(f"{folder} holds a space of kind {str(about['kind'])[:40]}, not {kind}: set space.kind={about['kind']}")
    config = validate(AutoencoderConfig, about["config"], str(path), stored=True)
    latents, statistics = about["latents"], about["statistics"]
    if not isinstance(latents, list) or len(latents) != 3 or not all(isinstance(n, int) and n > 0 for n in latents):
        raise LabError(f"{path}: latents must be three sizes, not {latents}")
    if not isinstance(statistics, dict) or not isinstance(about["quality"], dict):
        raise LabError(f"{path}: statistics and quality must be objects")
    return Stored(config, statistics, about["quality"], (latents[0], latents[1], latents[2]))


def _diffusers_hint(about: Mapping[str, Any]) -> str:
    return "; it is one of diffusers: set space.kind=vae" if "_class_name" in about else ""


def read_tensors(folder: Path, expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors of a folder and 16 hex digits of the file; LabError unless they are those expected, and finite."""
    path = folder / WEIGHTS
    try:
        check_file(path)
        tensors = load_file(path)
    except MissingFileError:
        raise LabError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise LabError(f"{path} is damaged or no safetensors file: {error}") from None
    for name, value in expected.items():
        if name not in tensors:
            raise LabError(f"{path} has no {name}: it belongs to another configuration")
        if tensors[name].shape != value.shape:
            raise LabError(f"{path}: {name} is {tuple(tensors[name].shape)} on file, but {CONFIG} builds {tuple(value.shape)}")
        if not bool(tensors[name].isfinite().all()):
            raise LabError(f"{path}: {name} holds NaN or infinite numbers: train it again")
    return {name: tensors[name] for name in expected}, file_digest(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def file_digest(path: Path, time: int) -> str:
    """16 hex digits of a file's bytes; `time` is that of its last change."""
    return sha256(path)[:16]


def numbers(statistics: Mapping[str, Any], name: str, count: int, folder: Path) -> Tensor:
    """A statistic as (count,); LabError where it is not as many finite numbers."""
    values = statistics.get(name)
    right = isinstance(values, list) and len(values) == count and all(isinstance(value, (int, float)) for value in values)
    found = torch.tensor(values if right else [torch.nan])
    if not right or not bool(found.isfinite().all()):
        raise LabError(f"{folder / CONFIG}: statistics.{name} must be {count} finite numbers")
    return found


def folder_of(config: Any) -> Path:
    """The folder that `space.weights` names, by its path or bundled:<name>; LabError where it is not set, or there is none of
    this name.
    """
    if config.weights is None:
        raise LabError(
            f"space.kind is {config.kind}, and space.weights is not set: give the folder of "
            f"`rrepa-lab vae train DATA --out DIR --kind {config.kind}`"
        )
    if not is_bundled(config):
        return Path(config.weights).expanduser()
    root, name = assets() / "autoencoders", config.weights.removeprefix(BUNDLED)
    if not is_autoencoder(root / name):
        raise unknown("bundled autoencoder", name, sorted(path.name for path in root.glob("*") if is_autoencoder(path)))
    return root / name


def is_bundled(config: Any) -> bool:
    """Whether `space.weights` is bundled:<name>, which every machine with this package has."""
    return config.weights is not None and config.weights.startswith(BUNDLED)
