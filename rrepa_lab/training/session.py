"""What the steps of one training work on: weights, their average, the optimizer, and the run directory."""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from rrepa_lab.align.floors import position_floor
from rrepa_lab.align.target import Teacher
from rrepa_lab.data.augment import shifted
from rrepa_lab.data.images import Batch, ImageSet, TensorImages
from rrepa_lab.data.loaders import SeededBatches, generator, stream
from rrepa_lab.data.pixels import training_noise
from rrepa_lab.data.splits import load_split
from rrepa_lab.data.subset import whole
from rrepa_lab.errors import LabError
from rrepa_lab.flow.likelihood import HALF_LOG_2PI
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.runs.card import write_card
from rrepa_lab.runs.config import RunConfig, TrainConfig
from rrepa_lab.runs.records import Records
from rrepa_lab.runs.run import BEST, Run, build
from rrepa_lab.training import folder
from rrepa_lab.training.objective import Losses, Objective
from rrepa_lab.training.precision import resolve_precision
from rrepa_lab.training.processes import accelerator_on, any_process, main_decides
from rrepa_lab.training.schedule import ema_decay, learning_rate
from rrepa_lab.training.state import NAME as STATE
from rrepa_lab.training.state import Best, Checkpoint

# purposes of the random streams of a step, so that none shares its numbers with another
FLIP, NOISE, DROP, SHIFT = 2, 3, 4, 5
FLOOR_BATCH = 256  # images in one pass of the teacher for them
FLOOR_IMAGES = 512  # that the floors of the similarity are taken over where the teacher's features are not kept
PRIOR_RATE = 0.1  # of the running mean of z^2 of a volume-preserving flow, as in the public code


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
    precision: str = "float32"  # of the matrix products
    floors: dict[str, float] = field(default_factory=dict)  # of the similarity, without reading the image: see analysis.floors
    # of the averaged weights, at a validation; the same number of images of the validation and of the training split
    held_out_nats_per_dim: float | None = field(default=None)
    held_out_accuracy: float | None = field(default=None)  # of one gradient step, under the noise of `config.read`
    train_nats_per_dim: float | None = field(default=None)
    train_accuracy: float | None = field(default=None)


Validator = Callable[[Run], dict[str, float]]  # a run -> measurements by their names in metrics.jsonl
# (configuration, training split, device) -> validator
ValidatorFactory = Callable[[RunConfig, ImageSet, torch.device], Validator]


class NonFiniteLoss(LabError):
    """The loss is not a number: the weights of this moment are not worth keeping."""


class Session:
    """What the steps of one training work on: weights, their average, the optimizer, and the run directory.

    `config` is one that `runs.config.complete` gives: its classes are those of the data.
    """

    def __init__(
        self, config: RunConfig, out: Path, resume: bool | str, device: torch.device, validator: "ValidatorFactory"
    ) -> None:
        self.config, self.out = config, out
        self.images = load_split(config.data, "train")
        classes = self.images.classes
        self.accelerator = accelerator_on(device)
        self.device: torch.device = self.accelerator.device
        size, processes = min(config.train.batch, len(self.images)), self.accelerator.num_processes
        if size < processes:
            what = f"train.batch {config.train.batch}" if size == config.train.batch else f"a training split of {size} images"
            raise LabError(f"{what} cannot be shared among {processes} processes: each needs an image of every batch")
        self.validation = validator(config, self.images, self.device)
        # what cannot begin is found out before anything is written
        folder.resumes(config, classes, out, resume)
        run = build(config, classes)
        self.lock = FileLock(out / folder.LOCK)
        main_decides(self.accelerator, lambda: folder.take(out, self.lock))
        try:
            # once more, now that no other training writes there
            state = Checkpoint.load(out / STATE) if folder.resumes(config, classes, out, resume) else None
            self.accelerator.wait_for_everyone()
            self._prepare(run, state)
        except BaseException:
            self.lock.release()
            raise

    def _prepare(self, run: Run, state: Checkpoint | None) -> None:
        config, t = self.config, self.config.train
        self.step, self.learning_rate, self.complete = state.step if state else 0, 0.0, True
        self.rows = list(state.rows) if state else []
        if state and not state.config:  # of version 0.1, whose records were a file of their own
            self.rows = [row for row in Records(self.out).rows() if row["step"] <= state.step]
        self.best = state.best if state else None
        self.ended = bool(state and state.ended)
        self.pending: list[Tensor] = list(state.pending) if state and state.pending is not None else []
        rows = min(t.batch, len(self.images)) * config.flow.tokens
        self.precision = state.precision if state else main_decides(
            self.accelerator, lambda: resolve_precision(t.precision, self.device, rows, config.flow.width)
        )  # fmt: skip
        self.objective = Objective(run.flow, run.projectors, config.align)
        optimizer = torch.optim.AdamW(
            self.objective.parameters(), lr=t.lr, betas=t.betas, weight_decay=t.weight_decay, fused=True
        )
        self.average = AveragedModel(self.objective, multi_avg_fn=partial(_lerp, limit=t.ema))
        if state:
            self.objective.load_state_dict(state.objective)
            self.average.load_state_dict(state.average)
            optimizer.load_state_dict(state.optimizer)
        self.average.to(self.device)
        _configure_layers(run.flow, t)  # after the copy for the average was made
        self.wrapped, self.optimizer = self.accelerator.prepare(self.objective, optimizer)
        self.teacher = Teacher(run.encoder().to(self.device), config.flow.side) if config.align.taps else None
        averaged = cast(Objective, self.average.module)
        self.kept = Run(averaged.flow, config, run.classes, averaged.projectors, self.step, self.out)
        self.records = Records(self.out)
        main_decides(self.accelerator, lambda: folder.check_space(self.out, self._checkpoint_bytes()))
        if state is None:
            self.checkpoint()
        else:
            self.publish()
        with self._autocast():
            self.floors = self._prepare_teacher(self.teacher) if self.teacher is not None and not self._finished else {}

    def _prepare_teacher(self, teacher: Teacher) -> dict[str, float]:
        """Keep the teacher's features of all images where that pays; returns the floors of the similarity.

        These are taken over all training images then, else over a class-balanced subset of them.
        """
        if self._repeats(teacher):
            labels = teacher.remember(self.images, self.device, self._workers)
            table = teacher.table
            assert table is not None
        else:
            x, labels = whole(self.images, FLOOR_IMAGES)
            table = torch.cat([teacher(part.to(self.device), []) for part in x.split(FLOOR_BATCH)])
        return position_floor(table, labels if self.config.flow.classes else None) if len(table) > 1 else {}

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.lock.release()

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self, stop: Callable[[], bool] | None) -> Generator[StepReport, None, None]:
        """Train to the end; see `train`."""
        t, began, first = self.config.train, time.perf_counter(), self.step

        def report() -> StepReport:
            loss, nats, norm, *near = self._mean(self.pending)
            seconds = time.perf_counter() - began
            return StepReport(
                step=self.step,
                steps=t.steps,
                loss=loss,
                nats_per_dim=nats + HALF_LOG_2PI,
                similarity=dict(zip(self.taps, near, strict=True)),
                learning_rate=self.learning_rate,
                grad_norm=norm,
                seconds=seconds,
                remaining=seconds / (self.step - first) * (t.steps - self.step),
                precision=self.precision,
                floors=self.floors,
            )

        try:
            for rows, batch in self._batches():
                self.pending.append(self.advance(batch, rows))
                last = self.step == t.steps
                saves = last or self.step % t.save_every == 0
                if saves or self.step % t.report_every == 0:
                    now = report()
                    if last or self._validation_is_due():
                        now = StepReport(**vars(now) | self.validate())
                        saves = saves or self.ended
                    self.record(now)
                    if saves:
                        self.checkpoint()
                    yield now
                    if self.ended:
                        return
                if stop is not None and any_process(self.accelerator, stop()) and not last:
                    self.checkpoint()
                    if self.pending:
                        yield report()
                    return
        except NonFiniteLoss:
            raise
        except BaseException:  # Ctrl-C, a closed generator, a broken file, no memory: what was done is kept
            self._save_at_end()
            raise

    def _save_at_end(self) -> None:
        # the error that ends the training is the one to report; if this fails too the last checkpoint stands
        with contextlib.suppress(LabError):
            self.checkpoint()

    @property
    def _finished(self) -> bool:
        return self.ended or self.step >= self.config.train.steps

    def _batches(self) -> Iterator[tuple[list[int], Batch]]:
        """The batches that are still to come, this process's part of each, with their rows of the split."""
        if self.ended:
            return
        t, a = self.config.train, self.accelerator
        rows = SeededBatches(len(self.images), t.batch, t.seed, self.step, t.steps, a.process_index, a.num_processes)
        yield from zip(rows, stream(self.images, rows, self._workers), strict=True)

    @property
    def _workers(self) -> int:
        return 0 if isinstance(self.images, TensorImages) else self.config.train.worker_count

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
        self.complete = False
        self.optimizer.step()
        if losses.z_square is not None:
            self._update_prior(losses.z_square)
        self.average.update_parameters(self.objective)
        self.step += 1
        self.complete = True
        self.taps = list(losses.similarity)
        return torch.stack([losses.total, losses.flow, norm, *losses.similarity.values()]).detach()

    @torch.no_grad()
    def _update_prior(self, square: Tensor) -> None:
        """The variance of the prior follows the mean of z^2, its maximum-likelihood value, over the last batches."""
        variance = self.objective.flow.prior_var
        assert variance is not None
        variance.lerp_(self.accelerator.reduce(square.to(variance), "mean"), 1 if self.step == 0 else PRIOR_RATE)

    def _mean(self, rows: list[Tensor]) -> list[float]:
        """Mean over these steps and over all processes."""
        mean: Tensor = self.accelerator.reduce(torch.stack(rows).to(self.device).mean(dim=0), "mean")
        return cast(list[float], mean.tolist())

    # --- validation ---------------------------------------------------------------------------------------------------

    def _validation_is_due(self) -> bool:
        """At the first report at or after each multiple of `look_every`."""
        every = self.config.train.look_every
        last = max((row["step"] for row in self.rows if row.get("held_out_nats_per_dim") is not None), default=0)
        return self.step // every > last // every

    def validate(self) -> dict[str, float]:
        """The averaged weights on validation and training images; keeps the weights if they are the best so far."""
        found = self.validation(self.kept)
        t = self.config.train
        if t.keep == "last":
            return found
        value = found[f"held_out_{t.keep}"]
        better = self.best is None or (value < self.best.value if t.keep == "nats_per_dim" else value > self.best.value)
        if better:
            self.best = Best(self.step, value, {k: v.detach().cpu().clone() for k, v in self.kept.weights().items()})
        else:
            assert self.best is not None
            self.best.since += 1
            self.ended = bool(t.patience) and self.best.since >= t.patience
        return found

    # --- the run directory --------------------------------------------------------------------------------------------

    def record(self, report: StepReport) -> None:
        """Add a report to the records, and to metrics.jsonl."""
        row = asdict(report)
        self.rows.append(row)
        self.pending = []
        if self.accelerator.is_main_process:
            try:
                self.records.append(row)
            except OSError as error:
                raise LabError(f"{self.records.path} cannot be written: {error.strerror or error}") from error

    def checkpoint(self) -> None:
        """Save, unless an interrupt has left the weights between two steps: then the last checkpoint stands."""
        if self.accelerator.is_main_process and self.complete:
            Checkpoint(
                step=self.step,
                config=self.config.to_dict(),
                classes=self.kept.classes,
                precision=self.precision,
                objective=self.objective.state_dict(),
                average=self.average.state_dict(),
                optimizer=self.optimizer.state_dict(),
                rows=self.rows,
                pending=torch.stack(self.pending).cpu() if self.pending else None,
                best=self.best,
                ended=self.ended,
            ).save(self.out / STATE)
            self.publish()

    def publish(self) -> None:
        """Write the files that others read from the present state, which the checkpoint holds."""
        if not self.accelerator.is_main_process:
            return
        self.kept.step = self.step
        self.kept.save(self.out)
        self.records.rewrite(self.rows)
        if self.best is not None:
            self.kept.save_weights(self.out / BEST, self.best.weights, self.best.step)
        write_card(self.kept, self.records.table())

    def _checkpoint_bytes(self) -> int:
        """Room that a checkpoint takes beside the one it replaces."""
        parameters = sum(p.numel() for p in self.objective.parameters())
        copies = 4 + 1 + 2 * (self.config.train.keep != "last")  # weights, average, two moments; model; best, twice
        return 2 * 4 * parameters * copies

    # --- what a step is made of ---------------------------------------------------------------------------------------

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def _repeats(self, teacher: Teacher) -> bool:
        """Whether the encoder would read the same images again, and its features of all of them may be kept."""
        t, count = self.config.train, len(self.images)
        again = t.steps * t.batch > count
        return again and not self.config.data.augments and teacher.table_bytes(count) <= t.feature_cache * 2**20

    def _inputs(self, batch: Batch, rows: list[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Noised images, labels with some dropped, and the encoder's features of the clean images."""
        x, y = batch
        key = (self.step, self.accelerator.process_index)
        seed, data = self.config.train.seed, self.config.data
        if data.flip:
            mirrored = torch.rand(len(x), generator=generator(seed, FLIP, *key)) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        if data.shift:
            x = shifted(x, data.shift, data.shift_probability, generator(seed, SHIFT, *key))
        clean = x.to(self.device)
        noised = self._noised(clean, generator(seed, NOISE, *key))
        labels = None
        if self.config.flow.classes:
            dropped = torch.rand(len(y), generator=generator(seed, DROP, *key)) < self.config.train.label_drop
            labels = torch.where(dropped, -1, y).to(self.device)
        return noised, labels, None if self.teacher is None else self.teacher(clean, rows)

    def _noised(self, x: Tensor, draw: torch.Generator) -> Tensor:
        flow = self.config.flow
        return training_noise(x, flow.noise, flow.noise_std, self.images.levels, draw)


def _configure_layers(flow: TarFlow, settings: TrainConfig) -> None:
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


def _lerp(averages: list[Tensor], values: list[Tensor], updates: Tensor, limit: float) -> None:
    # AveragedModel hands over parameters by device and dtype, and counts the updates before this one
    torch._foreach_lerp_(averages, values, 1 - ema_decay(int(updates), limit))


def _check_finite(losses: Losses, step: int) -> None:
    if not math.isfinite(losses.total.item()):
        parts = [f"flow {losses.flow.item():.3g}", *(f"{tap} {value.item():.3g}" for tap, value in losses.similarity.items())]
        raise NonFiniteLoss(
            f"the loss is {losses.total.item()} at step {step} ({', '.join(parts)}): lower train.lr or train.clip"
        )
