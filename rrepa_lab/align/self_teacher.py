"""The flow as its own teacher: features of its averaged weights, at a deeper tap and from a cleaner image.

Source: SRA (arXiv 2505.02831) aligns an earlier layer under much noise with a later layer of the moving average under less.
A flow has one level of noise; the teacher's image has a part of it, `align.self_noise`. The teacher is not given the label.
"""

import torch
from torch import Tensor

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.errors import LabError
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.taps import Depths, Tap, depths_of


class SelfTeacher:
    """Averaged weights of the flow that is trained, as a teacher.

    Args:
        flow: with the averaged weights; of a loaded run, which holds these alone, its own.
        align: its blocks and layers count from 1.

    Attributes: dim, E, the width of the flow; tap, whose states are the features.

    Raises: LabError for an `align.self_tap` that is not the output of a layer.
    """

    def __init__(self, flow: FlowModel, align: AlignConfig) -> None:
        self.flow, self.noise, self.dim = flow, align.self_noise, flow.config.width
        found = flow.resolve(align.self_tap or self_tap(align, flow.config.blocks, flow.config.layers))
        if len(found) != 1 or not isinstance(found[0].layer, int):
            raise LabError(f"align.self_tap {align.self_tap!r} must name the output of one layer, such as block.4.layer.4")
        self.tap: Tap = found[0]

    @torch.no_grad()
    def __call__(self, encoded: Tensor, noised: Tensor | None = None) -> Tensor:
        """Features (B, T, D) of images in the flow's space (B, *shape), float32 at least.

        Args:
            noised: the same with the training noise; the teacher sees `self_noise` of that noise. None: `encoded` itself.
        """
        x = encoded if noised is None else torch.lerp(encoded, noised, self.noise)
        flow, number, layer = self.flow, self.tap.block, int(self.tap.layer)
        condition = flow.condition(None, len(x))
        tokens, _ = flow.encode_blocks(flow.tokenize(x), condition, range(1, number))
        block = flow.block(number)
        found = block(block.features, tokens, condition.of_block(number), [layer])[layer]
        return found if found.dtype.itemsize >= 4 else found.float()


def self_tap(align: AlignConfig, blocks: int, layers: Depths) -> str:
    """The tap that a self-teacher takes by default: the last layer of the highest aligned block."""
    number = max(number for number, _ in align.pairs)
    return Tap(number, depths_of(blocks, layers)[number - 1]).name
