"""Timing by alternation, memory, and the machine in words."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def kept_bytes(call: Callable[[], Any]) -> int:
    """Bytes of the tensors that autograd keeps during a call, each storage counted once."""
    sizes: dict[int, int] = {}
    alive = []  # a storage must not be freed and its address used again while we count

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(sizes.values())


def summary(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Seconds of a case in each round, against those of its reference in the same rounds."""
    ratios = [mine / theirs for mine, theirs in zip(seconds, reference, strict=True)]
    return {
        "seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds),
        "ratio": statistics.median(ratios),
    }  # fmt: skip


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
def threads(count: int) -> Iterator[None]:
    before = torch.get_numthreads()
    torch.set_numthreads(count)
    try:
        yield
    finally:
        torch.set_numthreads(before)


def machine(device: str) -> str:
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
