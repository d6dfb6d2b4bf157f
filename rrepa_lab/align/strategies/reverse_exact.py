"""`reverse-exact`: features of the token-by-token generating pass from z.detach(); the slow reference of `reverse`."""

from torch import Tensor

from rrepa_lab.align.strategy import STRATEGIES, Features, Strategy
from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.taps import Tap


def passes(flow: FlowModel, x: Tensor, condition: Condition, taps: list[Tap], refinements: int) -> Features:
    """The encoding pass, then the token loop."""
    encoded = flow(x, condition)
    names = [tap.name for tap in taps]
    return Features(encoded, flow.inverse(encoded.z.detach(), condition, method="sequential", taps=names).states)


STRATEGIES.register("reverse-exact")(Strategy(passes))
