"""Which pass of the flow is aligned, and which parameters its gradient reaches.

| strategy      | features of                                   | gradient reaches (beside the projector)               |
|---------------|-----------------------------------------------|-------------------------------------------------------|
| none          | -                                             | nothing                                               |
| forward       | the encoding pass                             | block t up to layer l, and every block before t       |
| detach        | the encoding pass, block t's input detached   | block t up to layer l                                 |
| reverse       | the pseudo-reverse pass from z.detach()       | all of block t, and every block after t               |
| reverse-exact | the token-by-token reverse pass               | as reverse; the slow reference                        |
| reverse-cached| a pseudo-reverse pass on the cached inputs    | as detach: Algorithm 2 of the paper by the letter     |

Each is one file below `align/strategies/`. Source: R-REPA, arXiv 2511.22345, section 3.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import FlowModel, FlowOutput
from rrepa_lab.flow.taps import Tap
from rrepa_lab.registry import Registry


class Features(NamedTuple):
    """An encoding pass and the features to be aligned, which belong to it."""

    encoded: FlowOutput
    aligned: dict[str, Tensor]  # tap -> (B, T, D)


# flow, images (B, C, H, W), condition, layer taps, refinements -> features
FeaturePass = Callable[[FlowModel, Tensor, Condition, list[Tap], int], Features]


@dataclass(frozen=True)
class Strategy:
    """How the features of an alignment are computed; by that, which parameters the gradient of its loss reaches.

    The values are the same under every strategy, by invertibility; what differs is the graph behind them.

    Args:
        passes: computes them by the passes that define the strategy.
        one_pass: the same values and gradients from the encoding pass alone, see `align.segments`; it has no refinements,
            and one backward pass. None if there is no such form.
    """

    passes: FeaturePass
    one_pass: FeaturePass | None = None

    def features(
        self, flow: FlowModel, x: Tensor, condition: Condition, taps: list[Tap], refinements: int = 0, plain: bool = False
    ) -> Features:
        """Encode `x` (B, C, H, W) and compute the features (B, T, D) of layer taps.

        Args:
            plain: by `passes` in any case, whose graph can be differentiated several times.
        """
        soft = condition.weights is not None and condition.weights.requires_grad  # gradients of class weights need `passes`
        if self.one_pass is None or plain or not taps or refinements or soft or not torch.is_grad_enabled():
            return self.passes(flow, x, condition, taps, refinements)
        return self.one_pass(flow, x, condition, taps, refinements)


STRATEGIES: Registry[Strategy] = Registry(
    "strategy", "rrepa_lab.align.strategies", order=("none", "forward", "detach", "reverse", "reverse-exact", "reverse-cached")
)


def strategy_names() -> tuple[str, ...]:
    """All strategies: those of the paper in its order, the exact pass, then registered ones."""
    return tuple(STRATEGIES.names())


def by_tap(features: Mapping[int, Mapping[int, Tensor]], taps: list[Tap]) -> dict[str, Tensor]:
    """Features by block and layer as features by the names of these taps."""
    return {tap.name: features[tap.block][int(tap.layer)] for tap in taps}


def by_block(taps: list[Tap]) -> dict[int, set[int]]:
    """Block -> the layers of it among these taps."""
    layers: dict[int, set[int]] = {}
    for tap in taps:
        layers.setdefault(tap.block, set()).add(int(tap.layer))
    return layers
