"""Floating-point operations of a training step, counted from the settings.

Two operations for each multiply and add of a matrix product; norms, activations and the optimizer are left out, as
torch.utils.flop_counter leaves them out. Attention is counted over all pairs of tokens, although it is causal: kernels that
skip the masked half do less. Symbols: T tokens of P numbers; D width; K classes; E numbers of a teacher's feature.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.projector_kind import PROJECTORS, Sizes
from rrepa_lab.flow.taps import Tap
from rrepa_lab.flow.tarflow.config import FlowConfig
from rrepa_lab.flow.tarflow.transformer import mlp_width

# strategies whose cost is known; another one is counted as `forward`
COUNTED = ("none", "forward", "detach", "reverse", "reverse-exact", "reverse-cached")


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass for one image: of linear maps, which have weights, and of attention, which has none."""

    linear: float = 0.0
    attention: float = 0.0

    def __add__(self, other: "Work") -> Self:
        return type(self)(self.linear + other.linear, self.attention + other.attention)

    @property
    def forward(self) -> float:
        """A forward pass."""
        return self.linear + self.attention

    @property
    def to_input(self) -> float:
        """A backward pass to the input alone: one product for each linear map, two for each of attention."""
        return self.linear + 2 * self.attention

    @property
    def backward(self) -> float:
        """A backward pass to input and weights."""
        return 2 * (self.linear + self.attention)


class StepWork(NamedTuple):
    """Operations of a training step for one image."""

    flow: float  # forward and backward, with the passes of the strategy
    projectors: float
    strategy: str  # that was counted

    @property
    def total(self) -> float:
        """All of them."""
        return self.flow + self.projectors


def layer_work(flow: FlowConfig) -> Work:
    """A Transformer layer on all tokens."""
    tokens, width, gated = flow.tokens, flow.width, flow.mlp == "swiglu"
    hidden = mlp_width(width, flow.mlp_ratio, gated)
    linear = 4 * width**2 + (3 if gated else 2) * hidden * width
    return Work(2.0 * tokens * linear, 4.0 * tokens**2 * width)


def entry_work(flow: FlowConfig) -> Work:
    """From tokens to the input of the first layer."""
    return Work(2.0 * flow.tokens * flow.token_size * flow.width + 2.0 * max(0, flow.classes) * flow.width)


def exit_work(flow: FlowConfig) -> Work:
    """From the last layer to mu and alpha."""
    return Work(2.0 * flow.tokens * flow.width * flow.token_size * (1 if flow.volume_preserving else 2))


def layers_work(flow: FlowConfig, count: int) -> Work:
    """So many layers."""
    one = layer_work(flow)
    return Work(one.linear * count, one.attention * count)


def block_work(flow: FlowConfig, number: int) -> Work:
    """A whole block."""
    return entry_work(flow) + layers_work(flow, flow.layers_of(number)) + exit_work(flow)


def aligned_layers(align: AlignConfig) -> dict[int, int]:
    """Aligned block -> its highest aligned layer, for blocks and layers that count from 1."""
    taps = [Tap.parse(name) for name in align.taps]
    return {t: max(int(tap.layer) for tap in taps if tap.block == t) for t in sorted({tap.block for tap in taps})}


def step_work(
    flow: FlowConfig,
    align: AlignConfig,
    teacher_dims: tuple[int, ...] = (),
    checkpointing: bool = False,
    plain: bool = False,
) -> StepWork:
    """A training step of a flow for one image: losses, and their gradient.

    Args:
        align: its blocks and layers count from 1.
        teacher_dims: E of each teacher; the teachers' own passes are not counted here.
        checkpointing: whether the layers are run again in each backward pass.
        plain: by the passes that define a strategy, as sharded trainings have them, not by the one-pass form.
    """
    layers = aligned_layers(align)
    strategy = align.strategy if align.strategy in COUNTED else "forward"
    strategy = strategy if layers else "none"
    counter, apart = _Counter(flow, layers, checkpointing), align.labels == "dropped"
    match strategy:
        case "detach" | "reverse-cached" if not plain:
            total = counter.plain() + counter.features_of_segments() if apart else counter.segments(reverse=False)
        case "reverse" if not plain and not align.refinements:
            total = counter.plain() + counter.rebuilt_segments() if apart else counter.segments(reverse=True)
        case "detach":
            total = counter.plain() + counter.features_alone()
        case "reverse-cached":
            total = counter.plain() + counter.cached()
        case "reverse":
            total = counter.plain() + counter.rebuilding(align.refinements)
        case "reverse-exact":
            total = counter.plain() + counter.token_loop()
        case _:
            total = counter.plain() + (counter.to_features() if apart and layers else 0.0)
    if apart and layers:  # the pass without labels that the features belong to
        total += sum(block_work(flow, number).forward for number in range(1, flow.blocks + 1))
    products = PROJECTORS[align.projector].products
    each = [products(Sizes(flow.width, align.projector_width, dim, flow.side)) for dim in teacher_dims]
    return StepWork(total, 3 * 2.0 * flow.tokens * len(align.taps) * sum(each), strategy)


@dataclass(frozen=True)
class _Counter:
    """Counts the passes of a strategy.

    Args:
        layers: aligned block -> its highest aligned layer.
    """

    flow: FlowConfig
    layers: dict[int, int]
    checkpointing: bool

    def plain(self) -> float:
        """An encoding pass, and its backward pass, which does not go to the image."""
        blocks = range(1, self.flow.blocks + 1)
        total = sum(block_work(self.flow, t).forward + block_work(self.flow, t).backward + self.again(t) for t in blocks)
        return total - self.to_tokens

    @property
    def to_tokens(self) -> float:
        """The part of a backward pass from the first layer to the tokens."""
        return 2.0 * self.flow.tokens * self.flow.token_size * self.flow.width

    def again(self, number: int, upto: int | None = None) -> float:
        """The layers of a block once more, in the backward pass of a flow that does not keep their activations.

        PyTorch stops before the last product of a layer, whose result the backward pass does not need.
        """
        if not self.checkpointing:
            return 0.0
        flow, count = self.flow, self.flow.layers_of(number) if upto is None else upto
        last = 2.0 * flow.tokens * mlp_width(flow.width, flow.mlp_ratio, flow.mlp == "swiglu") * flow.width
        return count * (layer_work(flow).forward - last)

    def segments(self, reverse: bool) -> float:
        """The encoding pass with several vector-Jacobian products of each block from the lowest aligned one up.

        See `align.segments`: (a) the likelihood to the block's input, (b) the features to it, (c) all to the parameters.
        """
        lowest, total = min(self.layers), 0.0
        for t in range(1, self.flow.blocks + 1):
            work = block_work(self.flow, t)
            total += work.forward + work.backward + self.again(t)
            if t < lowest:
                total -= self.to_tokens if t == 1 else 0
                continue
            several = reverse or t in self.layers
            total -= self.to_tokens if several or t == 1 else 0  # (c) ends at the parameters
            if several and t > 1:
                needed = t > lowest or lowest > 1
                total += (work.to_input + self.again(t)) if needed else 0
            if reverse and t in self.layers:
                part = entry_work(self.flow) + layers_work(self.flow, self.layers[t])
                total += part.to_input + self.again(t, self.layers[t])
        return total

    def to_features(self) -> float:
        """The backward pass from the features of a pass of their own to the first block."""
        highest = max(self.layers)
        below = sum(block_work(self.flow, t).backward + self.again(t) for t in range(1, highest))
        part = entry_work(self.flow) + layers_work(self.flow, self.layers[highest])
        return below + part.backward + self.again(highest, self.layers[highest]) - self.to_tokens

    def features_of_segments(self) -> float:
        """Step (c) of `segments` for the features of a pass of their own, whose gradient stays in their block."""
        total = self.below_again()
        for t, layer in self.layers.items():
            part = entry_work(self.flow) + layers_work(self.flow, layer)
            total += part.backward - self.to_tokens + self.again(t, layer)
        return total

    def below_again(self) -> float:
        """The layers below the lowest aligned block once more: autograd visits them, although no gradient arrives there."""
        return sum(self.again(t) for t in range(1, min(self.layers)))

    def rebuilt_segments(self) -> float:
        """Steps (b) and (c) of `segments` for the features of a pass of their own."""
        total = self.below_again()
        for t in range(min(self.layers), self.flow.blocks + 1):
            total += block_work(self.flow, t).backward - self.to_tokens + self.again(t)
            if t in self.layers:
                part = entry_work(self.flow) + layers_work(self.flow, self.layers[t])
                total += part.to_input + self.again(t, self.layers[t])
        return total

    def cached(self) -> float:
        """A call of each block on its cached input from the lowest aligned one up, and the backward pass of the features."""
        total = sum(block_work(self.flow, t).forward for t in range(min(self.layers), self.flow.blocks + 1))
        return total + self.features_of_segments() - self.below_again()

    def features_alone(self) -> float:
        """The features of each aligned block from its detached input, and their backward pass."""
        total = 0.0
        for t, layer in self.layers.items():
            part = entry_work(self.flow) + layers_work(self.flow, layer)
            total += part.forward + part.backward + self.again(t, layer) - self.to_tokens
        return total

    def rebuilding(self, refinements: int) -> float:
        """A pseudo-reverse pass with refinements, and its backward pass."""
        lowest, total = min(self.layers), 0.0
        for t in range(lowest, self.flow.blocks + 1):
            work = block_work(self.flow, t)
            total += (1 + refinements) * (work.forward + work.backward + self.again(t))
            total -= self.to_tokens  # the first one starts from tokens without a graph
            if t in self.layers:
                part = entry_work(self.flow) + layers_work(self.flow, self.layers[t])
                total += part.forward + part.backward + self.again(t, self.layers[t])
        return total

    def token_loop(self) -> float:
        """The token-by-token reverse pass: each token attends to those before it alone.

        The last token is processed in aligned blocks alone, for its features.
        """
        lowest, tokens, total = min(self.layers), self.flow.tokens, 0.0
        for t in range(1, self.flow.blocks + 1):
            whole, steps = block_work(self.flow, t), tokens if t in self.layers else tokens - 1
            work = Work(whole.linear * steps / tokens, whole.attention * steps * (steps + 1) / (2 * tokens**2))
            total += work.forward + (work.backward if t >= lowest else 0)
        return total
