"""The benchmarks measure what they say; no test here is decided by the clock."""

import importlib
import json
import os
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.bench import bench, timing
from rrepa_lab.cli import main
from rrepa_lab.data import pictures
from rrepa_lab.data.sets import folder as folder_set
from rrepa_lab.paths import assets

speed = importlib.import_module("rrepa_lab.bench.speed")
scaling = importlib.import_module("rrepa_lab.bench.scaling")
TINY = rl.FlowConfig(channels=3, width=64, blocks=2, layers=3, classes=10)


def test_operations_are_counted():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert timing.operations(lambda: a @ b) == 2 * 3 * 5 * 7
    weight = torch.randn(7, 5, requires_grad=True)
    # forward, and the gradient of the weight alone
    assert timing.operations(lambda: torch.nn.functional.linear(a, weight).sum().backward()) == 2 * (2 * 3 * 5 * 7)
    assert timing.ceiling("cpu") > 1e8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory of a process is read from /proc")
def test_peak_memory_is_that_of_the_call():
    code = (
        "import torch; from rrepa_lab.bench.timing import peak_bytes\n"
        "print(peak_bytes(lambda: torch.ones(16, 2**20).sum(), 'cpu'), peak_bytes(lambda: torch.ones(8), 'cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | timing.STRICT_MALLOC, capture_output=True, text=True, check=True
    )
    large, small = map(int, done.stdout.split())
    assert 60 < large / 2**20 < 80, "sixteen times four MiB, and not what the process had before"
    assert small < 2**20


def test_ratios_are_of_the_same_round():
    times = {"mine": [1.0, 4.0, 2.0], "other": [2.0, 4.0, 8.0]}
    assert speed._pair(times, "mine", "other", "faster") == ([2.0, 1.0, 4.0], 2.0, 4.0)
    assert speed._pair(times, "mine", "other", "cost") == ([0.5, 1.0, 0.25], 2.0, 4.0)


@pytest.mark.slow
def test_the_table_of_figures(monkeypatch):
    monkeypatch.setattr(speed, "WIDE", TINY.model_copy(update={"blocks": 8}))
    monkeypatch.setattr(speed, "LONG", TINY)
    # memory is measured in a process of its own, which would take the real sizes: here what the graph keeps
    monkeypatch.setattr(speed, "memory", lambda case, device: timing.kept_bytes(speed.training_step(case, device)))
    table = bench("speed", repeats=1, threads=1)
    for row in table.to_dict("records"):
        assert row["low"] <= row["ratio"] <= row["high"]
        better = row["ratio"] >= row["required"] if row["kind"] == "faster" else row["ratio"] <= row["required"]
        assert row["met"] == better
        assert row["required"] < row["aim"] if row["kind"] == "faster" else row["required"] > row["aim"]
    by = table.set_index(["what", "against"])["ratio"]
    assert by["largest difference of two methods", "plain token loop"] < 1e-4
    operations = by[["operations" in what for what, _ in by.index]]
    assert (operations > 1).all()
    assert (operations < 1.5).all(), "reverse adds less than half a step, counted, projectors as wide as the flow included"
    assert len(table) == 16
    assert set(table["threads"]) == {1}


def test_scaling(monkeypatch):
    for name, sizes in (("TOKENS", (4, 16)), ("BLOCKS", (1, 2)), ("CLASSES", (3,)), ("IMAGES", (2,))):
        monkeypatch.setattr(scaling, name, sizes)
    monkeypatch.setattr(scaling, "BASE", TINY)
    table = bench("scaling", repeats=1, threads=1)
    points = {(row.over, row.size) for row in table.itertuples()}
    assert points == {("tokens", 4), ("tokens", 16), ("blocks", 1), ("blocks", 2), ("classes", 3), ("images", 2)}
    assert set(table[table["over"] == "tokens"]["kind"]) == {"encode", "cached", "jacobi", "classify"}
    assert set(table[table["over"] == "classes"]["kind"]) == {"classify"}


def test_waiting_for_data(tmp_path, monkeypatch):
    """Files that take long to decode are waited for; decoded pictures are not read from them again."""
    waiting = importlib.import_module("rrepa_lab.bench.data")
    monkeypatch.setenv("RREPA_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", 8), ("test", 2)):
        for number in range(count):
            place = tmp_path / "photos" / split / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(place / f"{number}.png")
    read = pictures.load_picture

    def slow(path, channels, size):
        time.sleep(0.05)
        return read(path, channels, size)

    for name, value in (("STEPS", 4), ("FIRST", 2), ("WORKERS", (0,))):
        monkeypatch.setattr(waiting, name, value)
    monkeypatch.setattr(folder_set, "load_picture", slow)
    table = bench("data", repeats=2, threads=1, folder=tmp_path / "photos", size=8)
    files, decoded = table["data_wait"]
    assert 0 <= decoded < files <= 1
    assert (table["low"] <= table["data_wait"]).all()
    assert table["case"].tolist() == ["files", "decoded pictures"]
    assert set(table["data"]) == {"photos"}
    assert table["images"].tolist() == [6, 6], "a quarter is set aside"
    for wrong, message in (
        ({"folder": None}, "add --data FOLDER"),
        ({"size": 12}, "8 divides, not 12"),
        ({"repeats": 0}, "1, not 0"),
    ):
        with pytest.raises(rl.LabError, match=message):
            bench(**{"which": "data", "repeats": 1, "folder": tmp_path / "photos", "size": 8} | wrong)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with timing.limited_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_plan_by_the_command_line(tmp_path, capsys):
    assert main(["bench", "plan"]) == 2
    assert "add --run RUN" in capsys.readouterr().err
    rl.load("digits-reverse").save(tmp_path / "mine")
    assert main(["bench", "plan", "--run", str(tmp_path / "mine"), "--repeats", "1", "--save", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["windows"] == rl.load(tmp_path / "mine").plan.windows


def test_the_kept_table_is_of_this_bench():
    """assets/benchmarks.md is filled from this table: it has the rows the bench has, and says where it was measured."""
    kept = pd.read_csv(assets() / "studies" / "bench-speed.csv")
    assert len(kept) == 16
    assert kept["device"].str.len().min() > 2
    assert {"ratio", "low", "high", "required", "aim", "met", "part_of_ceiling", "torch"} <= set(kept.columns)


@pytest.mark.processes
def test_a_sharded_training_keeps_half_of_the_weights_in_each_of_two_processes():
    table = bench("processes", 1, 1).set_index("case")
    assert table.loc["fsdp", "ratio"] == pytest.approx(0.5, abs=0.01)
    for name in ("parameters", "gradients", "optimizer", "average", "kept"):
        assert table.loc["fsdp", f"{name}_mib"] == pytest.approx(table.loc["ddp", f"{name}_mib"] / 2, rel=0.01)
    assert table.loc["fsdp", "rss_mib"] < 0.7 * table.loc["ddp", "rss_mib"]
    assert table.loc["ddp", "parameters_mib"] * 2**20 == pytest.approx(4 * table.loc["ddp", "parameters"])


def test_processes_that_fail_are_reported_in_one_line():
    processes = importlib.import_module("rrepa_lab.bench.processes")
    with pytest.raises(rl.LabError, match="2 processes could not be measured: .*Error") as caught:
        processes.memory_by_process(device="nowhere")
    assert "\n" not in str(caught.value)
