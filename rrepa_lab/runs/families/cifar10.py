"""CIFAR-10 in pixels, and in latents of a small VAE that the kit trains; set data.path (and data.download), space.weights.

The paper has no CIFAR-10: sizes are ours. In latents the flow has the paper's form for latents: noise 0.20, rotary positions,
SwiGLU. The bundled runs have the settings of `cifar10` and `cifar10-latent`.
"""

from typing import Any

from rrepa_lab.data.config import DataConfig
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.families.family import OFFLINE, TINY_ALIGN, TINY_FLOW, TINY_TRAIN, Family, run_config
from rrepa_lab.space.config import SpaceConfig

DATA = DataConfig(name="cifar10", image_size=32, channels=3, flip=True, holdout=0.1)
# `rrepa-lab vae train cifar10 --out DIR` at factor 4: 4 x 8 x 8; its folder is space.weights
SMALL_VAE = SpaceConfig(kind="small-vae")
LATENTS = {"image_size": 8, "channels": 4, "patch_size": 1, "noise_std": 0.2, "positions": "rotary", "mlp": "swiglu"}
# clean photographs are far from what a flow of noised ones has learned: one step reads 0.264 of 512 validation images right on
# clean ones, 0.352 under one sample of the training noise, 0.363 under four (`rrepa-lab read-noise`; 2,000 steps, 4 layers)
READ_NOISE = {"read.n_noise_samples": 1}
LARGE = {"width": 512, "blocks": 8, "layers": 6, "classes": 10}
# the setting of the studies on photographs (assets/studies/cifar10-main.yaml), trained for longer
STUDIED: dict[str, Any] = {
    "data.flip": False, "flow.layers": 4, "train.batch": 64, "train.steps": 5000, "train.warmup": 100, "train.keep": "last",
    "train.log_every": 50, "train.eval_every": 500, "train.save_every": 500,
    "encoder.model": "efficientnet-lite2", "encoder.image_size": 128, "encoder.layer": 4,
}  # fmt: skip


def pixels(strategy: str) -> RunConfig:
    """64 tokens of 4x4 pixels. Demo size."""
    return tiny(strategy).override(STUDIED | {"name": f"cifar10-{strategy}"})


def large(strategy: str) -> RunConfig:
    """256 tokens of 2x2 pixels."""
    flow = {**LARGE, "patch_size": 2}
    return run_config("cifar10-large", DATA, flow, strategy=strategy, train={"steps": 200_000, "lr": 2e-4})


def tiny(strategy: str) -> RunConfig:
    """64 tokens of 4x4 pixels. Demo size: blurred shapes."""
    flow = {**TINY_FLOW, "patch_size": 4, "classes": 10, "noise_std": 0.1}
    config = run_config("cifar10-tiny", DATA, flow, strategy=strategy, encoder=OFFLINE, train=TINY_TRAIN)
    return config.override(TINY_ALIGN | READ_NOISE)


def latent(strategy: str) -> RunConfig:
    """64 tokens, one for each latent of 4 numbers. Demo size."""
    settings = STUDIED | READ_NOISE | {"name": f"cifar10-latent-{strategy}", "space.weights": "bundled:cifar10"}
    return latent_tiny(strategy).override(settings)


def latent_large(strategy: str) -> RunConfig:
    """As `latent`, larger."""
    flow = {**LARGE, **LATENTS}
    train = {"steps": 200_000, "lr": 2e-4}
    return run_config("cifar10-latent-large", DATA, flow, strategy=strategy, space=SMALL_VAE, train=train)


def latent_tiny(strategy: str) -> RunConfig:
    """As `latent`, smaller, and of any small VAE."""
    flow = {**TINY_FLOW, **LATENTS, "classes": 10}
    config = run_config(
        "cifar10-latent-tiny", DATA, flow, strategy=strategy, space=SMALL_VAE, encoder=OFFLINE, train=TINY_TRAIN
    )
    return config.override(TINY_ALIGN)


FAMILIES = {
    "cifar10": Family(pixels, "CIFAR-10 in pixels, demo size, an hour on two cores: the bundled runs"),
    "cifar10-tiny": Family(tiny, "CIFAR-10 in pixels, demo size, minutes on two cores"),
    "cifar10-large": Family(large, "CIFAR-10 in pixels, for one GPU"),
    "cifar10-latent": Family(latent, "CIFAR-10 in latents of the bundled VAE, demo size, an hour on two cores"),
    "cifar10-latent-tiny": Family(latent_tiny, "CIFAR-10 in latents of a small VAE, demo size, minutes on two cores"),
    "cifar10-latent-large": Family(latent_large, "CIFAR-10 in latents of a small VAE, for one GPU"),
}
