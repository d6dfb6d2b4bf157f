"""Trainings that are killed, run out of space, or meet another one in their folder."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.cli.train import stop_on_interrupt
from rrepa_lab.errors import LabError
from rrepa_lab.runs.records import Records

HARNESS = Path(__file__).with_name("kill_training.py")


def count_kills(folder: Path, count: int, seconds: float) -> None:
    words = [sys.executable, str(HARNESS), str(folder), "--kills", str(count)]
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, timeout=seconds, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    print(done.stdout)
    assert json.loads(done.stdout) == {"kills": count, "survived": count, "problems": {}}, done.stderr


def test_a_killed_training_goes_on_to_the_same_end(tmp_path):
    count_kills(tmp_path, 8, 240)


@pytest.mark.faults
def test_two_hundred_kills(tmp_path):
    count_kills(tmp_path, 200, 1200)


@contextlib.contextmanager
def small_disk(folder: Path, size: str, *options: str):
    """A file system of its own at this folder; skipped where that needs rights this process lacks."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:  # lazily: the traceback of an expected error may still hold the lock file
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_too_little_space_is_found_before_the_first_step(tiny, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "200k") as disk, pytest.raises(LabError, match=r"checkpoints need \d+ MiB"):
        next(rl.train(tiny, disk / "run", device="cpu"))


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on(tiny, tmp_path, room):
    with small_disk(tmp_path / "disk", "16m") as disk:
        filler = disk / "filler"
        reports = rl.train(tiny, disk / "run", device="cpu")
        steps = [next(reports).step for _ in range(1 + room)]
        with contextlib.suppress(OSError), filler.open("wb") as stream:
            while True:
                stream.write(bytes(4096))
        with pytest.raises(LabError, match=r"cannot be written.*(No space left|disk full)") as caught:
            list(reports)
        assert "\n" not in str(caught.value)
        filler.unlink()
        assert rl.load(disk / "run").step <= max(steps) + 4
        rest = list(rl.train(tiny, disk / "run", resume=True, device="cpu"))
        assert rest[-1].step == tiny.train.steps
        assert Records(disk / "run").table().step.tolist() == [2, 4, 6, 8, 10, 12]
        assert not list((disk / "run").glob(".*.tmp"))


def test_files_that_may_not_grow_stop_the_first_checkpoint_and_the_next_start_begins(tiny, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        with pytest.raises(LabError, match="cannot be written"):
            list(rl.train(tiny, tmp_path / "run", device="cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    for resume in (False, True, "auto"):
        out = tmp_path / f"run-{resume}"
        (tmp_path / "run").rename(out)
        reports = rl.train(tiny, out, resume=resume, device="cpu")
        assert next(reports).step == 2
        reports.close()
        out.rename(tmp_path / "run")
        for path in (tmp_path / "run").glob("[!.]*"):  # as the full disk left it
            path.unlink()


def test_a_folder_that_cannot_be_written_to_is_one_line(tiny, tmp_path):
    with (
        small_disk(tmp_path / "disk", "1m", "ro") as disk,
        pytest.raises(LabError, match="cannot be written to: Read-only file system"),
    ):
        next(rl.train(tiny, disk / "run", device="cpu"))
    with pytest.raises(LabError, match="cannot be written to"):
        next(rl.train(tiny, "/proc/run", device="cpu"))
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match=r"is a file: choose another"):
        next(rl.train(tiny, tmp_path / "file", device="cpu"))


def test_one_training_at_a_time_in_a_folder(tiny, tmp_path):
    first = rl.train(tiny, tmp_path / "run", device="cpu")
    next(first)
    for resume in (True, "auto"):
        with pytest.raises(LabError, match="is being trained by another process"):
            next(rl.train(tiny, tmp_path / "run", resume=resume, device="cpu"))
    words = ["train", "digits-none", "--out", str(tmp_path / "run"), "--device", "cpu", "--resume"]
    other = subprocess.run([sys.executable, "-m", "rrepa_lab.cli", *words], check=False, capture_output=True, text=True)
    assert other.returncode == 2
    first.close()
    assert list(rl.train(tiny, tmp_path / "run", resume=True, device="cpu"))[-1].step == 12


def test_leftovers_of_a_killed_training_are_cleared_and_those_of_a_living_one_are_not(tiny, tmp_path):
    out = tmp_path / "run"
    reports = rl.train(tiny, out, device="cpu")
    next(reports)
    reports.close()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (out / f".model.safetensors.{dead.pid}.tmp").write_bytes(b"half")
    (out / f".card.md.{os.getppid()}.tmp").write_bytes(b"another program writes this")
    list(rl.train(tiny, out, resume=True, device="cpu"))
    assert [path.name for path in out.glob(".*.tmp")] == [f".card.md.{os.getppid()}.tmp"]


@pytest.fixture
def hangups() -> Iterator[None]:
    """SIGHUP is not ignored by the processes that a test starts, as it would be where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_that_ends_a_process_saves_after_the_step(tmp_path, number):
    out = tmp_path / "run"
    words = ["train", "digits-none", "--out", str(out), "--device", "cpu", "--set", "train.log_every=1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rrepa_lab.cli", *words, "--set", "train.save_every=1000000"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    end = time.monotonic() + 120
    while time.monotonic() < end and not (out / "card.md").exists():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 1, complained
    assert "--resume" in said
    assert 0 < rl.load(out).step < 1500
    state = torch.load(out / "train_state.pt", weights_only=True)
    assert len(json.loads(state["pending"])) == state["step"], "what was measured since the last report is kept"


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_on_interrupt() as stopped:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopped()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopped()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_that_ends_a_training_saves_first(tiny, tmp_path, monkeypatch):
    from rrepa_lab.training.inputs import StepInputs

    inputs, count = StepInputs.__call__, iter(range(100))

    def broken(self, *given, **chosen):
        if next(count) == 7:
            raise LabError("photos/cat/7.png is a picture that cannot be read")
        return inputs(self, *given, **chosen)

    monkeypatch.setattr(StepInputs, "__call__", broken)
    with pytest.raises(LabError, match=r"photos/cat/7.png"):
        list(rl.train(tiny, tmp_path / "run", device="cpu"))
    assert rl.load(tmp_path / "run").step == 7
    rest = list(rl.train(tiny, tmp_path / "run", resume=True, device="cpu"))
    monkeypatch.undo()
    other = list(rl.train(tiny, tmp_path / "other", device="cpu"))
    assert [report.loss for report in rest] == [report.loss for report in other[3:]]


def test_other_classes_are_refused_at_resume(tiny, tmp_path, monkeypatch):
    from rrepa_lab.training import folder

    reports = rl.train(tiny, tmp_path / "run", device="cpu")
    next(reports)
    reports.close()
    with pytest.raises(LabError, match=r"was trained with the classes 0, 1, .*; the data now have zero, 1"):
        folder.resumes(tiny, ["zero", *map(str, range(1, 10))], tmp_path / "run", True)


def test_a_folder_of_something_else_is_never_taken_for_a_training_that_did_not_begin(tiny, tmp_path):
    """An encoder, a model of another library: they have a config.json and weights, but no step."""
    for name, text in (("encoder", '{"steps": 3}'), ("hub", '{"model_type": "bert"}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        for resume in (False, True, "auto"):
            with pytest.raises(LabError, match="is not empty and holds no run"):
                next(rl.train(tiny, tmp_path / name, resume=resume, device="cpu"))
        assert (tmp_path / name / "model.safetensors").read_bytes() == b"weights"


def test_run_folders_of_version_0_1_resume(tiny, tmp_path):
    """Its train_state.pt held weights and step alone; the records were a file of their own."""
    from rrepa_lab.training.state import Checkpoint

    out = tmp_path / "run"
    reports = rl.train(tiny, out, device="cpu")
    for report in reports:
        if report.step == 4:
            break
    reports.close()
    state = Checkpoint.load(out / "train_state.pt")
    old = {"step": 4, "objective": state.objective, "average": state.average, "optimizer": state.optimizer}
    torch.save(old, out / "train_state.pt")
    rest = list(rl.train(tiny, out, resume=True, device="cpu"))
    assert [report.step for report in rest] == [6, 8, 10, 12]
    assert Records(out).table().step.tolist() == [2, 4, 6, 8, 10, 12]
    assert main(["train", str(out / "config.json"), "--out", str(out), "--device", "cpu"]) == 2
