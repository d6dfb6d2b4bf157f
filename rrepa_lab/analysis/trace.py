"""Following images through a flow in either direction, and what the two directions have to do with each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.finite import NotFiniteError, cause, listed, rows_not_finite
from rrepa_lab.flow.inputs import as_condition, as_images, as_noise
from rrepa_lab.flow.taps import Tap, Taps
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.measurements.columns import about, place
from rrepa_lab.runs.run import Run

Direction = Literal["forward", "reverse"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")


@dataclass(frozen=True)
class Trace:
    """What a batch left behind on its way; all on the CPU."""

    states: dict[str, Tensor]  # tap -> (B, T, D), or (B, T, P) for block.<t>.in and .out; image token order
    images: dict[str, Tensor]  # in the order of travel, by tap (the image is block.1.in, the noise block.<N>.out): (B, C, H, W)
    error: Tensor  # (B,) largest difference after going there and back, in the units of the source; nan if not checked
    direction: Direction


@torch.no_grad()
def trace(
    run: Run | TarFlow,
    source: Tensor,
    y: Any = None,
    direction: str = "reverse",
    taps: Taps = (),
    *,
    guidance: float = 0.0,
    annealed: bool = False,
    temperature: float = 1.0,
    method: str = "auto",
    path: bool = True,
    check: bool = True,
    batch: int = 64,
) -> Trace:
    """Send images or noise through the flow and record inner states under the same names in both directions.

    Args:
        source: images (B, C, H, W) in [-1, 1], or noise (B, T, P). Under "reverse" images are encoded first (by the same
            label and guidance), so that the pass is the exact way back; noise under "forward" is refused.
        y: as in `TarFlow.forward`, or one class for all, ids or names; None is unconditional.
        taps: states to keep. Only these are ever held, and each batch goes to the CPU before the next one is read.
        guidance, annealed, temperature: of the guided map, in either direction, without effect where there is no label;
            states are of the conditional branch.
        method: decoding method, see `TarFlow.inverse`.
        path: keep the tokens between the blocks as images, N + 1 for each image.
        check: measure the round trip. It costs a second pass: a slow one (token by token) under "forward", a fast one
            from noise, none for images under "reverse".
        batch: images in one pass.

    Raises: LabError for an unknown direction, tap or method, noise under "forward", no images, a source of another type or
        shape or with rows that are not finite, a label or number out of range; NotFiniteError,
        naming rows and block, where numbers overflow.
    """
    batch = whole_number("batch", batch, 1)
    flow = run.flow if isinstance(run, Run) else run
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)
    forward, noise = direction == "forward", getattr(source, "ndim", 0) == 3
    if forward and noise:
        raise LabError("noise cannot be encoded: give images (B, C, H, W), or direction='reverse'")
    wanted = [tap.name for tap in flow.resolve(taps)]
    sides = [Tap(1, "in").name, *(Tap(t, "out").name for t in range(1, flow.config.blocks + 1))] if path else []
    source = as_noise(flow, source) if noise else as_images(flow, source)
    if not len(source):
        raise LabError("nothing to trace: the source is empty")
    labels = as_condition(flow, y, len(source), run.classes if isinstance(run, Run) else None)
    guidance, temperature = real_number("guidance", guidance), real_number("temperature", temperature, above=True)
    kept, error = _Store(len(source)), torch.full((len(source),), torch.nan)
    for start in range(0, len(source), batch):
        rows = slice(start, start + batch)
        part, label = source[rows], None if labels is None else labels[rows]
        if forward:
            out = flow(part, label, [*wanted, *sides], guidance, annealed, temperature)
            states = out.states
            check_states(flow, out.z, start, guidance, temperature)
            again = flow.inverse(out.z, label, guidance, annealed, temperature, method).x if check else None
        else:
            z = part if noise else flow(part, label, (), guidance, annealed, temperature).z
            check_states(flow, z, start, guidance, temperature)
            made = flow.inverse(z, label, guidance, annealed, temperature, method, [*wanted, *sides])
            states = made.states
            again = made.x
            if noise:
                again = flow(made.x, label, (), guidance, annealed, temperature).z if check else None
        kept.put(rows, states)
        if again is not None and check:
            error[rows] = (again - part).abs().flatten(1).amax(dim=1).float().cpu()
    order = sides if forward else sides[::-1]
    images = {name: flow.images(kept.values[name]) for name in order}
    return Trace({name: kept.values[name] for name in wanted}, images, error, "forward" if forward else "reverse")


def check_states(flow: TarFlow, z: Tensor, start: int, guidance: float, temperature: float) -> None:
    """NotFiniteError for rows of encoded images (B, T, P), counted from `start`, that are not finite."""
    bad = [start + row for row in rows_not_finite(z)]
    if bad:
        text = f"numbers stop being finite while encoding row {listed(bad)}"
        raise NotFiniteError(f"{text}: {cause(flow, guidance, temperature)}", bad)


class _Store:
    """Tensors of n rows on the CPU, filled batch after batch."""

    def __init__(self, rows: int) -> None:
        self.rows, self.values = rows, dict[str, Tensor]()

    def put(self, rows: slice, parts: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            if name not in self.values:
                self.values[name] = torch.empty(self.rows, *part.shape[1:], dtype=part.dtype)
            self.values[name][rows] = part.cpu()


def agreement(
    run: Run,
    x: Tensor,
    y: Tensor | int | None = None,
    taps: Taps = "*",
    *,
    guidance: float = 0.0,
    batch: int = 64,
) -> pd.DataFrame:
    """How far the states of an image's own way back are from those of its way there: by invertibility, rounding apart.

    Returns: one row a tap: run, strategy, train_seed, tap, block, layer, module_path, gap (largest difference between
        the directions), spread (standard deviation of the state over images, tokens and width), relative_gap (gap /
        spread), round_trip_error (of the images), n, guidance, dtype.
    """
    there = trace(run, x, y, "forward", taps, guidance=guidance, path=False, check=False, batch=batch)
    back = trace(run, x, y, "reverse", taps, guidance=guidance, path=False, batch=batch)
    rows = [{**about(run), **place(tap), **state_gap(there, back, tap.name)} for tap in run.flow.resolve(taps)]
    dtype = str(next(run.flow.parameters()).dtype).removeprefix("torch.")
    return pd.DataFrame(rows).assign(round_trip_error=float(back.error.max()), n=len(x), guidance=guidance, dtype=dtype)


def state_gap(one: Trace, other: Trace, tap: str) -> dict[str, float]:
    """Columns gap, spread and relative_gap of a tap in two traces, spread being that of the first; see `agreement`."""
    state = one.states[tap]
    gap, spread = float((state - other.states[tap]).abs().max()), float(state.std())
    return {"gap": gap, "spread": spread, "relative_gap": gap / spread}
