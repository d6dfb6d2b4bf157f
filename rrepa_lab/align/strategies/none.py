"""No alignment: the encoding pass alone."""

from torch import Tensor

from rrepa_lab.align.strategy import STRATEGIES, Features, Strategy
from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.taps import Tap


def none(flow: FlowModel, x: Tensor, condition: Condition, taps: list[Tap], refinements: int) -> Features:
    """No features."""
    return Features(flow(x, condition), {})


STRATEGIES.register("none")(Strategy(none))
