"""The training loop: a generator of reports that leaves a loadable run directory behind at any moment.

A report is recorded before the checkpoint that covers it is written, and a checkpoint is one file (`training.state`): a run
that was killed at any point resumes to the records and weights of one that was not.
"""

from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Literal

from rrepa_lab.data.datasets import check_data
from rrepa_lab.errors import LabError
from rrepa_lab.presets import preset
from rrepa_lab.readers import MissingFileError, read_json, validate
from rrepa_lab.runs import LARGEST_CONFIG, RunConfig, complete, pick_device
from rrepa_lab.training.session import Session, StepReport

__all__ = ["StepReport", "config_file", "read_config", "train"]


def train(
    source: str | Path | RunConfig,
    out: Path | str,
    *,
    settings: Mapping[str, Any] | None = None,
    resume: bool | Literal["auto"] = False,
    device: str = "auto",
    stop: Callable[[], bool] | None = None,
) -> Generator[StepReport, None, None]:
    """Train a run, yielding a `StepReport` every `train.report_every` steps and after every checkpoint.

    Started by `accelerate launch` or `torchrun`, the same call shares each batch among all processes. Closing the
    generator, Ctrl-C, and an error that ends the training save where it stands. On a CPU a resumed run gives the same
    numbers as one that was never interrupted.

    Args:
        source: a preset's name, a config.json, or a configuration.
        out: the run directory.
        settings: dotted overrides, {"train.steps": 200}.
        resume: go on with the run in `out`, which `source` must then configure; "auto" goes on if there is one and else
            begins. A folder in which no step was taken begins anew either way. A run that is finished yields no report.
        device: "auto", "cpu", "cuda" or a numbered GPU, "cuda:1".
        stop: asked after every step; if it returns true in any process, all save, yield a last report that is not
            recorded, and end.

    Raises: LabError before anything is written if the configuration, its data or its encoder cannot be used, if another
        process trains in `out` or it cannot be written to; and when a loss is not finite: the last checkpoint then stands.
    """
    config = read_config(source).override(settings or {})
    return _train(config, Path(out), resume, device, stop)


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
        values = read_json(path, LARGEST_CONFIG)
    except MissingFileError:
        raise LabError(f"no configuration at {path}") from None
    return validate(RunConfig, values["config"] if "format" in values and "config" in values else values, str(path))


def _train(
    config: RunConfig, out: Path, resume: bool | str, device: str, stop: Callable[[], bool] | None
) -> Generator[StepReport, None, None]:
    config = complete(config)
    check_data(config.data)
    if config.train.compile:
        _check_compiler()
    with Session(config, out, resume, pick_device(device)) as session:
        yield from session.run(stop)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise LabError("train.compile needs a C++ compiler, and none was found: install g++, or leave it off") from error
