"""`rl.train`: the training loop with the kit's own validation."""

from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Literal

from rrepa_lab.evaluation.validation import Validation
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.presets import read_config
from rrepa_lab.runs.run import Run
from rrepa_lab.runs.store import load
from rrepa_lab.training.loop import train_run
from rrepa_lab.training.reports import StepReport


def train(
    source: str | Path | RunConfig,
    out: Path | str,
    *,
    settings: Mapping[str, Any] | None = None,
    resume: bool | Literal["auto"] = False,
    init: str | Path | Run | None = None,
    device: str = "auto",
    stop: Callable[[], bool] | None = None,
) -> Generator[StepReport, None, None]:
    """Train a run, yielding a `StepReport` every `train.log_every` steps and after every checkpoint.

    Started by `accelerate launch` or `torchrun`, the same call shares each batch among all processes. Closing the
    generator, Ctrl-C, and an error that ends the training save where it stands. On a CPU a resumed run gives the same
    numbers as one that was never interrupted.

    Args:
        source: a preset's name, a config.json, or a configuration.
        out: the run directory.
        settings: dotted overrides, {"train.steps": 200}.
        resume: go on with the run in `out`, which `source` must then configure; "auto" goes on if there is one and else
            begins. A folder in which no step was taken begins anew either way. A run that is finished yields no report.
        init: begin with the weights of this run, which must have the same geometry, and a fresh optimizer; classes go by
            name, and projectors are taken over where teacher, tap and sizes agree (`runs.init`). The new run records it.
            With `resume="auto"` it is used where the run begins.
        device: "auto", "cpu", "cuda" or a numbered GPU, "cuda:1".
        stop: asked after every step; if it returns true in any process, all save, yield a last report that is not
            recorded, and end.

    Raises: LabError before anything is written if the configuration, its data or its encoder cannot be used, if another
        process trains in `out` or it cannot be written to; and when a loss is not finite: the last checkpoint then stands.

    Example:
        >>> import rrepa_lab as rl
        >>> import tempfile
        >>> settings = {"train.steps": 4, "train.batch": 16, "flow.blocks": 2, "align.blocks": [2]}
        >>> with tempfile.TemporaryDirectory() as out:
        ...     last = list(rl.train("digits-reverse", out, settings=settings))[-1]
        ...     run = rl.load(out)
        >>> last.step, run.flow.config.blocks
        (4, 2)
    """
    config = read_config(source).override(settings or {})
    source_run = init if isinstance(init, Run | None) else load(init)
    return train_run(config, Path(out), Validation, resume=resume, init=source_run, device=device, stop=stop)
