"""A batch becomes losses; no optimizer here."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rrepa_lab.align.aligner import Aligner
from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.projector import Projectors
from rrepa_lab.flow.likelihood import flow_loss
from rrepa_lab.flow.tarflow.model import TarFlow


class Losses(NamedTuple):
    """Scalars of one batch; `total` is what is minimised."""

    total: Tensor  # L_nf + lambda * L_align
    flow: Tensor  # L_nf, nats per dimension without the constant
    similarity: dict[str, Tensor]  # tap -> mean cosine with the encoder
    z_square: Tensor | None = None  # (T, P) mean of z^2 over the batch, detached, of a volume-preserving flow


class Objective(nn.Module):
    """The flow with its projectors. Training goes through `forward`, so that data-parallel wrappers see every pass.

    In a step without a target the projectors have a gradient of zero, since these wrappers expect one of every parameter.

    Args:
        plain: align by a strategy's plain passes, see `align.strategy.Strategy`.
    """

    def __init__(self, flow: TarFlow, projectors: Projectors, align: AlignConfig, plain: bool = False) -> None:
        super().__init__()
        self.flow, self.projectors, self.plain = flow, projectors, plain
        self.aligner = Aligner(align, projectors)

    def forward(
        self, x: Tensor, y: Tensor | None, target: Tensor | None, mask: Tensor | None = None, factor: float = 1.0
    ) -> Losses:
        """Losses of noised images (B, C, H, W) with labels (B,) and encoder features (B, T, E) of the clean images.

        Args:
            mask: (B, T) bool, tokens that are hidden from the projectors.
            factor: of lambda at this step, by `align.schedule`.
        """
        encoded, alignment, near = self.aligner(self.flow, x, y, target, plain=self.plain, mask=mask)
        flow = flow_loss(encoded.z, encoded.logdet, self.flow.prior_var)
        square = None if self.flow.prior_var is None else encoded.z.detach().square().mean(dim=0)
        if not near:
            unused = [parameter.sum() for parameter in self.projectors.parameters()]
            return Losses(flow + 0.0 * torch.stack(unused).sum() if unused else flow, flow, {}, square)
        total = flow + self.aligner.config.weight * factor * alignment
        return Losses(total, flow, {tap: value.mean() for tap, value in near.items()}, square)
