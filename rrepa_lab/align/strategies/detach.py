"""`detach`: features of the encoding pass with the input of block t detached; the gradient reaches block t up to layer l."""

from torch import Tensor

from rrepa_lab.align.segments import segmented
from rrepa_lab.align.strategy import STRATEGIES, Features, Strategy, by_block, by_tap
from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.taps import Tap


def passes(flow: FlowModel, x: Tensor, condition: Condition, taps: list[Tap], refinements: int) -> Features:
    """The encoding pass, and for each aligned block another one from its detached input."""
    encoded = flow(x, condition, sorted({Tap(tap.block, "in").name for tap in taps}))
    found = {}
    for number, layers in by_block(taps).items():
        block, tokens = flow.block(number), encoded.states[Tap(number, "in").name].detach()
        found[number] = block(block.features, tokens, condition.of_block(number), layers)
    return Features(encoded, by_tap(found, taps))


STRATEGIES.register("detach")(Strategy(passes, one_pass=segmented(reverse=False)))
