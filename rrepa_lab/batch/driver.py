"""A batch: every cell of a grid through joblib, on this machine or a Dask cluster, resumed where it was cut off."""

import math
import os
import time
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rrepa_lab import __version__
from rrepa_lab.batch.cell import Failure, Outcome, Record, Task, finished, read_record, run_cell, write_record
from rrepa_lab.batch.notebook import Notebook
from rrepa_lab.batch.study import Study, cells
from rrepa_lab.errors import LabError

PATIENCE = 3  # times that workers may be killed without a cell at work
ANSWER_WITHIN = 10  # seconds that a cluster has to answer


@dataclass(frozen=True)
class CellReport:
    """A cell of the grid that has ended."""

    name: str
    state: str  # "done", "failed", "skipped": it was done before in this folder, or "measured": the study's table holds it
    folder: Path
    seconds: float  # its own, when it ran
    ended: int  # cells that have ended so far, this one included
    cells: int  # of the grid
    remaining: float  # seconds, at the pace so far
    failure: Failure | None = None


def plan(study: Study, notebook: Notebook, out: Path | str, threads: int = 1) -> list[Task]:
    """The tasks of a batch, in order; nothing is written.

    Raises: LabError for a grid that does not fit the notebook's parameters.
    """
    path, out = notebook.path.resolve(), Path(out).resolve()
    return [Task(path, cell, out, Path.cwd(), threads, study.timeout) for cell in cells(study, notebook)]


def run_batch(
    study: Study,
    notebook: Notebook,
    out: Path | str,
    *,
    jobs: int | None = None,
    threads: int | None = None,
    scheduler: str | None = None,
    measured: Collection[str] = (),
) -> Generator[CellReport, None, None]:
    """Execute the notebook for every cell of the grid, yielding a report as each ends; cells done before come first.

    Args:
        out: folder of the batch; the same call goes on with what is missing there.
        jobs: notebooks at a time on this machine; by default one for each core.
        threads: of each notebook; by default the cores are shared among the jobs.
        scheduler: address of a Dask scheduler ("tcp://host:8786") whose workers take the jobs instead; they must see
            `out` under the same path.
        measured: identities of cells that are not run, since the study's table holds them (`batch.measured`).

    Raises: LabError before anything runs, for a grid that does not fit, a folder that cannot be written or in which
        another batch is at work, or a cluster that does not answer.
    """
    from joblib import cpu_count

    if jobs is not None and (jobs == 0 or jobs < -1):
        raise LabError(f"--jobs takes how many notebooks run at a time, or -1 for one on each core, not {jobs}")
    jobs = cpu_count() if jobs is None or jobs == -1 else jobs
    tasks = plan(study, notebook, out, threads or max(1, cpu_count() // jobs))
    root = Path(out).resolve()
    with _held(root), _backend(scheduler, root, threads) as (backend, shared):
        tasks = [task._replace(threads=shared) if shared else task._replace(driver=os.getpid()) for task in tasks]
        before = [task for task in tasks if task.cell.identity in measured]
        for place, task in enumerate(before, start=1):
            yield CellReport(task.cell.name, "measured", task.folder, 0.0, place, len(tasks), math.nan)
        known = [(task, finished(task)) for task in tasks if task.cell.identity not in measured]
        done = [Outcome(task, record, skipped=True) for task, record in known if record]
        missing = [task for task, record in known if not record]
        began, first = time.monotonic(), len(done)
        for ended, outcome in enumerate(chain(done, _outcomes(missing, jobs, backend)), start=1):
            pace = (time.monotonic() - began) / max(1, ended - first)
            record = outcome.record
            yield CellReport(
                name=outcome.task.cell.name,
                state="skipped" if outcome.skipped else record.state,
                folder=outcome.task.folder,
                seconds=record.seconds,
                ended=len(before) + ended,
                cells=len(tasks),
                remaining=pace * (len(known) - ended),
                failure=record.failure,
            )


def _outcomes(tasks: list[Task], jobs: int, backend: dict[str, Any]) -> Iterator[Outcome]:
    """Outcomes as they come.

    When a worker is killed (by hand, or for its memory), joblib ends all of them. Each cell that was at work is then tried
    again alone: one that takes its worker down once more is given up, and the others go on.
    """
    broken = 0
    while tasks:
        ended: set[str] = set()
        try:
            for outcome in _parallel(tasks, jobs, backend):
                ended.add(outcome.task.cell.key)
                yield outcome
        except _WorkerKilled:
            at_work = [task for task in tasks if task.cell.key not in ended and _is_running(task)]
            broken = 0 if at_work else broken + 1
            if broken == PATIENCE:
                raise LabError("the workers are killed before a cell begins: fewer --jobs, or more memory?") from None
            for task in at_work:
                ended.add(task.cell.key)
                try:
                    yield from _parallel([task], 1, backend)
                except _WorkerKilled:
                    yield _given_up(task)
        tasks = [task for task in tasks if task.cell.key not in ended]


class _WorkerKilled(Exception):
    """A worker process has gone, and joblib with it."""


def _parallel(tasks: list[Task], jobs: int, backend: dict[str, Any]) -> Iterator[Outcome]:
    from joblib import Parallel, delayed, parallel_config

    # joblib runs a single job in this very process; the driver is to survive it, so there are two workers, one of them idle
    local = {"n_jobs": max(2, jobs), "pre_dispatch": jobs} if backend["backend"] == "loky" else {}
    with parallel_config(**backend):
        work = Parallel(batch_size=1, return_as="generator_unordered", **local)
        try:
            for outcome in work(delayed(run_cell)(task) for task in tasks):
                # one that is found done has ended in this batch, just as its worker was killed beside another
                yield outcome._replace(skipped=False)
        except Exception as error:
            if type(error).__name__ in ("TerminatedWorkerError", "BrokenProcessPool", "KilledWorker"):
                raise _WorkerKilled from error
            if isinstance(error, OSError):
                raise LabError(f"{error}: what is done is kept, and the same command goes on") from error
            raise


def _is_running(task: Task) -> bool:
    record = read_record(task.folder)
    return record is not None and record.state == "running" and record.key == task.cell.key


def _given_up(task: Task) -> Outcome:
    failure = Failure(kind="Killed", message="its process was killed twice, the second time alone; was there enough memory?")
    parameters = task.cell.parameters
    record = Record(state="failed", key=task.cell.key, notebook=task.notebook.stem, parameters=parameters, failure=failure)
    write_record(task.folder, record)
    return Outcome(task, record)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The folder, for this batch alone."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".batch.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise LabError(f"another batch is at work in {out}: wait for it, or choose another --out") from None
    except OSError as error:
        raise LabError(f"cannot write to {out} ({error.strerror}): choose another --out") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _backend(scheduler: str | None, out: Path, threads: int | None) -> Iterator[tuple[dict[str, Any], int]]:
    """joblib's backend as keywords, and the threads of a job where the cluster decides them (0: it does not)."""
    if scheduler is None:
        yield {"backend": "loky"}, 0
        return
    try:
        from distributed import Client
    except ImportError:
        raise LabError('a Dask cluster needs dask: pip install "rrepa-lab[cluster]"') from None
    try:
        client = Client(scheduler, timeout=ANSWER_WITHIN, set_as_default=False)
    except Exception as error:
        raise LabError(f"no Dask scheduler answers at {scheduler} ({type(error).__name__}): is it running there?") from None
    try:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            raise LabError(f"the Dask cluster at {scheduler} has no workers: start some, dask worker {scheduler}")
        shared = threads or _fair_share(workers, client.run(_worker, str(out)), out)
        yield {"backend": "dask", "client": client}, shared
    finally:
        client.close()


def _worker(out: str) -> tuple[str, int, bool]:
    """Run on a Dask worker: its rrepa_lab, its cores, and whether it sees the folder."""
    return __version__, os.cpu_count() or 1, os.path.isdir(out)


def _fair_share(workers: dict[str, Any], known: dict[str, tuple[str, int, bool]], out: Path) -> int:
    """Threads of a job, such that those of one machine do not fight for its cores; LabError for a worker that cannot help."""
    jobs: dict[str, int] = {}
    for address, (version, _, sees) in known.items():
        if version != __version__:
            raise LabError(f"Dask worker {address} has rrepa_lab {version}, this is {__version__}: install the same")
        if not sees:
            raise LabError(f"Dask worker {address} does not see {out}: put it on a file system that all of them share")
        host = workers[address]["host"]
        jobs[host] = jobs.get(host, 0) + workers[address]["nthreads"]
    return min(max(1, cores // jobs[workers[address]["host"]]) for address, (_, cores, _) in known.items())
