"""Which space a run's flow models: the settings, and the kinds of spaces that they name."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, field_validator

from rrepa_lab.config import Config
from rrepa_lab.errors import LabError
from rrepa_lab.registry import Registry
from rrepa_lab.space.contract import Frame, Shape, Space


class SpaceConfig(Config):
    """What a flow models: pixels, or latents of pictures.

    Example:
        >>> SpaceConfig().kind, SpaceConfig(kind="vae", weights="stabilityai/sd-vae-ft-ema").is_pixels
        ('pixels', False)
    """

    kind: str = Field("pixels", description="a registered space: pixels, vae, small-vae, features")
    weights: str | None = Field(
        None,
        description="folder of `rrepa-lab vae train`, or bundled:cifar10 (small-vae, features); folder or Hub id of an "
        "AutoencoderKL (vae)",
    )
    sample: bool = Field(False, description="train on samples of the posterior, not its mean; no latents are cached then")
    cache: Literal["auto", "on", "off"] = Field(
        "auto", description="latents of the training split on disk; auto: where a training reads them more than once"
    )
    stored: dict[str, Any] = Field(
        {}, description="statistics of the space when the run was trained, filled in by training; another space is refused"
    )

    @field_validator("kind")
    @classmethod
    def _registered(cls, kind: str) -> str:
        return SPACES.check(kind)

    @property
    def is_pixels(self) -> bool:
        """Whether the flow models the pictures themselves."""
        return self.kind == "pixels"

    @property
    def fingerprint(self) -> str:
        """8 hex digits of the stored statistics, "" where none are stored."""
        return hashlib.sha256(json.dumps(self.stored, sort_keys=True).encode()).hexdigest()[:8] if self.stored else ""

    def absolute(self) -> "SpaceConfig":
        """The same with an absolute path, where the weights are a folder."""
        if self.weights is None or not Path(self.weights).expanduser().is_dir():
            return self
        return self.model_copy(update={"weights": str(Path(self.weights).expanduser().absolute())})


class SpaceKind(Protocol):
    """A named kind of space; `SPACES.register(name)` adds one."""

    def shape(self, config: SpaceConfig, picture: Shape) -> Shape | None:
        """(C, H, W) of x for pictures of this shape; None where it is not known before the weights are at hand.

        It is called whenever a configuration is made: it reads small files at most.
        Raises: LabError for pictures that the space cannot take.
        """
        ...

    def make(self, config: SpaceConfig, frame: Frame) -> Space:
        """The space. Heavy weights are loaded at the first use, not here.

        Raises: LabError for weights that are not named.
        """
        ...


SPACES: Registry[SpaceKind] = Registry("space", "rrepa_lab.space.kinds", ("pixels",))


def check_frame(config: SpaceConfig, frame: Frame) -> None:
    """LabError where the flow's input is not what the space makes of the pictures, or its noise is not one for latents."""
    if frame.noise == "uniform" and not config.is_pixels:
        raise LabError(
            f"flow.noise is 'uniform', which suits integers, but the space is {config.kind}: set flow.noise=gaussian "
            "(the paper takes flow.noise_std=0.2 for latents)"
        )
    shape = SPACES[config.kind].shape(config, frame.picture)
    if shape is not None:
        check_shape(config.kind, shape, frame)


def check_shape(kind: str, shape: Shape, frame: Frame) -> None:
    """LabError where x has another shape than the flow takes."""
    if shape == frame.x:
        return
    parts = [("channels", shape[0], frame.x[0], frame.picture[0]), ("image_size", shape[1], frame.x[1], frame.picture[1])]
    key, own, flow, picture = next(part for part in parts if part[1] != part[2])
    if kind == "pixels":
        raise LabError(f"flow.{key} is {flow} but data.{key} is {picture}")
    pictures, made = ("x".join(map(str, sizes)) for sizes in (frame.picture, shape))
    raise LabError(f"flow.{key} is {flow} but the space {kind} makes {made} of pictures of {pictures}: set flow.{key}={own}")


def check_channels(config: SpaceConfig, channels: int, picture: Shape) -> None:
    """LabError where the weights take pictures of another number of channels."""
    if picture[0] != channels:
        raise LabError(
            f"the space {config.kind} {config.weights} takes pictures of {channels} channels, and data.channels is {picture[0]}"
        )


def check_statistics(config: SpaceConfig, statistics: dict[str, Any]) -> None:
    """LabError where a space is not the one that a run was trained with: names what differs, and both values."""
    for name, then in config.stored.items():
        now = statistics.get(name)
        if now != then:
            where = f" {config.weights}" if config.weights else ""
            raise LabError(
                f"the space {config.kind}{where} is not the one this run was trained with: {name} is {_short(now)} there, and "
                f"{_short(then)} in the run; point space.weights to the one of the training"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
