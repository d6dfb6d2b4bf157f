"""The latents of a VAE of diffusers (`AutoencoderKL`; extra [vae]): stabilityai/sd-vae-ft-ema and the like.

x = (z - shift) * scaling factor, by the VAE's own configuration, z being the mean of the posterior or a sample of it. With
sd-vae-ft-ema (factor 8, 4 channels, 0.18215) x has a standard deviation of about 1, and flows of it are trained under noise of
0.2 (TARFlow, arXiv 2412.06329). `AutoencoderRAE` (arXiv 2510.11690), whose latents are features of an encoder, is read as well.
"""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rrepa_lab.align.hub import hub
from rrepa_lab.data.fingerprint import fingerprint_of_tensors
from rrepa_lab.errors import LabError
from rrepa_lab.readers import MIB, read_json
from rrepa_lab.space.config import SPACES, SpaceConfig, check_channels
from rrepa_lab.space.contract import Frame, Shape
from rrepa_lab.space.latents import LatentSpace

KIND = "vae"
CLASSES = ("AutoencoderKL", "AutoencoderRAE")
LARGEST_CONFIG = 4 * MIB


class DiffusersVae:
    """An AutoencoderKL as a codec: pictures in [-1, 1], latents scaled by the configuration of the VAE."""

    def __init__(self, vae: Any, picture: Shape) -> None:
        self.vae, given = vae, dict(vae.config)
        self.shape = _latents(given, picture, "the VAE")
        count = self.shape[0]
        self.scaling, self.shift = float(given.get("scaling_factor") or 1.0), float(given.get("shift_factor") or 0.0)
        self.mean = torch.tensor(given.get("latents_mean") or [0.0] * count).view(1, -1, 1, 1)
        self.std = torch.tensor(given.get("latents_std") or [1.0] * count).view(1, -1, 1, 1)
        self.statistics: dict[str, Any] = {"scaling_factor": self.scaling, "shift_factor": self.shift} | _weights(vae)
        for name in ("latents_mean", "latents_std"):
            if given.get(name):
                self.statistics[name] = list(given[name])
        self.quality: dict[str, Any] = {}

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures -> x, the mean of the posterior; with standard normal noise a sample of it."""
        posterior = self.vae.encode(pictures).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return (z - self.shift - self.mean) / self.std * self.scaling

    def decode(self, x: Tensor) -> Tensor:
        """x -> pictures, not clipped."""
        made: Tensor = self.vae.decode(x / self.scaling * self.std + self.mean + self.shift).sample
        return made

    def to(self, device: torch.device | str) -> None:
        """Move the weights and the scales."""
        self.vae.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)


class DiffusersRae:
    """An AutoencoderRAE as a codec: it normalizes its latents itself, and takes and gives pictures in [0, 1]."""

    def __init__(self, vae: Any, picture: Shape) -> None:
        self.vae = vae
        with torch.no_grad():
            example = self.encode(torch.zeros(1, *picture))
        if example.ndim != 4:
            raise LabError("this AutoencoderRAE gives a list of tokens: set reshape_to_2d in its config.json")
        self.shape: Shape = (example.shape[1], example.shape[2], example.shape[3])
        self.statistics: dict[str, Any] = {"scaling_factor": float(vae.config.scaling_factor)} | _weights(vae)
        self.quality: dict[str, Any] = {}
        made = tuple(self.decode(example).shape[1:])
        if made != picture:
            raise LabError(f"the AutoencoderRAE decodes to pictures of {made}, and the data are of {picture}")

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures -> x; nothing is drawn."""
        x: Tensor = self.vae.encode((pictures + 1) / 2).latent
        return x

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """x -> pictures, not clipped."""
        made: Tensor = self.vae.decode(x).sample
        return made * 2 - 1

    def to(self, device: torch.device | str) -> None:
        """Move the weights."""
        self.vae.to(device)


def _weights(vae: nn.Module) -> dict[str, str]:
    """16 hex digits of the tensors, as a statistic."""
    state = vae.state_dict()
    return {"weights": fingerprint_of_tensors(state.values(), list(state))}


def _latents(about: Mapping[str, Any], picture: Shape, name: str) -> Shape:
    """(C, H, W) of the latents of an AutoencoderKL with this configuration; LabError for pictures whose size does not suit."""
    widths, channels = about.get("block_out_channels"), about.get("latent_channels")
    if not isinstance(widths, (list, tuple)) or not widths or not isinstance(channels, int):
        raise LabError(f"{name}: its config.json has no block_out_channels and latent_channels of an AutoencoderKL")
    factor = 2 ** (len(widths) - 1)
    if picture[1] % factor or picture[1] < 2 * factor:
        raise LabError(
            f"{name} makes one latent of {factor}x{factor} pixels, and pictures are {picture[1]}x{picture[2]}: set "
            f"data.image_size to a multiple of {factor}, {2 * factor} at least"
        )
    return channels, picture[1] // factor, picture[2] // factor


def _folder(config: SpaceConfig) -> Path | None:
    """The folder that holds the VAE: the one named, its subfolder vae/, or the Hub's cache; None where there is none yet."""
    if config.weights is None:
        raise LabError(
            "space.kind is vae, and space.weights is not set: give a Hub id such as stabilityai/sd-vae-ft-ema, or a folder of "
            "an AutoencoderKL"
        )
    path = Path(config.weights).expanduser()
    for folder in (path, path / "vae"):
        if (folder / "config.json").is_file():
            return folder
    if path.exists() or config.weights.count("/") != 1 or config.weights.startswith((".", "/", "~")):
        what = "holds no config.json of an AutoencoderKL" if path.exists() else "is no folder, and no Hub id (OWNER/NAME)"
        raise LabError(f"space.weights {config.weights} {what}")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.weights, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _read(folder: Path) -> dict[str, Any]:
    about = read_json(folder / "config.json", LARGEST_CONFIG)
    kind = about.get("_class_name")
    if kind not in CLASSES:
        what = f"a {kind}" if kind else "no autoencoder of diffusers"
        hint = f"; it is one of this kit: set space.kind={about['kind']}" if "kind" in about and "latents" in about else ""
        raise LabError(f"{folder / 'config.json'} is {what}, and the space vae reads {' and '.join(CLASSES)}{hint}")
    return about


def load_vae(config: SpaceConfig, picture: Shape) -> DiffusersVae | DiffusersRae:
    """The VAE of a folder or of the Hub, frozen, in float32.

    Raises: LabError where diffusers is missing, the Hub cannot be reached, or the files are damaged.
    """
    try:
        import diffusers
    except ImportError as error:
        if error.name not in ("diffusers", None):
            raise LabError(f"diffusers cannot be imported ({error}): pip install -U 'rrepa-lab[vae]'") from error
        raise LabError("the space vae needs diffusers: pip install 'rrepa-lab[vae]' (or pip install diffusers)") from None
    with hub() as online:
        folder = _folder(config)
        if folder is None or (not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin"))):
            folder = _fetch(str(config.weights), online)
        kind = _read(folder)["_class_name"]
        if kind == "AutoencoderRAE" and importlib.util.find_spec("transformers") is None:
            raise LabError(f"{folder} is an AutoencoderRAE, whose encoder needs transformers: pip install transformers")
        try:
            with _quiet():
                vae = getattr(diffusers, kind).from_pretrained(folder, low_cpu_mem_usage=False, torch_dtype=torch.float32)
        except (ImportError, OSError, ValueError, RuntimeError, KeyError) as error:
            raise LabError(f"{folder} cannot be read as an {kind}: {str(error).strip().splitlines()[0]}") from error
    vae.eval().requires_grad_(False)
    return DiffusersVae(vae, picture) if kind == "AutoencoderKL" else DiffusersRae(vae, picture)


def _fetch(repo_id: str, online: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=["config.json", "*.safetensors"], local_files_only=not online))
    except Exception as error:  # of the Hub's library and of the HTTP library below it
        why = f"the Hub did not give it ({type(error).__name__})" if online else "the Hub cannot be reached from here"
        raise LabError(
            f"space.weights {repo_id} is not on this machine, and {why}: `hf download {repo_id} --local-dir DIR` where there "
            "is a network, then set space.weights=DIR"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it diffusers logs errors alone."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Kind:
    def shape(self, config: SpaceConfig, picture: Shape) -> Shape | None:
        folder = _folder(config) if config.weights is not None and Path(config.weights).expanduser().exists() else None
        if folder is None and config.weights is not None and config.weights.count("/") == 1:
            folder = _folder(config)
        if folder is None:
            return None
        about = _read(folder)
        if about["_class_name"] != "AutoencoderKL":
            return None
        check_channels(config, int(about.get("in_channels", 3)), picture)
        return _latents(about, picture, f"the VAE {config.weights}")

    def make(self, config: SpaceConfig, frame: Frame) -> LatentSpace:
        if config.weights is None:
            _folder(config)
        unit = f"scaled latents of {Path(str(config.weights)).name}"
        return LatentSpace(config, frame, lambda: load_vae(config, frame.picture), unit)


SPACES.register(KIND)(_Kind())
