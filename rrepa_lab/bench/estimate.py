"""What a training will take before it is started: operations, memory, and hours on this machine or on a named GPU."""

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel

from rrepa_lab.align.encoder import make_teacher
from rrepa_lab.align.projector import Projectors
from rrepa_lab.align.self_teacher import self_tap
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.bench.flops import StepWork, block_work, entry_work, layers_work, step_work
from rrepa_lab.bench.footprint import Footprint, footprint
from rrepa_lab.bench.gpus import GIB, UTILIZATION, Gpu
from rrepa_lab.bench.timing import operations
from rrepa_lab.data.loaders import generator, seeded
from rrepa_lab.errors import LabError
from rrepa_lab.files import existing_folder
from rrepa_lab.flow.taps import Tap
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.paths import cache_root
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.training.inputs import feature_store, features_come_again
from rrepa_lab.training.latents import views, wants_table
from rrepa_lab.training.objective import Objective
from rrepa_lab.training.precision import resolve_precision
from rrepa_lab.training.schedule import ema_update

TIMED_STEPS = 10
QUICK = 4e10  # operations of a step below which it is timed without being asked for: seconds on two cores
UNKNOWN_DIM = 768  # E that is assumed where a teacher cannot be made here


@dataclass(frozen=True)
class TeacherWork:
    """The teachers of a run.

    Args:
        dims: E of each teacher.
        operations: of their passes for one image; None where one cannot be made here.
        patches: of the grid of each.
    """

    dims: tuple[int, ...]
    operations: float | None
    patches: tuple[int, ...]


@dataclass(frozen=True)
class Estimate:
    """What a training takes.

    Args:
        parameters: of the flow, and of its projectors.
        work: operations of a step for one image, without the teacher.
        teacher: of the alignment, None without one.
        teacher_runs: whether the teacher runs in every step; else its features are kept, see `train.feature_cache`.
        images: of the training split; None where they are not known here.
        memory: of one process with all of the batch, in `train.accumulate` parts.
    """

    config: RunConfig
    parameters: tuple[int, int]
    work: StepWork
    teacher: TeacherWork | None
    teacher_runs: bool
    memory: Footprint
    images: int | None = None

    @property
    def step_operations(self) -> float:
        """Of a step of the whole batch, the teacher's pass included where it runs."""
        teacher = self.teacher.operations or 0.0 if self.teacher is not None and self.teacher_runs else 0.0
        return self.config.train.batch * (self.work.total + teacher)

    def hours_on(self, gpu: Gpu, count: int = 1, utilization: float = UTILIZATION) -> float:
        """Hours of all steps at a part of the peak of so many GPUs."""
        return self.step_operations * self.config.train.steps / (gpu.tflops * 1e12 * utilization * count) / 3600

    def memory_on(self, count: int = 1) -> Footprint:
        """Memory of each of so many processes: they share the batch, and by fsdp the state."""
        shared = count if self.config.train.parallel == "fsdp" else 1
        m = self.memory
        return Footprint(
            m.weights / shared, m.gradients / shared, m.optimizer / shared, m.average / shared, m.activations / count
        )


def estimate(config: RunConfig, bfloat16: bool | None = None, images: int | None = None) -> Estimate:
    """Count what the training of a configuration takes; nothing is downloaded or trained.

    Args:
        config: a `complete` one.
        bfloat16: of the matrix products; by default what `train.precision` says, and bfloat16 for auto.
        images: of the training split, where they are known: then it is known whether the teacher's features are kept.
    """
    flow = config.flow.model_copy(update={"classes": max(0, config.flow.classes)})
    aligned = bool(config.align.taps)
    teacher = teacher_work(config) if aligned else None
    dims = teacher.dims if teacher is not None else ()
    with torch.device("meta"):
        own = sum(p.numel() for p in TarFlow(flow).parameters())
        made = Projectors.of(config.align, flow, dims)
        projectors = sum(p.numel() for p in made.parameters())
    low = config.train.precision != "float32" if bfloat16 is None else bfloat16
    t = config.train
    plain = t.parallel == "fsdp"
    memory = footprint(
        flow, config.align, -(-t.batch // t.accumulate), own + projectors, teacher_dims=dims, bfloat16=low,
        checkpointing=t.checkpointing, plain=plain,
    )  # fmt: skip
    work = step_work(flow, config.align, dims, t.checkpointing, plain)
    return Estimate(config, (own, projectors), work, teacher, _teacher_runs(config, teacher, images), memory, images)


def _teacher_runs(config: RunConfig, teacher: TeacherWork | None, images: int | None) -> bool:
    """Whether the teacher runs in every step; assumed where the images are not known."""
    if teacher is None:
        return False
    if config.align.with_self or images is None or not features_come_again(config, images):
        return True
    store, needed = _feature_bytes(config, teacher, images)
    return store == "off" or (store == "disk" and needed > shutil.disk_usage(existing_folder(cache_root())).free)


def _feature_bytes(config: RunConfig, teacher: TeacherWork, images: int) -> tuple[str, float]:
    """Where the features of all training images are kept, and their bytes: float32 on the flow's grid in memory, or float16 on
    the coarser one.
    """
    count, tokens = float(images * views(config)), config.flow.tokens
    in_memory = 4 * count * tokens * sum(teacher.dims)
    store = feature_store(config, in_memory)
    if store != "disk":
        return store, in_memory
    return store, 2 * count * sum(dim * min(tokens, n) for dim, n in zip(teacher.dims, teacher.patches, strict=True))


def teacher_work(config: RunConfig) -> TeacherWork:
    """The sizes of the teachers and the operations of their passes, counted with random weights on one image."""
    if config.align.with_self:
        return _self_teacher(config)
    each = [_one_teacher(encoder, config) for encoder in config.teachers]
    passes = [work for _, work, _ in each if work is not None]
    total = sum(passes) if len(passes) == len(each) else None
    return TeacherWork(tuple(dim for dim, _, _ in each), total, tuple(patches for _, _, patches in each))


def _self_teacher(config: RunConfig) -> TeacherWork:
    """The flow's own averaged weights up to the tap whose states are the target."""
    flow, align = config.flow, config.align
    tap = Tap.parse(align.self_tap or self_tap(align, flow.blocks, flow.layers))
    blocks = sum(block_work(flow, number).forward for number in range(1, tap.block))
    last = entry_work(flow) + layers_work(flow, int(tap.layer))
    return TeacherWork((flow.width,), blocks + last.forward, (flow.tokens,))


def _one_teacher(encoder: EncoderConfig, config: RunConfig) -> tuple[int, float | None, int]:
    """E, operations of a pass for one image, and patches; of one that cannot be made here E and patches are assumed."""
    try:
        teacher = make_teacher(encoder.override({"weights": "random"}), False)
        image = torch.zeros(1, config.data.channels, encoder.image_size, encoder.image_size)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the kernel whose products are counted
            return teacher.dim, float(operations(partial(teacher, image))), prod(teacher.grid)
    except LabError:
        return UNKNOWN_DIM, None, config.flow.tokens


def cache_bytes(found: Estimate) -> dict[str, float]:
    """Bytes of what is kept of the training images: pictures (uint8), latents (float16), features of the teacher.

    Latents and features are kept of the mirrored views as well where `data.flip` is set.
    """
    config, images = found.config, found.images
    if images is None:
        return {}
    sizes = {"pictures": float(images * config.data.channels * config.data.image_size**2)}
    if wants_table(config, images):
        sizes["latents"] = 2.0 * images * views(config) * config.flow.dims
    if found.teacher is not None and not found.teacher_runs:
        _, sizes["features"] = _feature_bytes(config, found.teacher, images)
    return sizes


# --- hours on this machine ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, measured here on random images: the median of `steps`, after one that is not counted."""

    seconds: float
    steps: int
    precision: str
    device: str

    def hours(self, steps: int) -> float:
        """Of so many steps."""
        return self.seconds * steps / 3600


def time_steps(found: Estimate, device: torch.device, steps: int = TIMED_STEPS) -> Timing:
    """Time training steps of the flow on this machine: losses, gradient, optimizer and average, without teacher and data.

    Raises: LabError where the memory does not suffice.
    """
    config, flow = found.config, found.config.flow.model_copy(update={"classes": max(0, found.config.flow.classes)})
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if found.memory.total > free:
        need, there = found.memory.total / GIB, free / GIB
        raise LabError(f"a step needs about {need:.1f} GiB, and {there:.1f} GiB are free here: it is not timed")
    t, dims = config.train, found.teacher.dims if found.teacher is not None else ()
    precision = resolve_precision(t.precision, device, t.batch * flow.tokens, flow.width)
    with seeded(0):
        projectors = Projectors.of(config.align, flow, dims or (1,))
        objective = Objective(TarFlow(flow), projectors, config.align).to(device)
    objective.flow.configure_layers(t.checkpointing, False)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-6, fused=True)
    average = AveragedModel(objective, multi_avg_fn=partial(ema_update, limit=t.ema_decay))
    x = torch.randn(t.batch, *flow.image_shape, generator=generator(0)).to(device)
    y = (torch.arange(t.batch) % flow.classes).to(device) if flow.classes else None
    target = torch.randn(t.batch, flow.tokens, sum(dims), generator=generator(1)).to(device) if dims else None

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            losses = objective(x, y, target)
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), t.grad_clip_norm)
        optimizer.step()
        average.update_parameters(objective)
        losses.total.item()  # waits for a GPU

    step()
    return Timing(statistics.median(_timed(step) for _ in range(steps)), steps, precision, str(device))


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
