"""Which pass of the flow is aligned, and which parameters its gradient reaches.

| strategy      | features of                                   | gradient reaches (beside the projector)               |
|---------------|-----------------------------------------------|-------------------------------------------------------|
| none          | -                                             | nothing                                               |
| forward       | the encoding pass                             | block t up to layer l, and every block before t       |
| detach        | the encoding pass, block t's input detached   | block t up to layer l                                 |
| reverse       | the pseudo-reverse pass from z.detach()       | all of block t, and every block after t               |
| reverse-exact | the token-by-token reverse pass               | as reverse; the slow reference                        |

Source: R-REPA, arXiv 2511.22345, section 3.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, Self, get_args

import torch
from pydantic import Field
from torch import Tensor

from rrepa_lab.align.segments import encode_with_features
from rrepa_lab.config import Config
from rrepa_lab.flow.contract import FlowOutput
from rrepa_lab.flow.taps import Tap
from rrepa_lab.flow.tarflow.model import TarFlow, label_of_block

Strategy = Literal["none", "forward", "detach", "reverse", "reverse-exact"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


class AlignConfig(Config):
    """What is aligned, how, and how strongly."""

    strategy: Strategy = "none"
    blocks: list[int] = Field([], description="aligned blocks, from 1 at the image; -1 is the last")
    layers: list[int] = Field(
        [2], min_length=1, description="aligned Transformer layers of those blocks, from 1; -1 is the last"
    )
    weight: float = Field(0.1, ge=0, description="lambda, against the loss per dimension")
    refinements: int = Field(0, ge=0, description="reverse: Jacobi steps from the pseudo-reverse towards the exact one")
    projector_width: int = Field(1024, ge=1, le=2**20, description="hidden width of the projectors")

    @property
    def taps(self) -> list[str]:
        """Addresses of the aligned states; none when the strategy is none."""
        if self.strategy == "none":
            return []
        return [Tap(block, layer).name for block in self.blocks for layer in self.layers]

    def counted(self, blocks: int, layers: int) -> Self:
        """With numbers from the end (-1 is the last) as numbers from 1, for a flow of so many blocks and layers.

        One that reaches beyond the first is the first.
        """
        found = {"blocks": _counted(self.blocks, blocks), "layers": _counted(self.layers, layers)}
        return self.model_copy(update=found)

    @property
    def place(self) -> str:
        """Where it aligns in words, "on blocks 3,4 at layer 2"."""
        blocks, layers = (",".join(map(str, part)) for part in (self.blocks, self.layers))
        return f"on blocks {blocks} at layer {layers}"


def _counted(numbers: list[int], most: int) -> list[int]:
    return list(dict.fromkeys(number if number > 0 else max(1, most + 1 + number) for number in numbers))


class Features(NamedTuple):
    """An encoding pass and the features to be aligned, which belong to it."""

    encoded: FlowOutput
    aligned: dict[str, Tensor]  # tap -> (B, T, D)


def features(flow: TarFlow, x: Tensor, y: Tensor | None, strategy: str, taps: list[Tap], refinements: int = 0) -> Features:
    """Encode `x` (B, C, H, W) and compute the features (B, T, D) of layer taps the way a strategy asks for.

    The values are the same under every strategy, by invertibility; what differs is the graph behind them. `detach` and
    `reverse` without refinements make do with the encoding pass, see `align.segments`.
    """
    soft = y is not None and y.requires_grad  # a gradient to soft labels takes the plain way
    if not taps or strategy not in ("detach", "reverse") or refinements or soft or not torch.is_grad_enabled():
        return plain_features(flow, x, y, strategy, taps, refinements)
    encoded, found = encode_with_features(flow, x, y, _by_block(taps), reverse=strategy == "reverse")
    return Features(encoded, {tap.name: found[tap.block][int(tap.layer)] for tap in taps})


def plain_features(
    flow: TarFlow, x: Tensor, y: Tensor | None, strategy: str, taps: list[Tap], refinements: int = 0
) -> Features:
    """What `features` gives, by the passes that define each strategy one after the other."""
    if strategy == "none" or not taps:
        return Features(flow(x, y), {})
    names = [tap.name for tap in taps]
    if strategy == "forward":
        encoded = flow(x, y, names)
        return Features(encoded, encoded.states)
    lowest = min(tap.block for tap in taps)
    inputs = [Tap(number, "in") for number in range(lowest, flow.config.blocks + 1)]
    encoded = flow(x, y, [tap.name for tap in inputs])
    if strategy == "reverse-exact":
        return Features(encoded, flow.inverse(encoded.z.detach(), y, method="sequential", taps=names).states)
    cache = {tap.block: encoded.states[tap.name].detach() for tap in inputs}
    label = flow.label_weights(y, len(x))
    layers = _by_block(taps)
    if strategy == "detach":
        read = {t: flow.block(t).features(cache[t], label_of_block(label, t), wanted) for t, wanted in layers.items()}
    else:
        read = pseudo_reverse(flow, encoded.z.detach(), cache, label, layers, refinements).features
    return Features(encoded, {tap.name: read[tap.block][int(tap.layer)] for tap in taps})


def _by_block(taps: list[Tap]) -> dict[int, set[int]]:
    """Block -> the layers asked for."""
    layers: dict[int, set[int]] = {}
    for tap in taps:
        layers.setdefault(tap.block, set()).add(int(tap.layer))
    return layers


class PseudoReverse(NamedTuple):
    """Features and rebuilt tokens of a pseudo-reverse pass, by block number."""

    features: dict[int, dict[int, Tensor]]  # block -> layer -> (B, T, D)
    rebuilt: dict[int, Tensor]  # block -> the tokens on its image side, (B, T, P)


def pseudo_reverse(
    flow: TarFlow,
    z: Tensor,
    cache: Mapping[int, Tensor],
    label: Tensor | None,
    layers: Mapping[int, set[int]],
    refinements: int = 0,
) -> PseudoReverse:
    """Walk from the noise towards the image in parallel passes, with the graph of the generating pass.

    mu and alpha of block t come from the tokens the encoding pass has already seen, all at once, and the tokens are
    rebuilt from those of block t + 1: x^{t-1} = mu(cache) + exp(alpha(cache)) * x^t. Their values equal the cached ones,
    but they carry a graph that reaches the blocks after t. Features are computed on the REBUILT tokens: on the
    cached ones they would have the gradient of `detach`.

    Args:
        z: (B, T, P), detached.
        cache: block t -> its input when encoding, (B, T, P), detached, for every block from the lowest aligned one up.
        label: (B, K) or (B, N, K) class weights, or None.
        layers: block t -> the layers whose features are wanted.
        refinements: k more rebuilds with mu and alpha taken from the rebuilt tokens, each a Jacobi step of the
            triangular system: the gradient is exact for k = T - 1.
    """
    tokens = z
    found: dict[int, dict[int, Tensor]] = {}
    rebuilt: dict[int, Tensor] = {}
    for number in sorted(cache, reverse=True):
        block, seen = flow.block(number), label_of_block(label, number)
        guess = cache[number]
        for _ in range(1 + refinements):
            affine = block.affine(guess, seen)
            guess = affine.mu + torch.exp(affine.alpha) * tokens
        tokens = rebuilt[number] = guess
        if layers.get(number):
            found[number] = block.features(tokens, seen, layers[number])
    return PseudoReverse(found, rebuilt)
