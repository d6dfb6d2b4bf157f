"""The training loop: a generator of reports that leaves a loadable run directory behind at any moment."""

import json
import math
import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from rrepa_lab.analysis.classify import classify
from rrepa_lab.data.datasets import Batch, ImageSet, load_split, whole
from rrepa_lab.data.loaders import SeededBatches, generator, stream
from rrepa_lab.data.pixels import training_noise
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_atomically
from rrepa_lab.flow.likelihood import HALF_LOG_2PI, nats_per_dim
from rrepa_lab.flow.tarflow import TarFlow
from rrepa_lab.presets import preset
from rrepa_lab.runs import Run, RunConfig, build, load, pick_device
from rrepa_lab.training.card import write_card
from rrepa_lab.training.objective import Losses, Objective
from rrepa_lab.training.records import Records
from rrepa_lab.training.schedule import ema_decay, learning_rate
from rrepa_lab.training.settings import TrainConfig
from rrepa_lab.training.teacher import Teacher

# purposes of the random streams of a step, so that none shares its numbers with another
FLIP, NOISE, DROP = 2, 3, 4


@dataclass(frozen=True)
class StepReport:
    """What happened since the last report; losses are means over those steps."""

    step: int  # steps done, from 1
    steps: int  # steps planned
    loss: float  # L_nf + lambda * L_align
    nats_per_dim: float  # of training images under the training noise
    similarity: dict[str, float]  # aligned tap -> mean cosine with the encoder
    learning_rate: float
    grad_norm: float  # before clipping
    seconds: float  # since this call of train began
    remaining: float  # seconds, at the pace so far
    held_out_nats_per_dim: float | None = field(default=None)  # of averaged weights, when it was looked at
    held_out_accuracy: float | None = field(default=None)  # of one gradient step on clean images, then too


def train(
    source: str | Path | RunConfig,
    out: Path | str,
    *,
    settings: Mapping[str, Any] | None = None,
    resume: bool | Literal["auto"] = False,
    device: str = "auto",
) -> Generator[StepReport, None, None]:
    """Train a run, yielding a `StepReport` every `train.report_every` steps and after every checkpoint.

    Started by `accelerate launch` or `torchrun`, the same call shares each batch among all processes. Closing the
    generator, or Ctrl-C, saves where it stands. On a CPU a resumed run gives the same numbers as one that was
    never interrupted.

    Args:
        source: a preset's name, a config.json, or a configuration.
        out: the run directory.
        settings: dotted overrides, {"train.steps": 200}.
        resume: go on with the run in `out`, which `source` must then configure; "auto" goes on if there is one and else
            begins. A run that is finished yields no report.
        device: "auto", "cpu" or "cuda".

    Raises: LabError before anything is written if the configuration, its data or its encoder cannot be used, and
        when a loss is not finite; the last checkpoint then stands.
    """
    config = read_config(source).override(settings or {})
    return _train(config, Path(out), resume, device)


def read_config(source: str | Path | RunConfig) -> RunConfig:
    """A configuration from a preset's name, the path of a config.json (bare or of a run), or itself."""
    if isinstance(source, RunConfig):
        return source
    if str(source).endswith(".json") or Path(source).is_file():
        return config_file(Path(source))
    return preset(str(source))


def config_file(path: Path) -> RunConfig:
    """A RunConfig from a JSON file: a run's config.json, or its `config` part alone."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(f"no configuration at {path}") from None
    except ValueError as error:
        raise LabError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise LabError(f"{path} holds no configuration: it must be a JSON object")
    return RunConfig.from_dict(values["config"] if "format" in values and "config" in values else values)


def _train(config: RunConfig, out: Path, resume: bool | str, device: str) -> Generator[StepReport, None, None]:
    images = load_split(config.data, "train")
    if config.flow.classes not in (0, len(images.classes)):
        raise LabError(f"flow.classes is {config.flow.classes}, but {config.data.name} has {len(images.classes)} classes")
    if config.train.compile:
        _check_compiler()

    settings, session = config.train, _Session(config, images, out, resume, cpu=pick_device(device).type == "cpu")
    began, first = time.perf_counter(), session.step
    since_report: list[Tensor] = []
    try:
        batches = session.batches(len(images))
        for rows, batch in zip(batches, stream(images, batches, settings.workers), strict=True):
            since_report.append(session.advance(batch, rows))
            step = session.step
            saved = step % settings.save_every == 0
            if saved and step != settings.steps:
                session.checkpoint()
            if step % settings.report_every and not saved and step != settings.steps:
                continue
            loss, nats, norm, *near = session.mean(since_report)
            since_report = []
            seconds = time.perf_counter() - began
            # the first report at or after each multiple of look_every, and the last
            look = step % settings.look_every < settings.report_every or step == settings.steps
            report = StepReport(
                step=step,
                steps=settings.steps,
                loss=loss,
                nats_per_dim=nats + HALF_LOG_2PI,
                similarity=dict(zip(config.align.taps, near, strict=True)),
                learning_rate=session.learning_rate,
                grad_norm=norm,
                seconds=seconds,
                remaining=seconds / (step - first) * (settings.steps - step),
                **(session.look() if look else {}),
            )
            session.record(report)
            yield report
        session.checkpoint()
    except (KeyboardInterrupt, GeneratorExit):
        session.checkpoint()
        raise


class _Session:
    """What the steps of one training work on: weights, their average, the optimizer, and the run directory."""

    def __init__(self, config: RunConfig, images: ImageSet, out: Path, resume: bool | str, cpu: bool) -> None:
        from accelerate import Accelerator

        self.config, self.out, self.levels = config, out, images.levels
        self.accelerator = Accelerator(cpu=cpu)
        self.device: torch.device = self.accelerator.device
        run, state = _begin(config, images, out, resume)
        self.accelerator.wait_for_everyone()  # all have looked at `out` before one of them writes there
        self.step, self.learning_rate, self.whole = run.step, 0.0, True
        self.objective = Objective(run.flow, run.projectors, config.align)
        t = config.train
        optimizer = torch.optim.AdamW(
            self.objective.parameters(), lr=t.lr, betas=t.betas, weight_decay=t.weight_decay, fused=True
        )
        self.average = AveragedModel(self.objective, multi_avg_fn=partial(_lerp, limit=t.ema))
        if state:
            self.objective.load_state_dict(state["objective"])
            self.average.load_state_dict(state["average"])
            optimizer.load_state_dict(state["optimizer"])
        self.average.to(self.device)
        _equip(run.flow, t)  # after the copy for the average was made
        self.wrapped, self.optimizer = self.accelerator.prepare(self.objective, optimizer)
        self.teacher = Teacher(run.encoder().to(self.device), config.flow.side) if config.align.taps else None
        averaged = cast(Objective, self.average.module)
        self.kept = Run(averaged.flow, config, run.classes, averaged.projectors, run.step, out)
        self.records = Records(out)
        if self.accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            self.records.rewind(self.step)
        if not state:
            self.checkpoint()
        if self.teacher is not None and self._repeats(images, self.teacher):
            with self._autocast():
                self.teacher.remember(images, self.device, t.workers)

    def batches(self, size: int) -> SeededBatches:
        """The batches that are still to come, this process's part of each."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        t = self.config.train
        return SeededBatches(size, t.batch, t.seed, self.step, t.steps, rank, world)

    def advance(self, batch: Batch, rows: list[int]) -> Tensor:
        """One optimizer step on these rows of the split; returns loss, L_nf, gradient norm and similarities, detached."""
        t = self.config.train
        self.learning_rate = learning_rate(self.step, t.steps, t.lr, t.warmup, t.lr_floor)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        with _rereadable() if t.compile else nullcontext():
            with self._autocast():
                losses: Losses = self.wrapped(*self._inputs(batch, rows))
            _check_finite(losses, self.step + 1)
            self.optimizer.zero_grad()
            self.accelerator.backward(losses.total)
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), t.clip)
        self.whole = False
        self.optimizer.step()
        self.average.update_parameters(self.objective)
        self.step += 1
        self.whole = True
        return torch.stack([losses.total, losses.flow, norm, *losses.similarity.values()]).detach()

    def checkpoint(self) -> None:
        """Save, unless an interrupt has left the weights between two steps: then the last checkpoint stands."""
        if self.accelerator.is_main_process and self.whole:
            self.kept.step = self.step
            self.kept.save(self.out)
            parts = {name: getattr(self, name).state_dict() for name in ("objective", "average", "optimizer")}
            write_atomically(self.out / "train_state.pt", lambda path: torch.save({"step": self.step, **parts}, path))
            write_card(self.kept, self.records.table())

    def mean(self, rows: list[Tensor]) -> list[float]:
        """Mean over these steps and over all processes."""
        mean: Tensor = self.accelerator.reduce(torch.stack(rows).mean(dim=0), "mean")
        return cast(list[float], mean.tolist())

    def record(self, report: StepReport) -> None:
        """Append to metrics.jsonl."""
        if self.accelerator.is_main_process:
            self.records.append(asdict(report))

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """The averaged weights on 512 held-out images: nats/dim under the training noise, accuracy of one gradient step."""
        images = load_split(self.config.data, "val" if self.config.data.holdout else "test")
        x, y = (part.to(self.device) for part in whole(images, 512))
        flow, known = self.kept.flow, self.config.flow.classes > 0
        noised = self._noised(x, generator(0, NOISE))
        nats = nats_per_dim(flow.log_prob(noised, y if known else None), self.config.flow.dims).mean()
        seen = {"held_out_nats_per_dim": float(nats)}
        return seen | ({"held_out_accuracy": float((classify(flow, x).label == y).double().mean())} if known else {})

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bfloat16")

    def _repeats(self, images: ImageSet, teacher: Teacher) -> bool:
        """Whether the encoder would see the same images again, and its features of all of them may be kept."""
        t = self.config.train
        again = self.step < t.steps and t.steps * t.batch > len(images) and not self.config.data.flip
        return again and teacher.table_bytes(len(images)) <= t.feature_cache * 2**20

    def _inputs(self, batch: Batch, rows: list[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Noised images, labels with some dropped, and the encoder's features of the clean images."""
        x, y = batch
        key = (self.step, self.accelerator.process_index)
        seed = self.config.train.seed
        if self.config.data.flip:
            mirrored = torch.rand(len(x), generator=generator(seed, FLIP, *key)) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        clean = x.to(self.device)
        noised = self._noised(clean, generator(seed, NOISE, *key))
        labels = None
        if self.config.flow.classes:
            dropped = torch.rand(len(y), generator=generator(seed, DROP, *key)) < self.config.train.label_drop
            labels = torch.where(dropped, -1, y).to(self.device)
        return noised, labels, None if self.teacher is None else self.teacher(clean, rows)

    def _noised(self, x: Tensor, draw: torch.Generator) -> Tensor:
        return training_noise(x, self.config.flow.noise, self.config.flow.noise_std, self.levels, draw)


def _equip(flow: TarFlow, settings: TrainConfig) -> None:
    """Recompute or compile the layers of a flow that is to be trained; its parameters and their names stay."""
    for number in range(1, flow.config.blocks + 1):
        transformer = flow.block(number).transformer
        transformer.checkpointing = settings.checkpointing
        if settings.compile:
            for layer in transformer.layers:
                layer.compile()


def _rereadable() -> AbstractContextManager[None]:
    """Within it, compiled backward code does not write over what the graph keeps: `align.segments` walks it several times."""
    from torch._functorch import config

    return cast(AbstractContextManager[None], config.patch(donated_buffer=False))


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise LabError("train.compile needs a C++ compiler, and none was found: install g++, or leave it off") from error


def _begin(config: RunConfig, images: ImageSet, out: Path, resume: bool | str) -> tuple[Run, dict[str, Any]]:
    """A fresh run, or the one in `out` with the state it was left in."""
    there = (out / "config.json").exists()
    if resume == "auto":
        if there and not (out / "train_state.pt").exists() and not _has_weights(out):
            return build(config, images.classes), {}  # it was killed while its first checkpoint was written
        resume = there
    if out.exists() and not there and any(not path.name.startswith(".") for path in out.iterdir()):
        raise LabError(f"{out} is not empty and holds no run: choose another --out")
    if not resume:
        if there:
            raise LabError(f"{out} already holds a run: --resume goes on with it, or choose another --out")
        return build(config, images.classes), {}
    if not there:
        raise LabError(f"nothing to resume: {out} holds no run")
    old, new = load(out).config.flat(), config.flat()
    for key in [*old, *new]:
        if old.get(key) != new.get(key):
            change = f"{key} was {old.get(key)}, now {new.get(key)}"
            raise LabError(f"{out} was trained with another configuration ({change}): resume {out / 'config.json'}")
    path = out / "train_state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        run = build(config, images.classes)
        run.step = int(state["step"])
    except FileNotFoundError:
        raise LabError(f"{path} is missing: this run can be used, but not resumed") from None
    except Exception as error:
        raise LabError(f"{path} is damaged or of another program ({type(error).__name__})") from error
    return run, state


def _has_weights(out: Path) -> bool:
    """Whether there are weights that took a step."""
    try:
        return load(out).step > 0
    except LabError:
        return False


def _lerp(averages: list[Tensor], values: list[Tensor], updates: Tensor, limit: float) -> None:
    # AveragedModel hands over parameters by device and dtype, and counts the updates before this one
    torch._foreach_lerp_(averages, values, 1 - ema_decay(int(updates), limit))


def _check_finite(losses: Losses, step: int) -> None:
    if not math.isfinite(losses.total.item()):
        parts = [f"flow {losses.flow.item():.3g}", *(f"{tap} {value.item():.3g}" for tap, value in losses.similarity.items())]
        raise LabError(f"the loss is {losses.total.item()} at step {step} ({', '.join(parts)}): lower train.lr or train.clip")
