"""How a flow is decoded fastest on this machine: a short measurement that is kept with the run."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rrepa_lab.checks import whole_number
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_text
from rrepa_lab.flow.condition import Condition, Guidance
from rrepa_lab.flow.decode.engine import INNER_TOL_RATIO
from rrepa_lab.flow.decode.jacobi import decode_windows
from rrepa_lab.flow.decode.plan import DecodePlan, Decoding, default_tolerance
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.runs.names import PLAN
from rrepa_lab.runs.run import Run
from rrepa_lab.sampling.sample import noise, seed_range

ROWS = (1, 2, 4, 8, 16, 32, 64)  # images decoded at once that jacobi and cached are compared at


@torch.no_grad()
def calibrate(run: Run | TarFlow, guidance: float = 0.0, repeats: int = 3, seed: int = 0, save: bool = False) -> DecodePlan:
    """Find the plan for `jacobi` and `auto`, which becomes `run.plan`: it changes how fast images are decoded, not which.

    For one image, each block is decoded with windows of 8, 16, ... tokens and keeps the fastest. Then whole flows are
    decoded by cached and by jacobi, 1, 2, 4, ... images at once, until jacobi is no longer the faster.

    Args:
        guidance: classifier-free guidance weight of these decodings.
        repeats: of every timing, of which the median counts.
        seed: of the first image's noise; labels are 0, 1, ... in turn.
        save: also keep it with the run, as decoding.json in its directory.

    Raises: LabError to save for a flow that belongs to no run directory.

    Example:
        >>> import rrepa_lab as rl
        >>> plan = rl.calibrate(rl.load("digits-reverse"), repeats=1)
        >>> len(plan.windows)
        4
    """
    repeats, rule = whole_number("repeats", repeats, 1), Guidance.of(guidance)
    flow = run.flow if isinstance(run, Run) else run
    directory = run.directory if isinstance(run, Run) else None
    if save and directory is None:
        raise LabError("the plan can only be kept with a saved run: run.save(directory) first")
    like, classes = next(flow.parameters()), flow.config.classes
    z = noise(flow, seed_range(seed, ROWS[-1])).to(like)
    y = (torch.arange(len(z), device=like.device) % classes) if classes else None
    condition = flow.condition(y, len(z), rule)
    windows = _fastest_windows(flow, z[:1], condition.rows(slice(0, 1)), repeats)
    plan, upto = DecodePlan(device=like.device.type, windows=windows), 0
    for images in ROWS:
        part = z[:images], condition.rows(slice(0, images))
        jacobi, cached = (
            _seconds(repeats, partial(flow.inverse, *part, method=Decoding(method, plan=plan)))
            for method in ("jacobi", "cached")
        )
        if jacobi > cached:
            break
        upto = images * rule.branches
    plan = plan.model_copy(update={"upto": upto})
    if isinstance(run, Run):
        run.plan = plan
    if save and directory is not None:
        write_text(directory / PLAN, plan.model_dump_json(indent=2) + "\n")
    return plan


def _fastest_windows(flow: TarFlow, z: Tensor, condition: Condition, repeats: int) -> list[int]:
    """The window of each block, block 1 first, that decodes one image fastest."""
    count = flow.config.tokens
    windows, tokens, atol = [0] * flow.config.blocks, z, INNER_TOL_RATIO * default_tolerance(z.dtype)
    sizes = [size for size in (4 * 2**k for k in range(1, 10)) if size < count - 1] + [count - 1]
    for number in range(flow.config.blocks, 0, -1):
        block, own = flow.block(number), condition.of_block(number)
        taken = {size: _seconds(repeats, block, decode_windows, block, tokens, own, size, atol) for size in sizes}
        windows[number - 1] = min(taken, key=taken.__getitem__)
        tokens = block(decode_windows, block, tokens, own, windows[number - 1], atol).tokens
    return windows


def _seconds(repeats: int, call: Callable[..., Any], *given: Any) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call(*given)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
