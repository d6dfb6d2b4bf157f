"""Tiny-ImageNet, or another folder of ImageNet's classes at 64x64, in pixels and in latents of a small VAE.

Set data.path (and space.weights). The paper has no Tiny-ImageNet: sizes are ours.
"""

from rrepa_lab.data.config import DataConfig
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.families.family import OFFLINE, TINY_ALIGN, TINY_FLOW, TINY_TRAIN, Family, run_config
from rrepa_lab.space.config import SpaceConfig

DATA = DataConfig(name="folder", image_size=64, channels=3, flip=True, holdout=0.1)
# `rrepa-lab vae train FOLDER --out DIR` at factor 4: 4 x 16 x 16
SMALL_VAE = SpaceConfig(kind="small-vae")
LATENTS = {"image_size": 16, "channels": 4, "noise_std": 0.2, "positions": "rotary", "mlp": "swiglu"}
MIDDLE = {"width": 512, "blocks": 8, "layers": 6, "classes": -1}
TRAIN = {"steps": 200_000, "lr": 2e-4}


def pixels(strategy: str) -> RunConfig:
    """256 tokens of 4x4 pixels, as the paper's flow of ImageNet at this size."""
    return run_config("tinyimagenet", DATA, {**MIDDLE, "patch_size": 4}, strategy=strategy, train=TRAIN)


def tiny(strategy: str) -> RunConfig:
    """64 tokens of 8x8 pixels. Demo size: blurred shapes."""
    flow = {**TINY_FLOW, "patch_size": 8, "classes": -1, "noise_std": 0.1}
    return run_config("tinyimagenet-tiny", DATA, flow, strategy=strategy, encoder=OFFLINE, train=TINY_TRAIN).override(
        TINY_ALIGN
    )


def latent(strategy: str) -> RunConfig:
    """256 tokens, one for each latent of 4 numbers."""
    flow = {**MIDDLE, **LATENTS, "patch_size": 1}
    return run_config("tinyimagenet-latent", DATA, flow, strategy=strategy, space=SMALL_VAE, train=TRAIN)


def latent_tiny(strategy: str) -> RunConfig:
    """64 tokens of 2x2 latents. Demo size."""
    flow = {**TINY_FLOW, **LATENTS, "patch_size": 2, "classes": -1}
    config = run_config(
        "tinyimagenet-latent-tiny", DATA, flow, strategy=strategy, space=SMALL_VAE, encoder=OFFLINE, train=TINY_TRAIN
    )
    return config.override(TINY_ALIGN)


FAMILIES = {
    "tinyimagenet": Family(pixels, "Tiny-ImageNet in pixels, for one GPU"),
    "tinyimagenet-tiny": Family(tiny, "Tiny-ImageNet in pixels, demo size, minutes on two cores"),
    "tinyimagenet-latent": Family(latent, "Tiny-ImageNet in latents of a small VAE, for one GPU"),
    "tinyimagenet-latent-tiny": Family(latent_tiny, "Tiny-ImageNet in latents of a small VAE, demo size, minutes on two cores"),
}
