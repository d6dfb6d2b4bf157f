"""Memory of a training, counted from the settings: weights, their gradients and moments, their average, activations.

Activations are what the graph keeps for the backward pass. They are counted tensor by tensor for the layers, which hold
nearly all of them; kernels that work in place, and the allocator's own reserve, are not known here.
"""

from typing import NamedTuple

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.projector_kind import PROJECTORS, Sizes
from rrepa_lab.bench.flops import aligned_layers
from rrepa_lab.flow.tarflow.config import FlowConfig
from rrepa_lab.flow.tarflow.transformer import mlp_width

FLOAT32, BFLOAT16 = 4, 2  # bytes


class Footprint(NamedTuple):
    """Bytes."""

    weights: float  # float32, with projectors; with bfloat16 also their copies for the products
    gradients: float
    optimizer: float  # two moments of AdamW
    average: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def footprint(
    flow: FlowConfig,
    align: AlignConfig,
    batch: int,
    parameters: int,
    *,
    teacher_dims: tuple[int, ...] = (),
    bfloat16: bool = False,
    checkpointing: bool = False,
    plain: bool = False,
) -> Footprint:
    """Memory of one process.

    Args:
        align: its blocks and layers count from 1.
        batch: images of this process.
        parameters: of flow and projectors.
        teacher_dims: E of each teacher; the teachers themselves are not counted.
        plain: as in `flops.step_work`.
    """
    state = FLOAT32 * parameters
    copies = BFLOAT16 * parameters if bfloat16 else 0
    apart = align.labels == "dropped" and align.taps  # a second pass, all of whose layers are kept
    layers = sum(flow.depths) * (2 if apart else 1) + _repeated_layers(flow, align, plain)
    kept = batch * flow.tokens * _numbers(flow, align, layers, teacher_dims, bfloat16, checkpointing)
    return Footprint(state + copies, state, 2 * state, state, kept)


def layer_bytes(flow: FlowConfig, bfloat16: bool) -> float:
    """What a layer keeps of one token.

    Norms and residual sums are float32 in any case; the inputs of matrix products are bfloat16 where they run in it.
    """
    width, gated = flow.width, flow.mlp == "swiglu"
    hidden = mlp_width(width, flow.mlp_ratio, gated)
    product = BFLOAT16 if bfloat16 else FLOAT32
    sums = 2 * width * FLOAT32  # the inputs of both norms
    # inputs of four products: both norms' results, the attended values and the activated hidden layer
    inputs = (3 * width + hidden) * product
    attention = (3 * width + width) * product + flow.width // flow.head_width * FLOAT32  # q, k, v, result, log-sum of exp
    rotated = 2 * width * product if flow.positions == "rotary" else 0
    activation = (3 if gated else 1) * hidden * product  # before it; gate, its activation and the other half
    return sums + inputs + attention + rotated + activation


def _repeated_layers(flow: FlowConfig, align: AlignConfig, plain: bool) -> int:
    """Layers that a strategy runs besides those of the encoding pass, whose activations are kept as well."""
    aligned = aligned_layers(align)
    if not aligned or align.strategy not in ("detach", "reverse", "reverse-exact", "reverse-cached"):
        return 0
    if align.strategy == "detach":
        return sum(aligned.values()) if plain else 0
    if align.strategy == "reverse-cached":
        return sum(flow.depths[min(aligned) - 1 :]) if plain else 0
    if align.strategy == "reverse-exact":
        return sum(flow.depths)
    if not plain and not align.refinements:
        return 0
    return (1 + align.refinements) * sum(flow.depths[min(aligned) - 1 :]) + sum(aligned.values())


def _numbers(
    flow: FlowConfig, align: AlignConfig, depth: int, teacher_dims: tuple[int, ...], bfloat16: bool, checkpointing: bool
) -> float:
    """Bytes that the graph keeps of one token, which runs through so many layers."""
    layer, one = layer_bytes(flow, bfloat16), FLOAT32 * flow.width
    ends = flow.blocks * FLOAT32 * (flow.width + 6 * flow.token_size)  # input of the last product; tokens, mu, alpha
    # with checkpointing each layer keeps its input alone, and one layer at a time has all
    layers = depth * one + layer if checkpointing else depth * layer
    product = BFLOAT16 if bfloat16 else FLOAT32
    kind = PROJECTORS[align.projector]
    sizes = [Sizes(flow.width, align.projector_width, dim, flow.side) for dim in teacher_dims]
    projectors = sum(product * (flow.width + kind.kept(one)) + FLOAT32 * 3 * one.dim for one in sizes)
    return layers + ends + len(align.taps) * projectors
