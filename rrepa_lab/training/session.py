"""The state of one training, its steps, and the run directory it writes."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from torch import Tensor

from rrepa_lab.align.schedule import Schedule
from rrepa_lab.align.target import Targets, grid_hint
from rrepa_lab.data.decoded import prepare
from rrepa_lab.data.images import Batch
from rrepa_lab.data.loaders import SeededBatches, stream
from rrepa_lab.data.originals import originals_of
from rrepa_lab.data.splits import read_split, splits
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.flow.likelihood import HALF_LOG_2PI
from rrepa_lab.hardware import hardware_words
from rrepa_lab.runs.card import write_card
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.init import start_from
from rrepa_lab.runs.names import BEST
from rrepa_lab.runs.records import Records
from rrepa_lab.runs.run import Run, build
from rrepa_lab.training import folder
from rrepa_lab.training.clock import StepClock
from rrepa_lab.training.compiling import allow_multiple_backward
from rrepa_lab.training.inputs import StepInputs
from rrepa_lab.training.objective import Losses
from rrepa_lab.training.precision import resolve_precision
from rrepa_lab.training.processes import accelerator_on, any_process, main_decides
from rrepa_lab.training.reports import NonFiniteLoss, StepReport, ValidatorFactory
from rrepa_lab.training.schedule import learning_rate
from rrepa_lab.training.state import NAME as STATE
from rrepa_lab.training.state import Best, Checkpoint
from rrepa_lab.training.weights import Weights

LOSS, NATS, NORM = "loss", "nats", "grad_norm"  # names of what a step measures, beside those of the aligned taps
Measured = dict[str, Tensor]  # name -> (), of a step
PRIOR_RATE = 0.1  # of the running mean of z^2 of a volume-preserving flow, as in the public code


class Session:
    """One training: weights, their average, the optimizer, the steps, and the run directory.

    `config` is one that `runs.config.complete` gives: its classes are those of the data.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        resume: bool | str,
        device: torch.device,
        validator: ValidatorFactory,
        init: Run | None = None,
    ) -> None:
        self.config, self.out = config, out
        self.images = read_split(config.data, "train")
        classes = self.images.classes
        self.accelerator = accelerator_on(device)
        self.device: torch.device = self.accelerator.device
        self.batch_size = size = min(config.train.batch, len(self.images))
        processes = self.accelerator.num_processes
        self.steps_per_epoch = len(self.images) // size
        if size < processes:
            what = f"train.batch {config.train.batch}" if size == config.train.batch else f"a training split of {size} images"
            raise LabError(f"{what} cannot be shared among {processes} processes: each needs an image of every batch")
        # what cannot begin is found out before anything is written
        folder.resumes(config, classes, out, resume)
        main_decides(self.accelerator, lambda: prepare(self.images) and None)
        prepare(self.images)  # of other processes: there by now, except on another machine
        self.validation = validator(config, self.images, self.device)
        run = build(config, classes)
        if init is not None:
            start_from(run, init)
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
        # whose weights it began with: known now, or when it was begun
        record = RunConfig.from_dict(state.config, stored=True).init if state and state.config else run.config.init
        self.config = config = self.config.model_copy(update={"init": record})
        t = config.train
        self.step, self.learning_rate, self.step_complete = state.step if state else 0, 0.0, True
        self.rows = list(state.rows) if state else []
        if state and not state.config:  # of version 0.1, whose records were a file of their own
            self.rows = [row for row in Records(self.out).rows() if row["step"] <= state.step]
        self.best = state.best if state else None
        self.ended = bool(state and state.ended)
        self.pending: list[Measured] = _as_tensors(state.pending) if state else []
        rows = min(t.batch, len(self.images)) * config.flow.tokens
        self.precision = state.precision if state else main_decides(
            self.accelerator, lambda: resolve_precision(t.precision, self.device, rows, config.flow.width)
        )  # fmt: skip
        self.weights = Weights(run, self.accelerator, state)
        self.schedule = Schedule.parse(config.align.schedule)
        targets = self._targets(run) if config.align.taps else None
        self.inputs = StepInputs(config, run.space, targets, self.device)
        others = [split for split in splits(config.data) if split != "train"]
        run.fingerprints = {"train": self.images.fingerprint} | {
            split: read_split(config.data, split, run.classes).fingerprint for split in others
        }
        self.records = Records(self.out)
        main_decides(self.accelerator, lambda: folder.check_space(self.out, self._checkpoint_bytes()))
        if state is None:
            self.checkpoint()
        else:
            self.publish(self.averaged())
        with self._autocast():
            self.floors = {} if self._finished else self.inputs.precompute(self.images, self._workers)

    def _targets(self, run: Run) -> Targets:
        """The targets of the training; a self-teacher is the average of the weights as it stands at each step."""
        for teacher in run.encoders() if self.config.teachers else ():
            if hint := grid_hint(teacher, self.config.flow.side):
                warnings.warn(hint, LabWarning, stacklevel=4)
        return run.targets(originals_of(self.config.data, "train", self.images), self.weights.averaged_flow)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.lock.release()

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self, stop: Callable[[], bool] | None) -> Generator[StepReport, None, None]:
        """Train to the end; see `train`."""
        t, began, first = self.config.train, time.perf_counter(), self.step
        clock = StepClock()
        hardware = hardware_words(self.device, self.accelerator.num_processes)

        def report() -> StepReport:
            mean = {name: float(values.mean(dim=0)) for name, values in self._over_processes(self.pending).items()}
            seconds, wait = time.perf_counter() - began, clock.share()
            return StepReport(
                step=self.step,
                steps=t.steps,
                loss=mean[LOSS],
                nats_per_dim=mean[NATS] + HALF_LOG_2PI,
                similarity={name: value for name, value in mean.items() if name not in (LOSS, NATS, NORM)},
                learning_rate=self.learning_rate,
                grad_norm=mean[NORM],
                seconds=seconds,
                remaining=seconds / (self.step - first) * (t.steps - self.step),
                precision=self.precision,
                hardware=hardware,
                floors=self.floors,
                alignment_weight=self._factor(self.step - 1) * self.config.align.weight,
                data_wait=wait,
            )

        try:
            for rows, batch in clock.timed(self._batches()):
                self.pending.append(self.advance(batch, rows))
                clock.end()
                last = self.step == t.steps
                saves = last or self.step % t.save_every == 0
                if saves or self.step % t.log_every == 0:
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

    @property
    def _finished(self) -> bool:
        return self.ended or self.step >= self.config.train.steps

    def _batches(self) -> Iterator[tuple[list[int], Batch]]:
        """The batches that are still to come, this process's part of each, with their rows of the split."""
        if self.ended:
            return
        t, a = self.config.train, self.accelerator
        rows = SeededBatches(len(self.images), t.batch, t.seed, self.step, t.steps, a.process_index, a.num_processes)
        if self.inputs.needs_pictures:
            yield from zip(rows, stream(self.images, rows, self._workers), strict=True)
        else:
            yield from ((batch, Batch(torch.empty(len(batch), 0), self.images.labels[batch])) for batch in rows)

    @property
    def _workers(self) -> int:
        return self.config.train.worker_count

    def _factor(self, step: int) -> float:
        """The factor of lambda at a step, from 0; 0 without alignment."""
        return self.schedule.factor(step, self.config.train.steps) if self.config.align.taps else 0.0

    def advance(self, batch: Batch, rows: list[int]) -> Measured:
        """One optimizer step on these rows of the split; returns loss, L_nf, gradient norm and similarities, detached.

        Losses and gradients are means over the images of all processes, whatever part of them this one has.
        """
        t, epoch = self.config.train, self.step // self.steps_per_epoch
        self.learning_rate = learning_rate(self.step, t.steps, t.lr, t.warmup, t.min_lr_ratio)
        for group in self.weights.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.weights.optimizer.zero_grad()
        measured, squares = dict[str, list[Tensor]](), list[Tensor]()
        factor = self._factor(self.step)
        parts = [part.tolist() for part in torch.arange(len(rows)).chunk(t.accumulate)]
        for number, part in enumerate(parts, start=1):
            share = len(part) * self.accelerator.num_processes / self.batch_size
            with allow_multiple_backward() if t.compile else nullcontext(), self.weights.exchange(number == len(parts)):
                with self._autocast():
                    some = Batch(batch.x[part], batch.y[part])
                    inputs = self.inputs(some, [rows[i] for i in part], epoch, aligned=factor > 0)
                    losses: Losses = self.weights.wrapped(*inputs, factor)
                _check_finite(losses, self.step + 1)
                self.accelerator.backward(losses.total * share)
            for name, value in {LOSS: losses.total, NATS: losses.flow, **losses.similarity}.items():
                measured.setdefault(name, []).append(value.detach().float() * share)
            squares += [] if losses.z_square is None else [losses.z_square * share]
        norm = self.weights.clip(t.grad_clip_norm)
        self.step_complete = False
        self.weights.optimizer.step()
        if squares:
            self._update_prior(torch.stack(squares).sum(dim=0))
        self.weights.average.update_parameters(self.weights.objective)
        self.step += 1
        self.step_complete = True
        return {NORM: norm.detach()} | {name: torch.stack(values).sum(dim=0) for name, values in measured.items()}

    @torch.no_grad()
    def _update_prior(self, square: Tensor) -> None:
        """The variance of the prior follows the mean of z^2, its maximum-likelihood value, over the last batches."""
        variance = self.weights.objective.flow.prior_var
        assert variance is not None
        variance.lerp_(self.accelerator.reduce(square.to(variance), "mean"), 1 if self.step == 0 else PRIOR_RATE)

    def _over_processes(self, rows: list[Measured]) -> dict[str, Tensor]:
        """Means over all processes of the measurements of steps, by name (S, 1), of the steps that have one."""
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: torch.stack([row[name].to(self.device) for row in rows if name in row]) for name in names}
        return {name: cast(Tensor, self.accelerator.reduce(values, "mean"))[:, None] for name, values in columns.items()}

    # --- validation ---------------------------------------------------------------------------------------------------

    def _validation_is_due(self) -> bool:
        """At the first report at or after each multiple of `eval_every`."""
        every = self.config.train.eval_every
        last = max((row["step"] for row in self.rows if row.get("held_out_nats_per_dim") is not None), default=0)
        return self.step // every > last // every

    def validate(self) -> dict[str, float]:
        """The averaged weights on validation and training images; keeps the weights if they are the best so far."""
        run = self.averaged()
        found = self.validation(run)
        t = self.config.train
        if t.keep == "last":
            return found
        value, lower = found[f"held_out_{t.keep}"], t.keep == "nats_per_dim"
        if math.isnan(value):  # of weights that have diverged: worse than any number
            value = math.inf if lower else -math.inf
        if self.best is None or (value < self.best.value if lower else value > self.best.value):
            self.best = Best(self.step, value, {k: v.detach().cpu().clone() for k, v in run.weights().items()})
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

    def averaged(self) -> Run:
        """The averaged weights, as the run of this directory; see `Weights.averaged`."""
        run = self.weights.averaged()
        run.config, run.step, run.directory = self.config, self.step, self.out
        return run

    def checkpoint(self) -> None:
        """Save, unless an interrupt has left the weights between two steps: then the last checkpoint stands.

        All processes must call this where there are several.
        """
        if not self.step_complete:
            return
        self._save(self.weights.state_dicts(), self.averaged(), self._shared_rows())

    def _save_at_end(self) -> None:
        """Save what was done when an error ends the training; that error is the one to report.

        The other processes may be gone: what takes all of them is left out, and where the weights are sharded, or the save
        fails too, the last checkpoint stands.
        """
        if self.step_complete and not self.weights.sharded:
            with contextlib.suppress(LabError):
                self._save(self.weights.state_dicts(), self.averaged(), self.pending)

    def _shared_rows(self) -> list[Measured]:
        """The measurements since the last report, each a mean over all processes."""
        columns = {name: iter(values[:, 0]) for name, values in self._over_processes(self.pending).items()}
        return [{name: next(columns[name]) for name in row} for row in self.pending]

    def _save(self, states: dict[str, dict[str, Any]], run: Run, pending: list[Measured]) -> None:
        if not self.accelerator.is_main_process:
            return
        Checkpoint(
            step=self.step,
            config=self.config.to_dict(),
            classes=run.classes,
            precision=self.precision,
            rows=self.rows,
            pending=[{name: float(value) for name, value in row.items()} for row in pending],
            best=self.best,
            ended=self.ended,
            **states,
        ).save(self.out / STATE)
        self.publish(run)

    def publish(self, run: Run) -> None:
        """Write the files that others read from the present state, which the checkpoint holds."""
        if not self.accelerator.is_main_process:
            return
        run.save(self.out)
        self.records.rewrite(self.rows)
        if self.best is not None:
            run.save_weights(self.out / BEST, self.best.weights, self.best.step)
        write_card(run, self.records.table())

    def _checkpoint_bytes(self) -> int:
        """Room that a checkpoint takes beside the one it replaces."""
        parameters = sum(p.numel() for p in self.weights.objective.parameters())
        copies = 4 + 1 + 2 * (self.config.train.keep != "last")  # weights, average, two moments; model; best, twice
        return 2 * 4 * parameters * copies

    # --- what a step is made of ---------------------------------------------------------------------------------------

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def _as_tensors(rows: list[dict[str, float]]) -> list[Measured]:
    return [{name: torch.tensor(value) for name, value in row.items()} for row in rows]


def _check_finite(losses: Losses, step: int) -> None:
    if not math.isfinite(losses.total.item()):
        parts = [f"flow {losses.flow.item():.3g}", *(f"{tap} {value.item():.3g}" for tap, value in losses.similarity.items())]
        raise NonFiniteLoss(
            f"the loss is {losses.total.item()} at step {step} ({', '.join(parts)}): lower train.lr or train.grad_clip_norm"
        )
