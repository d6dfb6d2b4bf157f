"""One cell of a grid: a notebook executed with its parameters, in a folder of its own.

    notebook.ipynb   as executed
    result.json      what the notebook found
    kernel.log       what its kernel wrote to stdout and stderr outside of any cell
    cell.json        the record: state, key, parameters, seconds, and what went wrong

A cell counts as done when its record says so under the same key and its result is the one recorded. The record is written
last, so a cell that was cut off is run again, and trainings inside it go on from their checkpoint.
"""

import json
import os
import tempfile
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from filelock import FileLock

from rrepa_lab import __version__
from rrepa_lab.batch.notebook import OUT_DIR, open_notebook
from rrepa_lab.batch.study import GridCell
from rrepa_lab.config import Config
from rrepa_lab.errors import LabError
from rrepa_lab.files import sha256, write_text
from rrepa_lab.measurements.results import NAME as RESULT
from rrepa_lab.measurements.results import read_result
from rrepa_lab.readers import MIB, read_json, validate

RECORD, EXECUTED, LOG = "cell.json", "notebook.ipynb", "kernel.log"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS")


class Failure(Config):
    """Why a cell of the grid has no result."""

    kind: str  # "LabError", "TimeoutError"
    message: str
    source: str = ""  # of the notebook's cell that failed
    traceback: str = ""


class Record(Config):
    """cell.json."""

    state: Literal["running", "done", "failed"]
    key: str
    notebook: str
    parameters: dict[str, Any]
    version: str = __version__
    seconds: float = 0.0
    result_sha256: str = ""
    failure: Failure | None = None


class Task(NamedTuple):
    """All that a worker needs, on this machine or another."""

    notebook: Path
    cell: GridCell
    out: Path  # of the batch
    here: Path  # where it was started: what relative paths among the parameters start from
    threads: int
    timeout: float | None
    driver: int = 0  # process that a worker on the same machine belongs to; 0 on a cluster

    @property
    def folder(self) -> Path:
        """Where this cell is kept."""
        return self.out / "cells" / self.cell.folder


class Outcome(NamedTuple):
    """How a task ended."""

    task: Task
    record: Record
    skipped: bool = False  # it was done before


def read_record(folder: Path) -> Record | None:
    """The record of a cell's folder; None if there is none, or it is damaged."""
    try:
        path = folder / RECORD
        return validate(Record, read_json(path, MIB), str(path), stored=True)
    except LabError:
        return None


def finished(task: Task) -> Record | None:
    """The record of a task that needs no second run."""
    record, result = read_record(task.folder), task.folder / RESULT
    if record is None or record.state != "done" or record.key != task.cell.key:
        return None
    return record if result.is_file() and sha256(result) == record.result_sha256 else None


def run_cell(task: Task) -> Outcome:
    """Execute a task, unless it is done; a failure is an outcome, too.

    A lock keeps the folder to one worker: one of a cluster may outlive its killed driver and still be at it.
    """
    _end_with(task.driver)
    folder = task.folder
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if record := finished(task):
            return Outcome(task, record, skipped=True)
        record = Record(state="running", key=task.cell.key, notebook=task.notebook.stem, parameters=task.cell.parameters)
        write_record(folder, record)
        (folder / RESULT).unlink(missing_ok=True)
        began = time.monotonic()
        failure = _execute(task, began)
        seconds = time.monotonic() - began
        if failure:
            record = record.model_copy(update={"state": "failed", "seconds": seconds, "failure": failure})
        else:
            done = {"state": "done", "seconds": seconds, "result_sha256": sha256(folder / RESULT)}
            record = record.model_copy(update=done)
        write_record(folder, record)
        return Outcome(task, record)


@cache
def _end_with(driver: int) -> None:
    """In a worker process of `driver`: end when it does, and the kernel with it, rather than go on unseen."""

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(1)

    if not driver:
        return
    if os.getppid() != driver:  # it was killed before this process had begun
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def write_record(folder: Path, record: Record) -> None:
    """Replace cell.json."""
    write_text(folder / RECORD, json.dumps(record.to_dict(), indent=1) + "\n")


def _execute(task: Task, began: float) -> Failure | None:
    """Run the notebook; None if it ended well and left a result."""
    import papermill
    from nbclient.exceptions import CellTimeoutError
    from papermill.exceptions import PapermillExecutionError

    executed = task.folder / EXECUTED
    options: dict[str, Any] = {}
    if task.timeout is not None:
        until = began + task.timeout
        options["timeout_func"] = lambda _cell: max(1, round(until - time.monotonic()))
    try:
        papermill.execute_notebook(
            open_notebook(task.notebook),
            str(executed).replace("{", "{{").replace("}", "}}"),  # papermill fills in parameters between braces
            task.cell.parameters | {OUT_DIR: str(task.folder.resolve())},
            progress_bar=False,
            store_widget_state=False,
            kernel_manager_class=_kernel_manager(task),
            **options,
        )
        read_result(task.folder / RESULT)
    except PapermillExecutionError as error:
        return Failure(kind=error.ename, message=error.evalue, source=error.source, traceback="\n".join(error.traceback))
    except CellTimeoutError:
        message = f"not finished after {task.timeout:g} s"
        return Failure(kind="TimeoutError", message=message, source=_last_source(executed))
    except LabError as error:
        return Failure(kind="LabError", message=f"the notebook ended without a result: {error}")
    except Exception as error:
        return Failure(
            kind=type(error).__name__, message=str(error), source=_last_source(executed), traceback=traceback.format_exc()
        )
    return None


def _kernel_manager(task: Task) -> type:
    """Kernels that start where the batch did, keep to their threads, show no widgets and write what they mutter to a file."""
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import Unicode, default

    env = dict.fromkeys(_THREADS, str(task.threads)) | {"RREPA_WIDGETS": "off"}

    class Manager(AsyncKernelManager):
        transport = Unicode("tcp" if os.name == "nt" else "ipc")  # files of this user, not ports that others could take or read

        @default("ip")
        def _ip_default(self) -> str:
            return str(Path(tempfile.gettempdir(), f"rrepa-{uuid4().hex[:12]}")) if self.transport == "ipc" else "127.0.0.1"

        async def _async_start_kernel(self, **options: Any) -> None:
            with (task.folder / LOG).open("wb") as log:
                given = {"env": os.environ | env, "cwd": str(task.here), "stdout": log, "stderr": log}
                await super()._async_start_kernel(**(options | given))

        start_kernel = _async_start_kernel

    return Manager


def _last_source(executed: Path) -> str:
    """Source of the cell that was running when the notebook was last saved."""
    try:
        cells = open_notebook(executed).cells
    except LabError:
        return ""
    begun = [cell for cell in cells if cell.metadata.get("papermill", {}).get("status") not in (None, "pending")]
    return str(begun[-1].source) if begun else ""
