"""What a flow gives back, and the protocols that a family of flows follows."""

from typing import NamedTuple

from torch import Tensor


class FlowOutput(NamedTuple):
    """An encoded batch."""

    z: Tensor  # (B, T, P), image token order
    logdet: Tensor  # (B,) nats, log |det dz/dx|, summed over T and P
    states: dict[str, Tensor]  # tap -> (B, T, D), or (B, T, P) for block.<t>.in and .out


class InverseOutput(NamedTuple):
    """A generated batch."""

    x: Tensor  # (B, C, H, W)
    states: dict[str, Tensor]  # as in FlowOutput, recorded while generating
    method: str = "sequential"  # that it was decoded by
    sweeps: tuple[int, ...] = ()  # reads of the Transformer in each block, block 1 first; the most of any part of the batch
    error: float | None = None  # largest change of a number under one more sweep (`decoding.residual`), where it was measured
