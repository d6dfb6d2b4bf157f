"""What GPUs can do at most, by their makers' data sheets."""

import re
from typing import NamedTuple

from rrepa_lab.errors import LabError, unknown

# the part of the peak that a training reaches is an assumption, which is printed; --utilization sets another
UTILIZATION = 0.35
GIB = 2**30


class Gpu(NamedTuple):
    """A GPU."""

    title: str
    tflops: float  # 1e12 operations a second: bfloat16 matrix products, float32 sums, dense (without structured sparsity)
    memory: float  # GB, 1e9 bytes
    source: str


GPUS: dict[str, Gpu] = {
    "a100": Gpu("NVIDIA A100 80 GB", 312.0, 80, "NVIDIA A100 data sheet"),
    "a100-40gb": Gpu("NVIDIA A100 40 GB", 312.0, 40, "NVIDIA A100 data sheet"),
    "a10": Gpu("NVIDIA A10", 125.0, 24, "NVIDIA A10 data sheet"),
    "h100": Gpu("NVIDIA H100 SXM", 989.4, 80, "NVIDIA H100 data sheet"),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 756.0, 80, "NVIDIA H100 data sheet"),
    "h200": Gpu("NVIDIA H200 SXM", 989.4, 141, "NVIDIA H200 data sheet"),
    "b200": Gpu("NVIDIA B200", 2250.0, 180, "NVIDIA DGX B200 data sheet"),
    "l4": Gpu("NVIDIA L4", 121.0, 24, "NVIDIA L4 data sheet"),
    "l40s": Gpu("NVIDIA L40S", 362.0, 48, "NVIDIA L40S data sheet"),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 71.0, 24, "NVIDIA Ampere GA102 white paper"),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 165.2, 24, "NVIDIA Ada white paper"),
    "mi300x": Gpu("AMD Instinct MI300X", 1307.4, 192, "AMD MI300X data sheet"),
}


def gpus(text: str) -> tuple[int, Gpu]:
    """ "h100" or "8xh100" -> how many, and which; LabError with the nearest name.

    Example:
        >>> count, gpu = gpus("8xh100")
        >>> count, gpu.title
        (8, 'NVIDIA H100 SXM')
    """
    match = re.fullmatch(r"(?:(\d+)x)?(.+)", text.strip().lower())
    if match is None or match[2] not in GPUS:
        raise unknown("GPU", text if match is None else match[2], GPUS)
    count = int(match[1] or 1)
    if count < 1:
        raise LabError(f"--gpu {text}: at least one GPU is needed")
    return count, GPUS[match[2]]
