"""`forward`: features of the encoding pass; the gradient reaches block t up to layer l, and every block before t."""

from torch import Tensor

from rrepa_lab.align.strategy import STRATEGIES, Features, Strategy
from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.taps import Tap


def forward(flow: FlowModel, x: Tensor, condition: Condition, taps: list[Tap], refinements: int) -> Features:
    """The states of the encoding pass."""
    encoded = flow(x, condition, [tap.name for tap in taps])
    return Features(encoded, encoded.states)


STRATEGIES.register("forward")(Strategy(forward))
