"""scikit-learn's 8x8 digits: the bundled runs."""

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.data.config import DataConfig
from rrepa_lab.flow.tarflow.config import FlowConfig
from rrepa_lab.runs.config import RunConfig, TrainConfig
from rrepa_lab.runs.families.family import Family

DIGITS_VIT = EncoderConfig(
    model="vit_tiny_patch16_224",
    weights="random",
    image_size=8,
    channels=1,
    args={"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4, "class_token": False, "global_pool": "avg"},
)


def digits(strategy: str) -> RunConfig:
    """scikit-learn's 8x8 digits, a few minutes on two CPU cores.

    The augmentation and the stopping rule were chosen on the validation split (`studies.digits shifts`).
    """
    return RunConfig(
        name=f"digits-{strategy}",
        data=DataConfig(name="digits", image_size=8, channels=1, holdout=0.2, shift=1, shift_probability=0.25),
        flow=FlowConfig(image_size=8, channels=1, patch_size=2, width=64, blocks=4, layers=4, classes=10, noise_std=0.2),
        align=AlignConfig(strategy=strategy, blocks=[3, 4], layers=[2], weight=0.5, projector_width=256),
        encoder=DIGITS_VIT.override({"weights": "bundled:digits"}),
        train=TrainConfig(steps=1500, batch=64, lr=6e-3, warmup=50, ema_decay=0.99, keep="nats_per_dim", patience=3),
    )


FAMILIES = {"digits": Family(digits, "8x8 digits, bundled, minutes on two cores")}
