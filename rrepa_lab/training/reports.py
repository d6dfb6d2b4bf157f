"""What a training reports, and the function that it validates with."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rrepa_lab.data.images import ImageSet
from rrepa_lab.errors import LabError
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.run import Run


@dataclass(frozen=True)
class StepReport:
    """What happened since the last report; losses are means over those steps.

    Example:
        >>> import rrepa_lab as rl
        >>> import tempfile
        >>> settings = {"train.steps": 2, "train.batch": 8, "train.log_every": 1}
        >>> with tempfile.TemporaryDirectory() as out:
        ...     reports = list(rl.train("digits-none", out, settings=settings))
        >>> [report.step for report in reports]
        [1, 2]
    """

    step: int  # steps done, from 1
    steps: int  # steps planned
    loss: float  # L_nf + lambda * L_align
    nats_per_dim: float  # of training images under the training noise
    similarity: dict[str, float]  # aligned tap -> mean cosine with the target
    learning_rate: float
    grad_norm: float  # before clipping
    seconds: float  # since this call of train began
    remaining: float  # seconds, at the pace so far
    precision: str = "float32"  # of the matrix products
    hardware: str = ""  # that trains, in words
    floors: dict[str, float] = field(default_factory=dict)  # of the similarity, without reading the image: see align.floors
    alignment_weight: float = 0.0  # lambda at this step, by `align.schedule`; 0 without alignment
    data_wait: float | None = None  # part of the steps' time that this process waited for images, since the last report
    # of the averaged weights, at a validation; the same number of images of the validation and of the training split
    held_out_nats_per_dim: float | None = None
    held_out_accuracy: float | None = None  # of one gradient step, under the noise of `config.read`
    train_nats_per_dim: float | None = None
    train_accuracy: float | None = None


Validator = Callable[[Run], dict[str, float]]  # a run -> measurements by their names in metrics.jsonl
# (configuration, training split, device) -> validator
ValidatorFactory = Callable[[RunConfig, ImageSet, torch.device], Validator]


class NonFiniteLoss(LabError):
    """The loss is not a number: the weights of this moment are not worth keeping."""
