"""Which precision is faster on a device, measured by two short products."""

import time
from functools import lru_cache
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]
GAIN = 1.3  # bfloat16 must be this many times faster: casts and the float32 parts cost some of it
OPERATIONS = 2**28  # multiply-adds of a product at most, a few milliseconds in float32 on one core


def resolve_precision(wanted: str, device: torch.device, rows: int, width: int) -> Precision:
    """The precision that a setting stands for; "auto" is measured once per device and size.

    Args:
        wanted: "auto", "float32" or "bfloat16".
        rows: tokens in a batch.
        width: D of the flow.
    """
    if wanted != "auto":
        return "bfloat16" if wanted == "bfloat16" else "float32"
    return "bfloat16" if bfloat16_gain(str(device), rows, width) >= GAIN else "float32"


@lru_cache
def bfloat16_gain(device: str, rows: int, width: int) -> float:
    """How many times faster a bfloat16 product (rows, D) x (D, 4 D) is than a float32 one on this device."""
    width = min(width, 2048)
    rows = max(1, min(rows, OPERATIONS // (4 * width * width)))
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(rows, width, device=device, dtype=dtype)
        b = torch.ones(width, 4 * width, device=device, dtype=dtype)
        seconds[dtype] = min(_seconds(a, b) for _ in range(4))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Time of one product, at least a microsecond."""
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    began = time.perf_counter()
    a @ b
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return max(time.perf_counter() - began, 1e-6)
