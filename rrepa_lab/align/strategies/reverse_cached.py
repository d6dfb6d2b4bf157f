"""`reverse-cached`: Algorithm 2 of the paper by the letter, features on the CACHED input; its gradient is that of `detach`.

The pseudo-reverse pass of the paper (arXiv 2511.22345, Algorithm 2) computes mu and alpha of block t from the cached input of
the encoding pass. Read literally, the hidden states of that same call are the features. The rebuilt tokens,
mu + exp(alpha) * tokens, then serve nothing: the features depend on the cache, which is detached, and on block t up to layer l.
So the gradient is exactly that of `detach`, while `reverse` computes the features on the rebuilt tokens and reaches all of
block t and every block after it. Values are the same in all three. A published number of "reverse" alignment may stand for
either reading; this strategy is here to compare them.
"""

import torch
from torch import Tensor

from rrepa_lab.align.segments import segmented
from rrepa_lab.align.strategy import STRATEGIES, Features, Strategy, by_block, by_tap
from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.taps import Tap


def passes(flow: FlowModel, x: Tensor, condition: Condition, taps: list[Tap], refinements: int) -> Features:
    """The encoding pass, then a call of each block on its cached input, from the last block to the lowest aligned one."""
    numbers = range(min(tap.block for tap in taps), flow.config.blocks + 1)
    encoded = flow(x, condition, [Tap(number, "in").name for number in numbers])
    tokens, wanted = encoded.z.detach(), by_block(taps)
    found: dict[int, dict[int, Tensor]] = {}
    for number in reversed(numbers):
        block, cached = flow.block(number), encoded.states[Tap(number, "in").name].detach()
        affine = block(block.affine, cached, condition.of_block(number), wanted.get(number, ()))
        found[number] = affine.states
        tokens = affine.mu + torch.exp(affine.alpha) * tokens
    return Features(encoded, by_tap(found, taps))


STRATEGIES.register("reverse-cached")(Strategy(passes, one_pass=segmented(reverse=False)))
