"""The alignment of a flow with a teacher, as one object: target, projectors, similarity, loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.projector import Projectors
from rrepa_lab.align.similarity import LOSSES, patch_cosine
from rrepa_lab.align.strategy import STRATEGIES, Features
from rrepa_lab.align.target import Targets
from rrepa_lab.errors import LabError
from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import FlowModel, FlowOutput
from rrepa_lab.flow.taps import Tap


class AlignmentOutput(NamedTuple):
    """An encoding pass, and how near its features are to the teacher's."""

    encoded: FlowOutput
    loss: Tensor  # (), by `align.similarity`, mean over taps and images, without lambda; 0 where nothing is aligned
    similarity: dict[str, Tensor]  # tap -> (B,) mean cosine over patches


@dataclass(frozen=True, eq=False)
class Aligner:
    """How the layers of a flow are aligned with a teacher; training and all instruments use this one.

    Args:
        config: all settings of the alignment.
        projectors: of the taps.
        targets: the teachers' features on the flow's grid; None where they are passed in.

    Of several teachers the features stand side by side, E = E1 + E2 + ..., each has its own projectors, and a similarity is
    the mean over the teachers.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> aligner, x = run.aligner(), run.data("test", 4).x
        >>> aligner(run.flow, x, None, aligner.target(x)).similarity["block.3.layer.2"].shape
        torch.Size([4])
    """

    config: AlignConfig
    projectors: Projectors
    targets: Targets | None = None

    def __call__(
        self,
        flow: FlowModel,
        x: Tensor,
        y: Tensor | Condition | None,
        target: Tensor | None,
        taps: Sequence[str] | None = None,
        plain: bool = False,
        mask: Tensor | None = None,
    ) -> AlignmentOutput:
        """Encode images, and compare their features with the target.

        With `align.labels` dropped the features are those of a second pass without the labels, and the encoding, of which the
        likelihood is taken, keeps them.

        Args:
            x: (B, C, H, W), what the flow encodes.
            y: labels as in `TarFlow.forward`.
            target: (B, T, E) of the same images, see `target`; None aligns nothing.
            taps: layer taps; those of the configuration by default.
            plain: by passes whose graph can be differentiated several times, see `Strategy.features`.
            mask: (B, T) bool, tokens that are hidden from a projector that takes a mask.
        """
        names = self.config.taps if taps is None else taps
        encoded, aligned = self.features(flow, x, y, names if target is not None else (), plain)
        if target is None or not aligned:
            return AlignmentOutput(encoded, x.new_zeros(()), {})
        projected = {tap: self.projectors.project(tap, states, mask) for tap, states in aligned.items()}
        near = {tap: patch_cosine(states, target, self.projectors.dims) for tap, states in projected.items()}
        if self.config.similarity == "cosine":
            return AlignmentOutput(encoded, alignment_loss(near), near)
        loss = LOSSES[self.config.similarity]
        losses = [loss(states, target, self.projectors.dims).mean() for states in projected.values()]
        return AlignmentOutput(encoded, torch.stack(losses).mean(), near)

    def features(
        self, flow: FlowModel, x: Tensor, y: Tensor | Condition | None, taps: Sequence[str], plain: bool = False
    ) -> Features:
        """The encoding pass, and the features (B, T, D) of layer taps with the graph of the strategy."""
        wanted = layer_taps(flow.resolve(taps)) if taps else []
        strategy = STRATEGIES[self.config.strategy if wanted else "none"]
        given = flow.condition(y, len(x))
        if not wanted or self.config.labels == "given":
            return strategy.features(flow, x, given, wanted, self.config.refinements, plain)
        aligned = strategy.features(flow, x, flow.condition(None, len(x)), wanted, self.config.refinements, plain).aligned
        return Features(flow(x, given), aligned)

    def target(self, clean: Tensor) -> Tensor:
        """The features (B, T, E) of clean images (B, C, H, W) in [-1, 1] that are aligned with, on the flow's grid."""
        if self.targets is None:
            raise LabError("this alignment has no teacher: its targets are passed in")
        return self.targets(clean)

    def similarity(self, tap: str, states: Tensor, target: Tensor) -> Tensor:
        """Mean cosine over patches (B,) of the projected states (B, T, D) of a tap with a target (B, T, E)."""
        return patch_cosine(self.projectors.project(tap, states), target, self.projectors.dims)


def layer_taps(taps: list[Tap]) -> list[Tap]:
    """The taps themselves; LabError for one that is not the output of a layer."""
    for tap in taps:
        if not isinstance(tap.layer, int):
            raise LabError(f"{tap.name} cannot be aligned: only the outputs of layers can, block.<t>.layer.<l>")
    return taps


def alignment_loss(similarities: Mapping[str, Tensor]) -> Tensor:
    """Minus the similarity (B,) of each aligned tap, averaged over taps and images -> (); without lambda."""
    return torch.stack([-value.mean() for value in similarities.values()]).mean()
