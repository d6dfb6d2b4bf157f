"""What a flow is conditioned on."""

from typing import NamedTuple

import torch
from torch import Tensor


class Guidance(NamedTuple):
    """Classifier-free guidance on mu and alpha (TARFlow, arXiv 2412.06329, section 3.4).

    At token i = 0..T-1: alpha <- alpha_c + w * (alpha_c - alpha_u), mu likewise, with w = `scale`, or
    `scale` * i / (T - 1) when `annealed`. `temperature` divides the attention logits of the unconditional
    branch only; other values than 1 weaken that branch on purpose.
    """

    scale: float = 0.0
    annealed: bool = False
    temperature: float = 1.0

    @property
    def branches(self) -> int:
        """Copies of the batch that are read: 2, the conditional one first, or 1 without guidance."""
        return 2 if self.scale else 1

    def copies(self, x: Tensor) -> Tensor:
        """A batch (B, ...) once for each branch."""
        return x if self.branches == 1 else torch.cat([x, x])

    def mix(self, value: Tensor, weight: float | Tensor) -> Tensor:
        """mu or alpha of all branches -> (B, n, P)."""
        if self.branches == 1:
            return value
        conditional, unconditional = value.chunk(2)
        return conditional + weight * (conditional - unconditional)

    def temperatures(self, x: Tensor) -> Tensor | None:
        """Divisor (2B, 1, 1, 1) of the attention logits for a batch (B, ...), None where it is 1 everywhere."""
        if self.branches == 1 or self.temperature == 1.0:
            return None
        divisor = x.new_ones(2 * len(x), 1, 1, 1)
        divisor[len(x) :] = self.temperature
        return divisor


UNGUIDED = Guidance()
