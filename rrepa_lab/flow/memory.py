"""How much fits into the memory that is free."""

from pathlib import Path

import torch

from rrepa_lab.errors import LabError

SHARE = 0.8  # of the free memory that is used


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on a device; on a CPU at most what the control group of this process allows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no control groups, or no limit
        return free


def fitting(each: int, device: torch.device, what: str) -> int:
    """How many things of `each` bytes fit; LabError if not even one does."""
    free = int(SHARE * free_bytes(device))
    if each > free:
        raise LabError(f"{what} needs {each / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free on {device}: it does not fit")
    return free // each
