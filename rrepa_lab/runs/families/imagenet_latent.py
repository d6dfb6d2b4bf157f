"""ImageNet at 256x256 in latents of Stable Diffusion's VAE: the paper's settings; set data.path.

4 x 32 x 32 latents, noise 0.20 (the paper's best of 0.10 to 0.30), rotary positions, SwiGLU. The VAE is fetched from the Hub
when a training starts, or space.weights is its folder.
"""

from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.families.family import Family, Result, paper_results, run_config
from rrepa_lab.runs.families.imagenet import EXACT, LONG, SIZES, STEPS, data
from rrepa_lab.space.config import SpaceConfig

SD_VAE = SpaceConfig(kind="vae", weights="stabilityai/sd-vae-ft-ema")
LATENTS = {"image_size": 32, "channels": 4, "noise_std": 0.2, "positions": "rotary", "mlp": "swiglu"}


def latent256(strategy: str) -> RunConfig:
    """The paper's setting: latents of 256x256 pictures (4 x 32 x 32) in 256 tokens of 2x2, noise 0.20, RoPE, SwiGLU."""
    flow = {**SIZES, **LATENTS, "patch_size": 2}
    return run_config("imagenet256-latent", data(256), flow, strategy=strategy, space=SD_VAE, train=STEPS)


def latent256_p1(strategy: str) -> RunConfig:
    """As `latent256` with patch 1, the paper's best: 1024 tokens. The teacher sees 448 pixels: a patch for each token.

    Layers are recomputed in the backward pass, as in `imagenet128`.
    """
    flow = {**SIZES, **LATENTS, "patch_size": 1}
    config = run_config("imagenet256-latent-p1", data(256), flow, strategy=strategy, space=SD_VAE, train=LONG)
    return config.override({"encoder.image_size": 448})


FAMILIES = {
    "imagenet256-latent": Family(
        latent256,
        "ImageNet at 256x256 in latents of Stable Diffusion's VAE, the paper's setting, 8 GPUs",
        paper_results(
            {
                "none": (EXACT, {"fid": 13.82, "accuracy": 0.4597}),
                "reverse": (EXACT, {"fid": 13.26, "accuracy": 0.5785}),
            }
        ),
    ),
    "imagenet256-latent-p1": Family(
        latent256_p1,
        "as imagenet256-latent with patch 1, the paper's best, 8 GPUs",
        {
            "reverse": tuple(
                Result(metric, value, "as here with 1M iterations; 50,000 samples", "arXiv 2511.22345")
                for metric, value in (("fid", 4.18), ("sfid", 4.96), ("inception_score", 240.8))
            )
        },
    ),
}
