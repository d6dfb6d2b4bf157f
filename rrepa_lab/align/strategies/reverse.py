"""`reverse`: features of the pseudo-reverse pass; the gradient reaches all of block t, and every block after t."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rrepa_lab.align.segments import segmented
from rrepa_lab.align.strategy import STRATEGIES, Features, Strategy, by_block, by_tap
from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.taps import Tap


def passes(flow: FlowModel, x: Tensor, condition: Condition, taps: list[Tap], refinements: int) -> Features:
    """The encoding pass, then the pseudo-reverse pass from its detached z."""
    numbers = range(min(tap.block for tap in taps), flow.config.blocks + 1)
    encoded = flow(x, condition, [Tap(number, "in").name for number in numbers])
    cache = {number: encoded.states[Tap(number, "in").name].detach() for number in numbers}
    found = pseudo_reverse(flow, encoded.z.detach(), cache, condition, by_block(taps), refinements).features
    return Features(encoded, by_tap(found, taps))


class PseudoReverse(NamedTuple):
    """Features and rebuilt tokens of a pseudo-reverse pass, by block number."""

    features: dict[int, dict[int, Tensor]]  # block -> layer -> (B, T, D)
    rebuilt: dict[int, Tensor]  # block -> the tokens on its image side, (B, T, P)


def pseudo_reverse(
    flow: FlowModel,
    z: Tensor,
    cache: Mapping[int, Tensor],
    condition: Condition,
    layers: Mapping[int, set[int]],
    refinements: int = 0,
) -> PseudoReverse:
    """From the noise towards the image in parallel passes, with the graph of the generating pass.

    mu and alpha of block t come from the tokens of the encoding pass, all at once, and the tokens are
    rebuilt from those of block t + 1: x^{t-1} = mu(cache) + exp(alpha(cache)) * x^t. Their values equal the cached ones,
    but they carry a graph that reaches the blocks after t. Features are computed on the REBUILT tokens: on the
    cached ones they would have the gradient of `detach`.

    Args:
        z: (B, T, P), detached.
        cache: block t -> its input when encoding, (B, T, P), detached, for every block from the lowest aligned one up.
        layers: block t -> the layers whose features are wanted.
        refinements: k more rebuilds with mu and alpha taken from the rebuilt tokens, each a Jacobi step of the
            triangular system: the gradient is exact for k = T - 1.
    """
    tokens = z
    found: dict[int, dict[int, Tensor]] = {}
    rebuilt: dict[int, Tensor] = {}
    for number in sorted(cache, reverse=True):
        block, own = flow.block(number), condition.of_block(number)
        guess = cache[number]
        for _ in range(1 + refinements):
            affine = block(block.affine, guess, own)
            guess = affine.mu + torch.exp(affine.alpha) * tokens
        tokens = rebuilt[number] = guess
        if layers.get(number):
            found[number] = block(block.features, tokens, own, layers[number])
    return PseudoReverse(found, rebuilt)


STRATEGIES.register("reverse")(Strategy(passes, one_pass=segmented(reverse=True)))
