"""Training in the background of the page: one run at a time for the whole server, going on when pages are closed."""

import atexit
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Literal

from server.handlers import model_lock
from torch import Tensor

import rrepa_lab as rl
from rrepa_lab.errors import LabError

LOCK_PAUSE_SECONDS = 0.01  # seconds between two reports in which others may take the model lock
SAMPLE_EVERY_SECONDS = 5.0  # between two sets of samples
SEEDS = (0, 1)


@dataclass
class Training:
    """A run that is being trained, or was."""

    config: rl.RunConfig
    folder: Path
    device: str
    state: Literal["running", "done", "stopped", "failed"] = "running"
    report: rl.StepReport | None = None  # the last one
    message: str = ""  # why it failed
    samples: tuple[int, Tensor] | None = None  # step, and images of every class with SEEDS, (classes * seeds, C, H, W)
    stop_requested: Event = field(default_factory=Event)

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.config.name

    @property
    def step(self) -> int:
        """Steps done."""
        return self.report.step if self.report else 0


class Trainer:
    """Trains one run at a time in a thread of its own, under the model lock for one report at a time."""

    def __init__(self) -> None:
        self.training: Training | None = None  # the present one, or the last
        self._thread: Thread | None = None
        self._gate = Lock()

    @property
    def busy(self) -> bool:
        """Whether a run is being trained."""
        return self.training is not None and self.training.state == "running"

    def start(self, config: rl.RunConfig, folder: Path, device: str) -> Training:
        """Begin to train; LabError while another run is being trained."""
        with self._gate:
            now = self.training
            if now is not None and now.state == "running":
                steps = now.config.train.steps
                raise LabError(f"{now.name} is being trained (step {now.step} of {steps}): wait for its end, or stop it")
            self.training = training = Training(config, folder, device)
            self._thread = Thread(target=_run_training, args=(training,), name=f"training {config.name}", daemon=True)
            self._thread.start()
        return training

    def stop(self) -> None:
        """End after the step report that is being made, and save."""
        if self.training is not None:
            self.training.stop_requested.set()

    def wait(self, seconds: float | None = None) -> None:
        """Until the training that was begun last has ended, at most so long."""
        if self._thread is not None:
            self._thread.join(seconds)


def _run_training(training: Training) -> None:
    """Train until the end, a requested stop or an error; sets the state in every case."""
    end: Literal["done", "stopped", "failed"] = "failed"
    try:
        reports = rl.train(training.config, training.folder, device=training.device)
        try:
            end = _consume(training, reports)
        finally:
            with model_lock:
                reports.close()  # saves a run that was stopped
        with model_lock:
            _draw_samples(training)
    except LabError as error:
        end, training.message = "failed", str(error)
    except Exception as error:
        traceback.print_exc()
        end, training.message = "failed", f"{type(error).__name__}: {error}"
    finally:
        training.state = end


def _consume(training: Training, reports: Iterator[rl.StepReport]) -> Literal["done", "stopped"]:
    drawn = time.monotonic()
    while True:
        with model_lock:
            report = next(reports, None)
            if report is None:
                return "done"
            training.report = report
            if time.monotonic() - drawn > SAMPLE_EVERY_SECONDS:
                _draw_samples(training)
                drawn = time.monotonic()
        if training.stop_requested.is_set() and report.step < report.steps:
            return "stopped"
        time.sleep(LOCK_PAUSE_SECONDS)


def _draw_samples(training: Training) -> None:
    """Samples of every class from the last checkpoint, unless they are there."""
    run = rl.load(training.folder, training.device)
    if training.samples is not None and training.samples[0] == run.step:
        return
    labels = [label for _ in SEEDS for label in range(len(run.classes))]
    seeds = [seed for seed in SEEDS for _ in run.classes]
    training.samples = run.step, rl.sample(run, seeds, labels).images.cpu()


trainer = Trainer()


@atexit.register
def _save_at_exit() -> None:
    """A server that is ended with Ctrl-C saves the run it was training."""
    trainer.stop()
    trainer.wait(30)
