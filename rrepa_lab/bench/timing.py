"""Timing by alternation, and memory."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rrepa_lab.errors import LabError


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


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Seconds of a case in each round: their median, the least and the most."""
    return {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


def summary(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """`spread`, and the median of the ratios to a reference in the same rounds."""
    ratios = [mine / theirs for mine, theirs in zip(seconds, reference, strict=True)]
    return spread(seconds) | {"ratio": statistics.median(ratios)}


def alternate(cases: Mapping[Any, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[Any, list[float]]:
    """Seconds of each case in each round, by CUDA events on a GPU; a first round warms up and is not counted."""
    times: dict[Any, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, call in cases.items():
            taken = _on_gpu(call) if device != "cpu" else _on_cpu(call)
            if round_:
                times[name].append(taken)
    return times


def _on_cpu(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _on_gpu(call: Callable[[], Any]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000


def ceiling(device: str, dtype: torch.dtype = torch.float32) -> float:
    """The most floating-point operations a second that products of square matrices reach here: 512, 1024, 2048 wide."""
    best = 0.0
    for size in (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = min(alternate({"product": lambda a=a, b=b: a @ b}, 5, device)["product"])  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
    return best


def operations(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call's matrix products and convolutions, and of attention where torch counts it."""
    with _Counter() as counter:
        call()
    return counter.total


class _Counter(TorchDispatchMode):
    """torch's FlopCounterMode without its notes on modules, which cannot follow gradients taken within a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = flop_registry.get(func.overloadpacket)
        if count is None:  # in inference mode operations such as a linear map arrive whole
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        out = func(*args, **(kwargs or {}))
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that a call adds to what there was, after a first call; on a CPU of the whole process (Linux only).

    On a CPU run it in a process of its own with the variables of `STRICT_MALLOC`: else freed memory is kept and hides it.
    """
    call()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


STRICT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LabError(f"this system does not tell {field}: peak memory on a CPU is measured on Linux alone")


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Within it torch uses so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
