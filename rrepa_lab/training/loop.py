"""The training loop: a generator of reports that leaves a loadable run directory behind at any moment.

A report is recorded before the checkpoint that covers it is written, and a checkpoint is one file (`training.state`): a run
that was killed at any point resumes to the records and weights of one that was not.
"""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Literal

from rrepa_lab.data.facts import check_data
from rrepa_lab.errors import LabError
from rrepa_lab.processes import lost_process
from rrepa_lab.runs.config import RunConfig, complete
from rrepa_lab.runs.init import check_geometry
from rrepa_lab.runs.inputs import with_statistics
from rrepa_lab.runs.run import Run
from rrepa_lab.runs.store import pick_device
from rrepa_lab.training.compiling import check_compiler
from rrepa_lab.training.folder import divided, warn_of_other_images
from rrepa_lab.training.reports import StepReport, ValidatorFactory
from rrepa_lab.training.session import Session


def train_run(
    config: RunConfig,
    out: Path,
    validator: ValidatorFactory,
    *,
    resume: bool | Literal["auto"] = False,
    init: Run | None = None,
    device: str = "auto",
    stop: Callable[[], bool] | None = None,
) -> Generator[StepReport, None, None]:
    """Train the run of this configuration in `out`; see `rl.train` for what it yields, saves and raises.

    Args:
        init: the run whose weights a new training begins with.
        validator: makes the function that measures the averaged weights every `train.eval_every` steps.
    """
    # what another training began with, or was imported from, is not true of this one; a resumed one has it on file
    config = divided(complete(config), out).model_copy(update={"origin": "", "init": None})
    if init is not None:
        if resume is True:
            raise LabError("init begins a new run and resume goes on with one: give one of them")
        check_geometry(config, init)
    config = with_statistics(config)
    if init is not None:
        check_geometry(config, init)  # the space too, which is known now
    check_data(config.data)
    if resume:
        warn_of_other_images(config, out)
    if config.train.compile:
        check_compiler()
    stands = f"the last checkpoint in {out} stands, --resume goes on with it"
    with lost_process(stands), Session(config, out, resume, pick_device(device), validator, init) as session:
        yield from session.run(stop)
