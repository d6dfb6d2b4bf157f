"""Several processes under torchrun: the numbers of one, one log, and an end in one line when one of them dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import rrepa_lab as rl
from rrepa_lab.processes import check_alone, lost_process, process_group, shared
from rrepa_lab.runs.records import Records

# noise, dropped labels, flips and shifts belong to the image, whichever process reads it
SMALL = {
    "flow.width": 16, "flow.head_width": 16, "flow.noise_std": 0.1, "train.batch": 32, "train.log_every": 1,
    "train.eval_every": 10, "train.label_drop": 0.1, "data.flip": "true", "data.shift": 1, "train.precision": "float32",
}  # fmt: skip
EXACT = ("loss", "nats_per_dim", "similarity.block.3.layer.2", "similarity.block.4.layer.2", "held_out_nats_per_dim")


def command(count: int, *words: str) -> list[str]:
    """The command line of the kit in this many processes."""
    if count == 1:
        return [sys.executable, "-m", "rrepa_lab.cli", *words]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["torch.distributed.run", "--nproc_per_node", str(count), "--master_addr", "127.0.0.1", "--master_port", port]
    return [sys.executable, "-m", *launch, "-m", "rrepa_lab.cli", *words]


def train_words(out: Path, preset: str = "digits-reverse", **settings: object) -> list[str]:
    chosen = SMALL | {name.replace("__", "."): value for name, value in settings.items()}
    return [
        "train",
        preset,
        "--out",
        str(out),
        "--device",
        "cpu",
        *(w for k, v in chosen.items() for w in ("--set", f"{k}={v}")),
    ]


def run(count: int, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RREPA_RUNS": "/nonexistent"}
    done = subprocess.run(command(count, *words), check=False, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == status, done.stderr
    return done


def table(folder: Path):
    return Records(folder).table()


def assert_same_losses(first: Path, second: Path) -> None:
    one, two = table(first), table(second)
    assert one["step"].tolist() == two["step"].tolist()
    for column in [name for name in EXACT if name in one]:
        assert two[column].tolist() == pytest.approx(one[column].tolist(), abs=1e-5, nan_ok=True), column
    assert two["grad_norm"].tolist() == pytest.approx(one["grad_norm"].tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run(1, *train_words(out, train__steps=20))
    return out


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_train_like_one(alone, tmp_path, parallel):
    done = run(2, *train_words(tmp_path / "two", train__steps=20, train__parallel=parallel), "--json")
    assert_same_losses(alone, tmp_path / "two")
    assert json.loads(done.stdout)["step"] == 20, "one log"
    for name, value in rl.load(alone).weights().items():
        torch.testing.assert_close(rl.load(tmp_path / "two").weights()[name], value, atol=1e-4, rtol=0)


@pytest.mark.processes
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("more", [
    {"preset": "digits-none"}, {"preset": "digits-forward"}, {"preset": "digits-detach"}, {"train__accumulate": 3},
    {"flow__volume_preserving": "true"}, {"train__batch": 33}, {"train__checkpointing": "true"},
    {"flow__noise": "uniform", "train__keep": "accuracy"},
], ids=lambda more: "-".join(map(str, more.values())))  # fmt: skip
def test_two_processes_train_like_one_whatever_is_trained(tmp_path, parallel, more):
    run(1, *train_words(tmp_path / "one", train__steps=6, **more))
    run(2, *train_words(tmp_path / "two", train__steps=6, train__parallel=parallel, **more))
    assert_same_losses(tmp_path / "one", tmp_path / "two")


def test_accumulated_parts_give_the_gradient_of_the_whole(tiny, tmp_path):
    settings = {"train.steps": 4, "train.log_every": 1, "train.batch": 31}
    list(rl.train(tiny.override(settings), tmp_path / "whole", device="cpu"))
    list(rl.train(tiny.override(settings | {"train.accumulate": 3}), tmp_path / "parts", device="cpu"))
    whole, parts = table(tmp_path / "whole"), table(tmp_path / "parts")
    for column in ("loss", "nats_per_dim", "grad_norm", "held_out_nats_per_dim"):
        assert parts[column].tolist() == pytest.approx(whole[column].tolist(), abs=2e-6, nan_ok=True), column


@pytest.mark.processes
@pytest.mark.parametrize(("before", "after"), [((2, "fsdp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp")), ((2, "ddp"), (2, "fsdp"))])
def test_a_training_resumes_on_other_processes(alone, tmp_path, before, after):
    out = tmp_path / "run"
    words = train_words(out, train__steps=20, train__save_every=5)
    interrupted(before[0], out, [*words, "--set", f"train.parallel={before[1]}"])
    run(after[0], *words, "--set", f"train.parallel={after[1]}", "--resume")
    assert_same_losses(alone, out)


def interrupted(count: int, out: Path, words: list[str]) -> None:
    """Start a training, and kill all of its processes after its second checkpoint."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(count, *words), env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for_step(out, 7, process)
    workers = psutil.Process(process.pid).children(recursive=True)  # those of torchrun are in sessions of their own
    process.kill()
    for worker in workers:
        worker.kill()
    process.wait()
    time.sleep(1)


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    while time.monotonic() - began < 120:
        assert process.poll() is None, "it ended by itself"
        if (out / "metrics.jsonl").exists() and any(row["step"] >= step for row in Records(out).rows()):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within two minutes")


@pytest.mark.parametrize("victim", [pytest.param("1", marks=pytest.mark.slow), "0"])
def test_a_dead_process_ends_the_others_in_one_line(tmp_path, victim):
    out = tmp_path / "run"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = command(2, *train_words(out, train__steps=100_000, train__save_every=5))
    process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for_step(out, 6, process)
    os.kill(child_of_rank(process.pid, victim), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    lines = [line for line in said.splitlines() if line.startswith("rrepa-lab: ")]
    assert len(lines) == 1, said
    assert "another of the 2 processes ended" in lines[0]
    assert "--resume goes on with it" in lines[0]
    assert "rrepa_lab/" not in said, "no traceback"
    assert rl.load(out).step >= 5, "the last checkpoint stands"


@pytest.mark.processes
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ctrl_c_saves_once_and_the_training_resumes(alone, tmp_path, parallel):
    # a terminal sends the signal to the launcher and to all processes, and the launcher passes it on once more
    out = tmp_path / "run"
    words = train_words(out, train__steps=20, train__save_every=1000)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(2, *words, "--set", f"train.parallel={parallel}"),
        env=env,
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_step(out, 3, process)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("stopping after this step") == 1
    assert said.count("stopped and saved") == 1
    assert 3 <= rl.load(out).step < 20
    run(1, *words, "--resume")
    assert_same_losses(alone, out)


def child_of_rank(parent: int, rank: str) -> int:
    import psutil

    return next(child.pid for child in psutil.Process(parent).children(recursive=True) if child.environ().get("RANK") == rank)


@pytest.mark.parametrize(
    "cache", [pytest.param("on", marks=pytest.mark.slow, id="before the training"), pytest.param("off", id="in a step")]
)
def test_an_error_of_one_process_ends_all_and_is_reported_once(tmp_path, cache):
    photos = tmp_path / "photos"
    for label in ("cat", "dog"):
        for number in range(12):
            path = photos / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            rl_image(number).save(path)
    (photos / "cat" / "7.png").write_bytes(b"no picture")
    small = {
        "data.path": photos,
        "train.steps": 9,
        "train.batch": 4,
        "train.num_workers": 0,
        "flow.width": 64,
        "flow.blocks": 2,
    }
    words = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    done = run(2, "train", "imagefolder-tiny-none", "--out", str(tmp_path / "run"), "--device", "cpu", *words, status=1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("rrepa-lab: ")]
    assert sum("7.png" in line for line in lines) == 1
    assert all("7.png" in line or "another of the 2 processes ended" in line for line in lines)


def rl_image(number: int):
    from PIL import Image

    return Image.new("RGB", (32, 32), (number * 20, 255 - number * 20, 128))


EVALUATE = [
    "evaluate", "digits-reverse", "--samples", "130", "--noise-samples", "1", "--parts", "all", "--limit", "60", "--json",
]  # fmt: skip
SAMPLE = ["sample", "digits-reverse", "--labels", "0..2", "--seeds", "0..2", "--guidance", "1", "--json"]


@pytest.mark.parametrize(
    "words", [pytest.param(EVALUATE, marks=pytest.mark.slow, id="evaluate"), pytest.param(SAMPLE, id="sample")]
)
def test_two_processes_score_and_sample_like_one(tmp_path, words):
    answers = []
    for count in (1, 2):
        out = ["--out", str(tmp_path / f"{count}.png")] if words[0] == "sample" else []
        answers.append(json.loads(run(count, *words, *out).stdout))
    if words[0] == "sample":
        assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
        return
    numbers = ("value", "low", "high", "standard_error")
    for one, two in zip(*answers, strict=True):
        for name in numbers:
            expected = None if one[name] is None else pytest.approx(one[name], rel=1e-5, abs=1e-8)
            assert two[name] == expected, (one["metric"], name)
        assert {**two, **dict.fromkeys(numbers)} == {**one, **dict.fromkeys(numbers)}


def test_commands_of_one_process_refuse_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(rl.LabError, match="rrepa-lab probe runs in one process, not in 2"):
        check_alone("rrepa-lab probe")
    with pytest.raises(rl.LabError, match="cuda:1 with 2 processes"), process_group("cuda:1"):
        pass


def test_errors_that_are_no_lost_process_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="shape"), lost_process():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(rl.LabError, match="another of the 2 processes ended"), lost_process():
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")


def test_one_process_computes_all_rows():
    assert shared(lambda rows: rows * 3, 5).tolist() == [0, 3, 6, 9, 12]
