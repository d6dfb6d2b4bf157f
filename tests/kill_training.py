"""Trainings that are killed with SIGKILL at a chosen place, and what becomes of them: used by test_kills.py, or by itself.

    python tests/kill_training.py FOLDER --kills 200

A process that has imported everything forks a child for each training. A child kills itself at the n-th operation on the
run directory (before or after a rename, in the middle of a write), or is killed from outside after some milliseconds. The
training is then started again, by the same command with --resume or without it, until its end. It is compared with one that
was never interrupted: weights bit for bit, and every line of metrics.jsonl but for the seconds.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

import rrepa_lab as rl
from rrepa_lab.runs.records import Records

Resume = bool | Literal["auto"]
STEPS = 6
SECONDS = 30  # that one training may take


def configuration() -> rl.RunConfig:
    """A run of a few milliseconds a step that uses everything a checkpoint holds."""
    return rl.preset("digits-reverse").override({
        "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 1, "align.blocks": [2], "align.layers": [1],
        "align.projector_width": 8, "train.steps": STEPS, "train.batch": 16, "train.log_every": 2, "train.eval_every": 2,
        "train.save_every": 2, "train.keep": "nats_per_dim", "data.holdout": 0.2,
    })  # fmt: skip


def in_child(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Run `work` in a forked process; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    end = time.monotonic() + SECONDS
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(done[1])


@contextlib.contextmanager
def operations(fatal: int | None = None) -> Iterator[list[int]]:
    """Count the operations on files, and die at the one with this number."""
    count = [0]

    def tick() -> None:
        count[0] += 1
        if count[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    replace, append = os.replace, Records.append

    def counted_replace(source: Path, target: Path) -> None:
        tick()  # written, and not yet in its place
        replace(source, target)
        tick()

    def counted_append(self: Records, row: dict[str, object]) -> None:
        line = json.dumps(row) + "\n"
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line[: len(line) // 2])
            stream.flush()
            tick()  # half of the line is there
            stream.write(line[len(line) // 2 :])
        tick()

    os.replace, Records.append = counted_replace, counted_append  # type: ignore[assignment]
    try:
        yield count
    finally:
        os.replace, Records.append = replace, append  # type: ignore[method-assign]


def train(out: Path, resume: Resume = "auto", operation: int | None = None) -> int:
    """Train to the end, unless the process dies at its n-th operation; the number of operations."""
    with operations(operation) as count:
        for _ in rl.train(configuration(), out, resume=resume, device="cpu"):
            pass
    return count[0]


def problem(out: Path, reference: Path) -> str:
    """What distinguishes a finished training from one that was never interrupted; "" if nothing does."""
    for name in ("model.safetensors", "best.safetensors"):
        found, wanted = load_file(out / name), load_file(reference / name)
        if found.keys() != wanted.keys() or not all(torch.equal(found[key], wanted[key]) for key in wanted):
            return f"{name} differs"
    if _rows(out) != _rows(reference):
        return f"records differ: {_rows(out)} instead of {_rows(reference)}"
    left = [path.name for path in out.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    return f"left behind: {left}" if left else ""


def _rows(out: Path) -> list[dict[str, object]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "remaining", "data_wait")} for line in lines]


def survive(out: Path, reference: Path, resume: Resume, operation: int | None, delay: float | None) -> str:
    """Kill a training, start it again, and compare; "" if it ended as one that was never interrupted."""
    status = in_child(lambda: train(out, "auto", operation), delay)
    if status not in (0, -signal.SIGKILL):
        return f"the first training ended with {status}"
    if (out / "model.safetensors").exists():
        try:
            rl.load(out)
        except rl.LabError as error:
            return f"not loadable after the kill: {error}"
    begun = (out / "train_state.pt").exists()
    if in_child(lambda: train(out, resume if begun else "auto")) != 0:
        return "cannot go on"
    return problem(out, reference)


def kills(folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """So many kills: at every operation in turn, and at random times; outcome -> number, "" for survived."""
    folder.mkdir(parents=True, exist_ok=True)
    reference = folder / "reference"
    torch.set_num_threads(1)
    train(folder / "first")  # imports what is imported late, so that no child has to
    began = time.monotonic()
    places = train(reference)
    seconds = time.monotonic() - began
    draw, found = random.Random(seed), Counter[str]()
    for number in range(count):
        out = folder / f"run-{number}"
        at_operation = number % 2 == 0
        operation = 1 + (number // 2) % places if at_operation else None
        delay = None if at_operation else draw.uniform(0, seconds)
        resume: Resume = True if number % 4 < 2 else "auto"
        outcome = survive(out, reference, resume, operation, delay)
        found[outcome] += 1
        if outcome:
            print(f"{out.name} (operation {operation}, after {delay} s, resume {resume}): {outcome}", file=sys.stderr)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    given = parser.parse_args()
    outcomes = kills(given.folder, given.kills)
    print(json.dumps({"kills": given.kills, "survived": outcomes.pop("", 0), "problems": dict(outcomes)}))
    sys.exit(1 if outcomes else 0)
