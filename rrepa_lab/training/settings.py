"""How a flow is trained; the defaults are those of TARFlow and R-REPA where these say something."""

import os
from typing import Literal

from pydantic import Field

from rrepa_lab.config import Config

MAX_WORKERS = 8


class TrainConfig(Config):
    """Optimizer, schedule, precision, and how often to report, validate and save."""

    steps: int = Field(1500, ge=1, description="optimizer steps")
    batch: int = Field(128, ge=1, description="images per step, over all processes")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    lr_floor: float = Field(0.01, ge=0, le=1, description="the cosine ends at this part of the peak")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(1e-4, ge=0)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.99, ge=0, lt=1, description="decay of the weight average, at most; suits about 1 / (1 - ema) steps")
    label_drop: float = Field(0.1, ge=0, le=1, description="part of the labels replaced by none")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the matrix products; auto measures which is faster on the device; likelihoods stay float32"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    workers: int | Literal["auto"] = Field(
        "auto", description="processes that read image files ahead; auto: one for each core but one, at most 8"
    )
    feature_cache: int = Field(
        256,
        ge=0,
        description="MiB for the encoder's features of all training images, kept if they fit and without augmentation",
    )
    checkpointing: bool = Field(
        False, description="recompute each layer's activations in the backward pass: much less memory, a third more time"
    )
    compile: bool = Field(
        False, description="torch.compile each Transformer layer; needs a C++ compiler on a CPU; measure before you use it"
    )
    keep: Literal["last", "nats_per_dim", "accuracy"] = Field(
        "last", description="also keep the weights that are best on the validation split by this metric"
    )
    patience: int = Field(0, ge=0, description="end after so many validations without a better value of `keep`; 0: never")
    report_every: int = Field(10, ge=1, description="steps between reports")
    look_every: int = Field(100, ge=1, description="steps between validations")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")

    @property
    def worker_count(self) -> int:
        """Processes that read image files ahead on this machine."""
        if self.workers != "auto":
            return self.workers
        return min(MAX_WORKERS, max(0, (os.cpu_count() or 1) - 1))
