"""One process or several: the accelerator of a training, and how the main process decides for all of them."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rrepa_lab.errors import LabError, ReportedElsewhere
from rrepa_lab.processes import world_size

LONGEST = timedelta(days=7)  # that the main process may work while the others wait

_patient: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # accelerator -> process group


def accelerator_on(device: torch.device) -> Any:
    """An `accelerate.Accelerator` that computes on this device, whatever an earlier training of this process used.

    Several processes choose their GPUs themselves, one each.

    Raises: LabError for a numbered GPU with several processes.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    if world_size() > 1:
        if device.index is not None:
            raise LabError(f"device {device} with {world_size()} processes: each takes a GPU of its own, use --device cuda")
        return Accelerator(cpu=device.type == "cpu")
    # accelerate keeps the first device of a process in shared state
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    name = "ACCELERATE_TORCH_DEVICE"
    before = os.environ.get(name)
    os.environ[name] = str(device)
    try:
        return Accelerator(cpu=device.type == "cpu")
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def main_decides(accelerator: Any, decide: Callable[[], Any]) -> Any:
    """What `decide` returns in the main process, in all processes; its LabError is raised in all of them.

    The others wait as long as it takes (decoding ImageNet takes hours, and collectives of torch time out after 10 or 30
    minutes), on a gloo group of their own, which ends when a process dies.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except LabError as error:
            answer[1] = str(error)
    if accelerator.num_processes > 1:
        if accelerator not in _patient:
            _patient[accelerator] = torch.distributed.new_group(backend="gloo", timeout=LONGEST)
        torch.distributed.broadcast_object_list(answer, src=0, group=_patient[accelerator])
    if answer[1] is not None:
        raise (LabError if accelerator.is_main_process else ReportedElsewhere)(answer[1])
    return answer[0]


def any_process(accelerator: Any, flag: bool) -> bool:
    """Whether the flag is set in any of the processes."""
    if accelerator.num_processes == 1:
        return flag
    total: torch.Tensor = accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), "sum")
    return bool(total.item())
