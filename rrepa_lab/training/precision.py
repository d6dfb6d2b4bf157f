"""Which precision is faster on a device, measured by two short products."""

import time
from functools import lru_cache
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]
GAIN = 1.3  # bfloat16 must be this many times faster: casts and the float32 parts cost some of it
OPERATIONS = {"cpu": 2**26, "cuda": 2**35}  # multiply-adds of a product at most: some milliseconds
WIDTH = {"cpu": 512, "cuda": 4096}
LONG = 0.05  # seconds after which a product is not repeated: without units for bfloat16 it takes tens of times as long


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
    kind = "cuda" if device.startswith("cuda") else "cpu"
    width = min(width, WIDTH[kind])
    rows = max(1, min(rows, OPERATIONS[kind] // (4 * width * width)))
    return _fastest(device, torch.float32, rows, width) / _fastest(device, torch.bfloat16, rows, width)


def _fastest(device: str, dtype: torch.dtype, rows: int, width: int) -> float:
    a = torch.ones(rows, width, device=device, dtype=dtype)
    b = torch.ones(width, 4 * width, device=device, dtype=dtype)
    taken = [_seconds(a, b)]
    while len(taken) < 4 and taken[-1] < LONG:
        taken.append(_seconds(a, b))
    return min(taken)


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Time of one product, at least a microsecond."""
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    began = time.perf_counter()
    a @ b
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return max(time.perf_counter() - began, 1e-6)
