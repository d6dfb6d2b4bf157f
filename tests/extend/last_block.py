"""A strategy: as forward, but the gradient stops at the input of the last block."""

from torch import Tensor

import rrepa_lab as rl
from rrepa_lab.align.strategy import STRATEGIES, Features, Strategy
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.taps import Tap


def features(flow: FlowModel, x: Tensor, condition: rl.Condition, taps: list[Tap], refinements: int) -> Features:
    """Layers of the last block, which is run again from its detached input."""
    last = flow.config.blocks
    encoded = flow(x, condition, f"block.{last}.in")
    block, tokens = flow.block(last), encoded.states[f"block.{last}.in"].detach()
    layers = [int(tap.layer) for tap in taps if tap.block == last]
    found = block(block.features, tokens, condition.of_block(last), layers)
    return Features(encoded, {tap.name: found[int(tap.layer)] for tap in taps if tap.block == last})


STRATEGIES.register("last-block")(Strategy(features))
