"""How a flow is decoded fastest on this machine: a short measurement that is kept with the run."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_text
from rrepa_lab.flow.condition import Guidance
from rrepa_lab.flow.decode.engine import INNER, decode_block, default_tolerance
from rrepa_lab.flow.decode.plan import DecodePlan
from rrepa_lab.flow.tarflow.model import TarFlow, label_of_block
from rrepa_lab.runs.run import PLAN, Run
from rrepa_lab.sampling.sample import noise, seed_range

ROWS = (1, 2, 4, 8, 16, 32, 64)  # images decoded at once that jacobi and cached are compared at


@torch.no_grad()
def calibrate(run: Run | TarFlow, guidance: float = 0.0, repeats: int = 3, seed: int = 0, save: bool = False) -> DecodePlan:
    """Find the plan for `jacobi` and `auto`, and give it to the flow: it changes how fast images come, not which.

    For one image, each block is decoded with windows of 8, 16, ... tokens and keeps the fastest. Then whole flows are
    decoded by cached and by jacobi, 1, 2, 4, ... images at once, until jacobi is no longer the faster.

    Args:
        guidance: classifier-free guidance weight of these decodings.
        repeats: of every timing, of which the median counts.
        seed: of the first image's noise; labels are 0, 1, ... in turn.
        save: also keep it with the run, as decoding.json in its directory.

    Raises: LabError to save for a flow that belongs to no run directory.
    """
    repeats, guidance = whole_number("repeats", repeats, 1), real_number("guidance", guidance)
    flow = run.flow if isinstance(run, Run) else run
    directory = run.directory if isinstance(run, Run) else None
    if save and directory is None:
        raise LabError("the plan can only be kept with a saved run: run.save(directory) first")
    like = next(flow.parameters())
    device, rule, count = like.device, Guidance(guidance), flow.config.tokens
    z = noise(flow, seed_range(seed, ROWS[-1])).to(like)
    classes = flow.config.classes
    y = (torch.arange(len(z), device=device) % classes) if classes else None

    windows, tokens = [0] * flow.config.blocks, z[:1]
    label, _ = flow.condition(None if y is None else y[:1], 1, guidance)
    still = INNER * default_tolerance(z.dtype)
    sizes = [size for size in (4 * 2**k for k in range(1, 10)) if size < count - 1] + [count - 1]
    for number in range(flow.config.blocks, 0, -1):
        block, seen = flow.block(number), label_of_block(label, number)
        taken = {size: _seconds(repeats, decode_block, block, tokens, seen, rule, size, still) for size in sizes}
        windows[number - 1] = min(taken, key=taken.__getitem__)
        tokens = decode_block(block, tokens, seen, rule, windows[number - 1], still).tokens
    flow.plan = DecodePlan(device=device.type, windows=windows)
    upto = 0
    for images in ROWS:
        part = z[:images], None if y is None else y[:images], guidance
        jacobi, cached = (_seconds(repeats, partial(flow.inverse, *part, method=method)) for method in ("jacobi", "cached"))
        if jacobi > cached:
            break
        upto = images * rule.branches
    flow.plan = DecodePlan(device=device.type, windows=windows, upto=upto)
    if save and directory is not None:
        write_text(directory / PLAN, flow.plan.model_dump_json(indent=2) + "\n")
    return flow.plan


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
