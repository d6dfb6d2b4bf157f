"""Everything that defines a run: data, space, flow, alignment, teacher, training, and the noise of its readings."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.schedule import Schedule
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.config import Config, OneOrSeveral
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.splits import class_names
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.flow.tarflow.config import FlowConfig
from rrepa_lab.space.config import SpaceConfig, check_frame
from rrepa_lab.space.contract import Frame

MAX_WORKERS = 8
RANDOM = "random:0"  # weights of the teacher with align.teacher=random


class TrainConfig(Config):
    """Optimizer, schedule, precision, and how often to log, validate and save."""

    renamed: ClassVar[Mapping[str, str]] = {
        "lr_floor": "min_lr_ratio", "clip": "grad_clip_norm", "ema": "ema_decay", "workers": "num_workers",
        "report_every": "log_every", "look_every": "eval_every",
    }  # fmt: skip

    steps: int = Field(1500, ge=1, description="optimizer steps")
    batch: int = Field(128, ge=1, description="images per step, over all processes")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    min_lr_ratio: float = Field(0.01, ge=0, le=1, description="the cosine ends at this part of the peak")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(1e-4, ge=0)
    grad_clip_norm: float = Field(1.0, gt=0, description="largest gradient norm")
    ema_decay: float = Field(
        0.99, ge=0, lt=1, description="decay of the weight average, at most; suits about 1 / (1 - ema_decay) steps"
    )
    label_drop: float = Field(0.1, ge=0, le=1, description="part of the labels replaced by none")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the matrix products; auto measures which is faster on the device; likelihoods stay float32"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    accumulate: int = Field(1, ge=1, description="parts that a process takes its images of a step in, one after the other")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="of several processes: ddp copies the weights in each, fsdp shards them and the optimizer over all"
    )
    num_workers: int | Literal["auto"] = Field(
        "auto", description="processes that read image files ahead; auto: one for each core but one, at most 8"
    )
    feature_cache: Literal["auto", "memory", "disk", "off"] = Field(
        "auto",
        description="the teacher's features of all training images, mirrored ones too: in memory, on disk (float16), or "
        "computed in every step; auto: where images come again, in memory up to 256 MiB, else on disk",
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
    log_every: int = Field(10, ge=1, description="steps between reports")
    eval_every: int = Field(100, ge=1, description="steps between validations")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")

    @field_validator("feature_cache", mode="before")
    @classmethod
    def _in_words(cls, value: Any, info: ValidationInfo) -> Any:
        """Version 0.1 took the MiB for features in memory, 0 for none."""
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        words = "auto" if value else "off"
        if not (info.context or {}).get("stored"):
            note = (
                f"train.feature_cache is a word now, auto, memory, disk or off; {value} is read as {words} in this version only"
            )
            warnings.warn(note, LabWarning, stacklevel=2)
        return words

    @property
    def worker_count(self) -> int:
        """Processes that read image files ahead on this machine."""
        if self.num_workers != "auto":
            return self.num_workers
        return min(MAX_WORKERS, max(0, (os.cpu_count() or 1) - 1))


class ReadConfig(Config):
    """The noise on images that instruments measure; chosen on validation data by `rl.choose_read_noise`."""

    renamed: ClassVar[Mapping[str, str]] = {"draws": "n_noise_samples"}

    n_noise_samples: int = Field(0, ge=0, description="noise samples an answer is averaged over; 0: clean images")
    noise_std: float | None = Field(None, ge=0, description="sigma of these; null for the training noise")


class InitConfig(Config):
    """The run whose weights a training began with; a record that `train --init` writes, not a setting."""

    name: str = Field(description="of that run")
    step: int = Field(ge=0, description="at which its weights were taken")
    weights: str = Field(description="their fingerprint, see `runs.init.weights_fingerprint`")
    origin: str = Field("", description="where they came from, if that run was imported")
    classes: str = Field("", description="how the class tables were taken over, in words")
    projectors: list[str] = Field([], description="aligned taps whose projectors were taken over")

    @property
    def words(self) -> str:
        """In a line, for descriptions."""
        parts = [f"{self.name} at step {self.step} (weights {self.weights})", f"classes: {self.classes}"]
        parts += [f"projectors of {', '.join(self.projectors)}"] if self.projectors else []
        return "; ".join([*parts, *([self.origin] if self.origin else [])])


class RunConfig(Config):
    """Everything that defines a run.

    Example:
        >>> import rrepa_lab as rl
        >>> config = rl.preset("digits-reverse").override({"train.steps": 200, "align.blocks": [4]})
        >>> config.train.steps, config.align.taps
        (200, ['block.4.layer.2'])
    """

    name: str = Field("unnamed", pattern=r"^[A-Za-z0-9][\w.-]*$", description="how the run is called")
    data: DataConfig = DataConfig()
    space: SpaceConfig = SpaceConfig()
    flow: FlowConfig = FlowConfig()
    align: AlignConfig = AlignConfig()
    encoder: OneOrSeveral[EncoderConfig] | None = Field(
        None,
        description="the frozen teacher, or a list of several, whose features stand side by side; needed by every strategy "
        "but none",
    )
    train: TrainConfig = TrainConfig()
    read: ReadConfig = ReadConfig()
    init: InitConfig | None = Field(None, description="the run whose weights it began with; `train --init` records it")
    origin: str = Field("", description="where the weights come from, if they were not trained here; `train` then says nothing")

    @property
    def teachers(self) -> list[EncoderConfig]:
        """The encoders it is aligned with, in their order; by `align.teacher` with random weights, or none."""
        each = self.encoder if isinstance(self.encoder, list) else [] if self.encoder is None else [self.encoder]
        if self.align.strategy == "none" or self.align.teacher == "encoder":
            return each
        return [] if self.align.teacher == "self" else [one.override({"weights": RANDOM}) for one in each]

    @property
    def fingerprint(self) -> str:
        """The name with a hash of all settings, "digits-reverse-1a2b3c4d": a folder for this configuration alone."""
        return f"{self.name}-{hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:8]}"

    @property
    def frame(self) -> Frame:
        """The sizes between which the space lies, and the noise of the training."""
        data, flow = self.data, self.flow
        picture = (data.channels, data.image_size, data.image_size)
        return Frame(picture, flow.image_shape, data.levels, flow.noise, flow.noise_std)

    @property
    def space_words(self) -> str:
        """The space in a protocol: "pixels", or its kind, the shape of x and 8 hex digits of its statistics."""
        if self.space.is_pixels:
            return "pixels"
        shape, known = "x".join(map(str, self.flow.image_shape)), self.space.fingerprint
        return f"{self.space.kind} {shape}" + (f" [{known}]" if known else "")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        try:
            check_frame(self.space, self.frame)
        except LabError as error:
            raise ValueError(str(error)) from None
        if self.space.cache == "on" and (self.space.sample or self.data.shift):
            why = "space.sample is set" if self.space.sample else f"data.shift is {self.data.shift}"
            raise ValueError(f"space.cache is 'on' but {why}, so that there are no latents to keep: set space.cache=auto")
        align, flow = self.align, self.flow
        if align.strategy != "none":
            if not align.blocks:
                raise ValueError(f"align.strategy is {align.strategy!r} but align.blocks is empty")
            if not self.teachers and align.teacher != "self":
                raise ValueError(f"align.strategy is {align.strategy!r} but there is no encoder")
            _check_places(align, flow)
            _check_recipe(align, flow, self.train)
        return self


def _check_places(align: AlignConfig, flow: FlowConfig) -> None:
    """ValueError for an aligned block or layer that the flow does not have."""
    if not all(number < 0 or 1 <= number <= flow.blocks for number in align.blocks):
        raise ValueError(f"align.blocks {align.blocks} must lie in 1..{flow.blocks}")
    if isinstance(align.layers[0], list) and len(align.layers) != len(align.blocks):
        raise ValueError(f"align.layers has {len(align.layers)} lists, but align.blocks {align.blocks}: one for each block")
    for block, layers in align.pairs:
        number = block if block > 0 else max(1, flow.blocks + 1 + block)
        depth = flow.layers_of(number)
        wrong = [layer for layer in layers if layer == 0 or layer > depth]
        if wrong:
            raise ValueError(f"align.layers {layers}: layer {wrong[0]} is not in 1..{depth}, the layers of block {number}")


def _check_recipe(align: AlignConfig, flow: FlowConfig, train: TrainConfig) -> None:
    """ValueError for settings of the alignment that contradict each other, the flow or the training."""
    schedule = Schedule.parse(align.schedule)
    if schedule.step > train.steps - (schedule.kind == "until"):
        raise ValueError(
            f"align.schedule is {align.schedule}, and the training has {train.steps} steps: choose an earlier step"
        )
    if align.refinements and align.strategy in ("forward", "detach", "reverse-exact", "reverse-cached"):
        raise ValueError(
            f"align.refinements is {align.refinements}: they are steps of strategy 'reverse', not {align.strategy!r}"
        )
    if align.labels == "dropped" and flow.classes == 0:
        raise ValueError("align.labels is 'dropped', but flow.classes is 0: there is no label to drop; set align.labels=given")
    if align.teacher != "self":
        if align.self_tap:
            raise ValueError(f"align.self_tap is set, but align.teacher is {align.teacher!r}: set align.teacher=self")
        return
    if train.ema_decay == 0:
        raise ValueError(
            "align.teacher is 'self', the averaged weights, but train.ema_decay is 0: there is no average; set 0.99"
        )
    if train.parallel == "fsdp":
        raise ValueError("align.teacher is 'self', which needs the averaged weights whole: set train.parallel=ddp")


def complete(config: RunConfig, classes: Sequence[str] | None = None) -> RunConfig:
    """The configuration with everything that depends on its data and sizes filled in, as a training stores it.

    flow.classes of -1 becomes the number of classes of the data; blocks and layers to be aligned that count from the end
    count from 1; data.path and the folder of a space are absolute.

    Args:
        classes: the class names; by default those of the data, whose folder is then listed.

    Raises: LabError for another number of classes than the data have, and for data that are not there.
    """
    data, flow = config.data, config.flow
    names = class_names(data) if classes is None else classes
    if flow.classes == -1:
        flow = flow.model_copy(update={"classes": len(names)})
    elif flow.classes not in (0, len(names)):
        raise LabError(f"flow.classes is {flow.classes}, but {data.name} has {len(names)} classes")
    if data.path is not None:
        data = data.model_copy(update={"path": str(data.root)})
    align = config.align.counted(flow.blocks, flow.layers)
    space = config.space.absolute()
    return config.model_copy(update={"data": data, "space": space, "flow": flow, "align": align})
