"""The states of images in a flow in either direction, and how far the two directions agree."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.condition import Condition, Guidance
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.decode.plan import Decoding
from rrepa_lab.flow.finite import NotFiniteError, cause, listed, rows_not_finite
from rrepa_lab.flow.inputs import as_condition, as_noise
from rrepa_lab.flow.taps import Tap, Taps
from rrepa_lab.measurements.columns import about, place
from rrepa_lab.runs.inputs import encoded, space_of
from rrepa_lab.runs.run import Run, flow_of
from rrepa_lab.space.contract import Space

BATCH = 64  # images in one pass
Direction = Literal["forward", "reverse"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse")


@dataclass(frozen=True)
class Trace:
    """The recorded states of a batch; all on the CPU.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> found = rl.trace(run, run.data("test", 1).x, direction="forward")
        >>> list(found.images)
        ['block.1.in', 'block.1.out', 'block.2.out', 'block.3.out', 'block.4.out']
    """

    states: dict[str, Tensor]  # tap -> (B, T, D), or (B, T, P) for block.<t>.in and .out; image token order
    x: dict[str, Tensor]  # between the blocks, in the order of the pass, by tap (block.1.in is that of the image): (B, *shape)
    error: Tensor  # (B,) largest difference after going there and back, in the units of x or noise; nan if not checked
    direction: Direction
    space: Space = field(repr=False)  # of x

    @cached_property
    def images(self) -> dict[str, Tensor]:
        """x as pictures to look at, (B, C, H, W) by tap: of pixels x itself, of latents each stage decoded.

        Only block.1.in is a picture that the space was made for; what decoding makes of the others `space.stage_words` names.
        """
        return {name: self.space.show(x) for name, x in self.x.items()}


@torch.no_grad()
def trace(
    run: Run | FlowModel,
    source: Tensor,
    y: Any = None,
    direction: str = "reverse",
    taps: Taps = (),
    *,
    guidance: float | Guidance = 0.0,
    method: str | Decoding = "auto",
    path: bool = True,
    check: bool = True,
) -> Trace:
    """Pass images or noise through the flow and record inner states under the same names in both directions.

    Args:
        source: images (B, C, H, W) in [-1, 1], or noise (B, T, P). Under "reverse" images are encoded first (by the same
            label and guidance), so that the pass is the exact inverse; noise under "forward" is refused.
        y: as in `TarFlow.forward`, or one class for all, ids or names; None is unconditional.
        taps: states to keep. Only these are ever held, and each batch goes to the CPU before the next one is processed.
        guidance: of the guided map, in either direction, without effect where there is no label; states are of the
            conditional branch.
        method: of decoding, or all its settings: see `Decoding`. 64 images are in one pass unless it says otherwise.
        path: keep the tokens between the blocks as images, N + 1 for each image.
        check: measure the round trip. It costs a second pass: a slow one (token by token) under "forward", a fast one
            from noise, none for images under "reverse".

    Raises: LabError for an unknown direction, tap or method, noise under "forward", no images, a source of another type or
        shape or with rows that are not finite, a label or number out of range; NotFiniteError,
        naming rows and block, where numbers overflow.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> found = rl.trace(run, run.data("test", 2).x, taps="block.3.layer.2")
        >>> found.states["block.3.layer.2"].shape, len(found.images), bool(found.error.max() < 1e-3)
        (torch.Size([2, 16, 64]), 5, True)
    """
    flow = flow_of(run)
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)
    forward, is_noise = direction == "forward", getattr(source, "ndim", 0) == 3
    if forward and is_noise:
        raise LabError("noise cannot be encoded: give images (B, C, H, W), or direction='reverse'")
    decoding = Decoding.of(method, run.plan if isinstance(run, Run) else None)
    wanted = [tap.name for tap in flow.resolve(taps)]
    sides = [Tap(1, "in").name, *(Tap(t, "out").name for t in range(1, flow.config.blocks + 1))] if path else []
    source = as_noise(flow, source) if is_noise else encoded(run, source)
    if not len(source):
        raise LabError("nothing to trace: the source is empty")
    condition = as_condition(flow, y, len(source), guidance, run.classes if isinstance(run, Run) else None)
    tracer = _Tracer(flow, [*wanted, *sides], decoding, check)
    step = tracer.encode if forward else tracer.generate if is_noise else tracer.reverse
    store, error, size = _Store(len(source)), torch.full((len(source),), torch.nan), decoding.batch or BATCH
    for start in range(0, len(source), size):
        rows = slice(start, start + size)
        states, again = step(source[rows], condition.rows(rows), start)
        store.put(rows, states)
        if again is not None and check:
            error[rows] = (again - source[rows]).abs().flatten(1).amax(dim=1).float().cpu()
    order = sides if forward else sides[::-1]
    x = {name: flow.untokenize(store.values[name]) for name in order}
    states = {name: store.values[name] for name in wanted}
    return Trace(states, x, error, "forward" if forward else "reverse", space_of(run))


class _Tracer(NamedTuple):
    """The passes over one batch; each returns the states, and the source after the round trip if that was computed."""

    flow: FlowModel
    taps: list[str]
    decoding: Decoding
    check: bool

    def encode(self, x: Tensor, condition: Condition, start: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Images towards the noise."""
        out = self.flow(x, condition, self.taps)
        check_states(self.flow, out.z, start, condition.guidance)
        return out.states, self.flow.inverse(out.z, condition, method=self.decoding).x if self.check else None

    def reverse(self, x: Tensor, condition: Condition, start: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Images to the noise, then the recorded pass from there."""
        z = self.flow(x, condition).z
        check_states(self.flow, z, start, condition.guidance)
        made = self.flow.inverse(z, condition, method=self.decoding, taps=self.taps)
        return made.states, made.x

    def generate(self, z: Tensor, condition: Condition, start: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Noise towards the image."""
        check_states(self.flow, z, start, condition.guidance)
        made = self.flow.inverse(z, condition, method=self.decoding, taps=self.taps)
        return made.states, self.flow(made.x, condition).z if self.check else None


def check_states(flow: FlowModel, z: Tensor, start: int, guidance: Guidance) -> None:
    """NotFiniteError for rows of encoded images (B, T, P), counted from `start`, that are not finite."""
    bad = [start + row for row in rows_not_finite(z)]
    if bad:
        text = f"numbers stop being finite while encoding row {listed(bad)}"
        raise NotFiniteError(f"{text}: {cause(flow, guidance)}", bad)


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
    """How far the states of an image's reverse pass are from those of its forward pass: equal by invertibility, rounding apart.

    Returns: one row a tap: run, strategy, data, space, encoder, train_seed, tap, block, layer, module_path, gap (largest
        difference between the directions), spread (standard deviation of the state over images, tokens and width), relative_gap
        (gap / spread), round_trip_error (of the images), n, guidance, dtype.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> bool((rl.agreement(run, run.data("test", 4).x, taps="block.*.layer.2").relative_gap < 1e-3).all())
        True
    """
    settings: dict[str, Any] = {"guidance": guidance, "method": Decoding(batch=batch), "path": False}
    there = trace(run, x, y, "forward", taps, check=False, **settings)
    back = trace(run, x, y, "reverse", taps, **settings)
    rows = [{**about(run), **place(tap), **state_gap(there, back, tap.name)} for tap in run.flow.resolve(taps)]
    dtype = str(next(run.flow.parameters()).dtype).removeprefix("torch.")
    return pd.DataFrame(rows).assign(round_trip_error=float(back.error.max()), n=len(x), guidance=guidance, dtype=dtype)


def state_gap(one: Trace, other: Trace, tap: str) -> dict[str, float]:
    """Columns gap, spread and relative_gap of a tap in two traces, spread being that of the first; see `agreement`."""
    state = one.states[tap]
    gap, spread = float((state - other.states[tap]).abs().max()), float(state.std())
    return {"gap": gap, "spread": spread, "relative_gap": gap / spread}
