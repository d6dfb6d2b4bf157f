"""What things cost on this machine: ratios of work run in alternation in one process, medians of repeats.

Times of one machine at one moment mean little, so every row has the ratio to its own reference beside the seconds.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rrepa_lab.analysis.classify import classify
from rrepa_lab.bench.data import data_waits
from rrepa_lab.bench.decode import DECODERS, decoding
from rrepa_lab.bench.evaluation import evaluation_costs
from rrepa_lab.bench.processes import memory_by_process
from rrepa_lab.bench.scaling import scaling_table
from rrepa_lab.bench.speed import speed_table
from rrepa_lab.bench.teacher import teacher_costs
from rrepa_lab.bench.timing import alternate, limited_threads, summary
from rrepa_lab.bench.train import step_costs
from rrepa_lab.data.loaders import generator, seeded
from rrepa_lab.errors import unknown
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.flow.tarflow.config import FlowConfig
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.hardware import machine
from rrepa_lab.runs.presets import preset
from rrepa_lab.runs.store import load, pick_device

__all__ = ["BENCHES", "DECODERS", "bench", "decoding", "step_costs"]

CLASSES = (10, 100, 1000)


def bench(
    which: str = "speed",
    repeats: int = 3,
    threads: int = 2,
    device: str = "cpu",
    folder: str | Path | None = None,
    size: int = 32,
    run: str = "digits-reverse",
    networks: tuple[str, ...] = (),
) -> pd.DataFrame:
    """Run a benchmark.

    Args:
        which: "speed": the figures this kit is held to, see `speed.speed_table`. "scaling": costs against tokens, blocks,
            classes and images, see `scaling.scaling_table`. "classify": one gradient step and Bayes' rule for 10, 100 and
            1,000 classes. "decode": the ways to invert a flow, on the bundled digits-reverse; see `decode.decoding`.
            "strategies": a training step under every alignment strategy; see `train.step_costs`. "teacher": a training step
            with the teacher's pass and with its features kept; see `teacher.teacher_costs`. "page": from the start of the
            page to its first picture, and from a key to the repaint, in a headless Chromium. "memory": of the page under 16
            visitors, for `repeats` minutes. "data": waiting for the images of a folder, see `data.data_waits`. "processes":
            memory of two processes of a training, see `processes.memory_by_process`. "evaluation": samples, features and
            moments, and hours for 50,000 samples, see `evaluation.evaluation_costs`.
        repeats: rounds; each round runs every case once, in turn.
        threads: of torch, on a CPU.
        folder: the image folder of "data".
        size: height and width of its images.
        run, networks: of "evaluation": whose samples, and what they are read by.

    Returns: one row a case, and what was run: repeats, threads, device, torch.

    Raises: LabError for an unknown benchmark, and for "data" without a folder.
    """
    evaluation = partial(evaluation_costs, run=run, networks=networks)
    benches = BENCHES | {"data": partial(data_waits, folder, size), "evaluation": evaluation}
    if which not in benches:
        raise unknown("benchmark", which, benches)
    with limited_threads(threads):
        return benches[which](repeats, device).assign(
            bench=which, repeats=repeats, threads=threads, device=machine(pick_device(device)), torch=torch.__version__
        )


def _classify(repeats: int, device: str) -> pd.DataFrame:
    """Time against the number of classes, digits geometry, random weights (the time does not depend on them)."""
    images = 16
    x = torch.randn(images, 1, 8, 8, generator=generator(0)).to(device)
    cases, reference = dict[tuple[str, int], Callable[[], Any]](), dict[tuple[str, int], tuple[str, int]]()
    for count in CLASSES:
        with seeded(0):
            flow = TarFlow(FlowConfig(classes=count))
        perturb(flow, 0, std=0.02)  # small enough that no likelihood overflows
        flow.eval().requires_grad_(False).to(device)
        for method in ("gradient", "bayes"):
            cases[method, count] = partial(classify, flow, x, method)
            reference[method, count] = method, CLASSES[0]
    times = alternate(cases, repeats, device)
    rows = []
    for case, seconds in times.items():
        base = reference[case]
        row = {"case": case[0], "classes": case[1]} | summary(seconds, times[base])
        rows.append(row | {"reference": f"{base[0]}, {base[1]} classes"})
    table = pd.DataFrame(rows).sort_values(["case", "classes"], ascending=[False, True], ignore_index=True)
    return table.assign(images=images, flow="digits: 4 blocks x 4 layers, width 64, 16 tokens")


def _decode(repeats: int, device: str) -> pd.DataFrame:
    """Time and error of the ways to decode, with trained weights: how soon an iteration ends depends on them."""
    run = load("digits-reverse", device)
    table = decoding(run, 16, repeats).rename(columns={"method": "case", "n": "images"})
    table = table.drop(columns=["run", "strategy", "data", "space", "encoder", "train_seed"])
    flow = f"{run.name}: 4 blocks x 4 layers, width 64, 16 tokens"
    return table.assign(classes=run.flow.config.classes, reference="sequential", flow=flow)


def _strategies(repeats: int, device: str) -> pd.DataFrame:
    """Time and memory of a training step of digits under every strategy."""
    config = preset("digits-reverse")
    table = step_costs(config, repeats=repeats, device=device)
    pairs = zip(table["strategy"].astype(str), table["refinements"], strict=True)
    case = pd.Series([f"{strategy}, k = {count}" if strategy == "reverse" else strategy for strategy, count in pairs])
    return table.assign(
        case=case, reference="none", classes=config.flow.classes,
        flow="digits: 4 blocks x 4 layers, width 64, 16 tokens, aligned blocks 3 and 4 at layer 2",
    ).drop(columns=["strategy", "refinements"])  # fmt: skip


def _page(repeats: int, device: str) -> pd.DataFrame:
    """Seconds until the page answers, in a headless Chromium."""
    from rrepa_lab.bench.page import page_times

    return page_times(repeats, torch.get_num_threads(), device).assign(ratio=float("nan"), reference="", images=1)


def _memory(repeats: int, device: str) -> pd.DataFrame:
    """Memory of the page under visitors, `repeats` minutes long."""
    from rrepa_lab.bench.page import page_memory

    return page_memory(repeats, torch.get_num_threads(), device)


def _teacher(repeats: int, device: str) -> pd.DataFrame:
    """Time of a training step with the teacher's pass and with its features kept."""
    flow = (
        "imagefolder-tiny: 4 blocks x 3 layers, width 64, 64 tokens; teacher efficientnet-lite0, grid 4x4 at 128 px, 7x7 at 224"
    )
    return teacher_costs(repeats, device).assign(reference="no teacher", flow=flow)


BENCHES: dict[str, Callable[[int, str], pd.DataFrame]] = {
    "speed": speed_table, "scaling": scaling_table, "classify": _classify, "decode": _decode, "strategies": _strategies,
    "teacher": _teacher, "page": _page, "memory": _memory, "processes": memory_by_process,
}  # fmt: skip
