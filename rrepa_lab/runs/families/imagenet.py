"""ImageNet in pixels: the paper's setting at 64x64, and the TARFlow paper's at 128x128; set data.path.

8 blocks of 8 layers, width 1024, blocks 7 and 8 aligned at layer 6 with DINOv2-B, lambda 0.1, batch 256, lr 1e-4, EMA 0.9999,
400K iterations (the paper's ablations; its last tables have 1M: train.steps=1000000).
"""

from rrepa_lab.data.config import DataConfig
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.families.family import PAPER_FID, Family, paper_results, run_config

SIZES = {"width": 1024, "blocks": 8, "layers": 8, "classes": 1000}
STEPS = {"steps": 400_000}
LONG = {**STEPS, "checkpointing": True}  # of 1024 tokens
EXACT = f"as here; {PAPER_FID}"


def data(size: int) -> DataConfig:
    """ImageNet's pictures at this size, mirrored at random; the teacher sees them at 256, as the paper's authors have it."""
    return DataConfig(name="imagenet", image_size=size, channels=3, flip=True, teacher_size=256)


def pixels64(strategy: str) -> RunConfig:
    """The paper's setting: ImageNet at 64x64 in 256 tokens of 4x4 pixels, noise 0.05."""
    return run_config("imagenet64", data(64), {**SIZES, "patch_size": 4}, strategy=strategy, train=STEPS)


def pixels128(strategy: str) -> RunConfig:
    """The TARFlow paper's setting for 128x128: 1024 tokens of 4x4 pixels, noise 0.15. The alignment is that of 64x64.

    The teacher sees 448 pixels, which give it a patch for each token. Layers are recomputed in the backward pass, so that eight
    GPUs of 80 GB hold the batch.
    """
    flow = {**SIZES, "patch_size": 4, "noise_std": 0.15}
    config = run_config("imagenet128", data(128), flow, strategy=strategy, train=LONG)
    return config.override({"encoder.image_size": 448})


FAMILIES = {
    "imagenet64": Family(
        pixels64,
        "ImageNet at 64x64 in pixels, the paper's setting, 8 GPUs",
        paper_results(
            {
                "none": (EXACT, {"fid": 12.91, "sfid": 33.79, "inception_score": 36.62, "accuracy": 0.3743}),
                "detach": (
                    f"blocks 7 and 8 at layer 2; {PAPER_FID}",
                    {"fid": 12.12, "sfid": 34.00, "inception_score": 41.18, "accuracy": 0.5514},
                ),
                "reverse": (EXACT, {"fid": 11.71, "sfid": 33.68, "inception_score": 44.31, "accuracy": 0.5735}),
            }
        ),
    ),
    "imagenet128": Family(pixels128, "ImageNet at 128x128 in pixels, the TARFlow paper's setting, 8 GPUs"),
}
