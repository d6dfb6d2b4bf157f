"""Work shared among processes that `torchrun` or `accelerate launch` started together."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rrepa_lab.errors import LabError, ReportedElsewhere

if TYPE_CHECKING:  # the command line asks for its place before it needs torch
    from torch import Tensor

T = TypeVar("T")

# what the errors of a lost connection say, in the words of gloo, NCCL and torch
LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "nccl",
    "timed out",
    "peer closed",
)


class Place(NamedTuple):
    """This process among those that were started together."""

    device: str  # that it computes on
    main: bool  # whether it is the one that prints and writes


def world_size() -> int:
    """Processes that were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the first of those that were started together, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def check_alone(what: str) -> None:
    """LabError where several processes were started together for something that one does."""
    if world_size() > 1:
        raise LabError(f"{what} runs in one process, not in {world_size()}: start it without torchrun or accelerate launch")


@contextmanager
def process_group(device: str) -> Iterator[Place]:
    """Within it, the processes that were started together can exchange values; alone, nothing changes.

    Args:
        device: cpu, cuda or auto; each of several processes takes a GPU of its own.

    Raises: LabError for a numbered GPU with several processes, and in those that are left when one of them ends.
    """
    if world_size() == 1:
        yield Place(device, True)
        return
    if ":" in device:
        raise LabError(f"device {device} with {world_size()} processes: each takes a GPU of its own, use --device cuda")
    import torch

    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        with lost_process():
            yield Place(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu", is_main())
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def lost_process(advice: str = "start all of them again") -> Iterator[None]:
    """Within it, the error of a lost connection to another process becomes a LabError in one line."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not any(word in str(error).lower() for word in LOST):
            raise
        what = f"another of the {world_size()} processes ended, and this one cannot go on without it"
        raise LabError(f"{what}; its message, if it had one, is above: {advice}") from error


def shared(function: "Callable[[Tensor], Tensor]", count: int) -> "Tensor":
    """Values of `count` rows, of which each process computes a part; all of them get all, and all must call this.

    Args:
        function: rows (n,), int64, of this process -> their values (n, ...).

    Returns: (count, ...), on the device of the values. Without other processes that of `function` for all rows.
    Raises: the LabError of any process, in all of them.

    Example:
        >>> shared(lambda rows: rows * 2, 4)
        tensor([0, 2, 4, 6])
    """
    import torch

    if not _initialized():
        return function(torch.arange(count))
    rows, world = rows_of_process(count), torch.distributed.get_world_size()
    own = None

    def of_own_rows() -> "Tensor | None":
        nonlocal own
        own = function(rows) if len(rows) else None
        return None if own is None else own.cpu()

    parts = gather(of_own_rows)
    known = [part for part in parts if part is not None]
    values = known[0].new_empty(count, *known[0].shape[1:])
    for number, part in enumerate(parts):
        if part is not None:
            values[number::world] = part
    return values if own is None else values.to(own.device)


def gather(function: "Callable[[], T]") -> "list[T]":
    """What `function` returns in each process, in their order, in all of them; all must call this. Alone: a list of one.

    Raises: the LabError of any process, in all of them.

    Example:
        >>> gather(lambda: 3)
        [3]
    """
    import torch

    if not _initialized():
        return [function()]
    answer: tuple[T | None, str] = (None, "")
    try:
        answer = function(), ""
    except LabError as error:
        answer = None, str(error)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, answer)
    for number, (_, message) in enumerate(parts):
        if message:
            raise (LabError if number == torch.distributed.get_rank() else ReportedElsewhere)(message)
    return [value for value, _ in parts]


def rows_of_process(count: int) -> "Tensor":
    """The rows 0..count - 1 that this process works on: every one of them alone, else one in as many as there are processes."""
    import torch

    if not _initialized():
        return torch.arange(count)
    return torch.arange(count)[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def _initialized() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
