"""What things cost on this machine: ratios of work run in alternation in one process, medians of repeats.

Times of one machine at one moment mean little, so every row has the ratio to its own reference beside the seconds.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
import torch

from rrepa_lab.align.routing import perturb
from rrepa_lab.analysis.classify import classify
from rrepa_lab.data.loaders import generator, seeded
from rrepa_lab.errors import unknown
from rrepa_lab.flow.tarflow import FlowConfig, TarFlow

CLASSES = (10, 100, 1000)


def bench(which: str = "classify", repeats: int = 7, threads: int = 2, device: str = "cpu") -> pd.DataFrame:
    """Run a benchmark.

    Args:
        which: "classify": one gradient step and Bayes' rule for 10, 100 and 1,000 classes.
        repeats: rounds; each round runs every case once, in turn.
        threads: of torch, on a CPU.

    Returns: one row a case: bench, case, classes, seconds (median), fastest, slowest, ratio (median over rounds of the
        time to that of the reference case in the same round), reference, and what was run: images, flow, repeats,
        threads, device, torch.

    Raises: LabError for an unknown benchmark.
    """
    if which not in BENCHES:
        raise unknown("benchmark", which, BENCHES)
    with _threads(threads):
        return BENCHES[which](repeats, device).assign(
            repeats=repeats, threads=threads, device=_machine(device), torch=torch.__version__
        )


def _classify(repeats: int, device: str) -> pd.DataFrame:
    """Time against the number of classes, digits geometry, random weights (the time does not depend on them)."""
    images = 16
    x = torch.randn(images, 1, 8, 8, generator=generator(0)).to(device)
    cases, reference = dict[tuple[str, int], Callable[[], Any]](), dict[tuple[str, int], tuple[str, int]]()
    for count in CLASSES:
        with seeded(0):
            flow = TarFlow(FlowConfig(classes=count))
        perturb(flow, 0)
        flow.eval().requires_grad_(False).to(device)
        for method in ("gradient", "bayes"):
            cases[method, count] = partial(classify, flow, x, method)
            reference[method, count] = method, CLASSES[0]
    times = alternate(cases, repeats, device)
    rows = []
    for case, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[reference[case]], strict=True)]
        rows.append(
            {
                "bench": "classify", "case": case[0], "classes": case[1], "seconds": statistics.median(seconds),
                "fastest": min(seconds), "slowest": max(seconds), "ratio": statistics.median(ratios),
                "reference": f"{reference[case][0]}, {reference[case][1]} classes",
            }
        )  # fmt: skip
    table = pd.DataFrame(rows).sort_values(["case", "classes"], ascending=[False, True], ignore_index=True)
    return table.assign(images=images, flow="digits: 4 blocks x 4 layers, width 64, 16 tokens")


BENCHES: dict[str, Callable[[int, str], pd.DataFrame]] = {"classify": _classify}


def alternate(cases: Mapping[Any, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[Any, list[float]]:
    """Seconds of each case in each round; a first round warms up and is not counted."""
    times: dict[Any, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, call in cases.items():
            began = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_:
                times[name].append(time.perf_counter() - began)
    return times


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine(device: str) -> str:
    """The machine in words that name no host."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    model = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            model = next((line.split(":")[1].strip() for line in stream if line.startswith("model name")), "")
    except OSError:
        pass
    return model or platform.processor() or platform.machine()
