"""What a flow is conditioned on: class weights for every block, and classifier-free guidance, as one value."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rrepa_lab.checks import real_number


class Guidance(NamedTuple):
    """Classifier-free guidance on mu and alpha (TARFlow, arXiv 2412.06329, section 3.4).

    At token i = 0..T-1: alpha <- alpha_c + w * (alpha_c - alpha_u), mu likewise, with w = `scale`, or
    `scale` * i / (T - 1) when `annealed`. `temperature` divides the attention logits of the unconditional
    branch only; other values than 1 weaken that branch on purpose.

    Example:
        >>> Guidance.of(2.0).branches, Guidance.of(0.0).branches
        (2, 1)
    """

    scale: float = 0.0
    annealed: bool = False
    temperature: float = 1.0

    @classmethod
    def of(cls, value: "float | Guidance") -> "Guidance":
        """A weight alone, or all settings, checked: scale finite and >= 0, temperature finite and > 0; LabError otherwise."""
        scale, annealed, temperature = value if isinstance(value, Guidance) else (value, False, 1.0)
        return cls(real_number("guidance", scale), annealed, real_number("temperature", temperature, above=True))

    @property
    def branches(self) -> int:
        """Copies of the batch that the Transformer processes: 2, the conditional one first, or 1 without guidance."""
        return 2 if self.scale else 1

    def repeat_for_cfg(self, x: Tensor) -> Tensor:
        """A batch (B, ...) once for each branch, (branches * B, ...)."""
        return x if self.branches == 1 else torch.cat([x, x])

    def weight(self, start: int, tokens: int, like: Tensor) -> float | Tensor:
        """w of the tokens of `like` (B, n, P): one number, or (n, 1) when annealed.

        Args:
            start: position of the token before the first of these n, in the block's order.
            tokens: T.
        """
        if not self.annealed:
            return self.scale
        positions = torch.arange(start + 1, start + 1 + like.shape[1], dtype=like.dtype, device=like.device)
        return self.scale * positions[:, None] / (tokens - 1)

    def combine(self, value: Tensor, weight: float | Tensor) -> Tensor:
        """mu or alpha of all branches (branches * B, n, P) -> the guided one (B, n, P), with w from `weight`."""
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


@dataclass(frozen=True, eq=False)
class Condition:
    """Class weights and guidance of a batch; `flow.condition(y, batch)` makes one from labels.

    Class weights sum to 1 for each image: one-hot for a label, uniform for no label. They are (B, K), or (B, N, K) where
    they differ from block to block, or None for a flow without classes.

    Example:
        >>> condition = Condition(torch.eye(10)[:4], Guidance(2.0))
        >>> condition.rows(slice(0, 2)).branch_weights().shape
        torch.Size([4, 10])
    """

    weights: Tensor | None = None
    guidance: Guidance = UNGUIDED

    def of_block(self, number: int) -> Self:
        """With the class weights (B, K) of the block with this number, from 1."""
        if self.weights is None or self.weights.ndim == 2:
            return self
        return replace(self, weights=self.weights[:, number - 1])

    def rows(self, rows: slice | Tensor) -> Self:
        """Of some images of the batch."""
        return self if self.weights is None else replace(self, weights=self.weights[rows])

    def without_guidance(self) -> Self:
        """The conditional branch alone."""
        return replace(self, guidance=UNGUIDED)

    def branch_weights(self) -> Tensor | None:
        """Class weights of all branches (branches * B, K), the conditional ones first; of a condition of one block."""
        if self.weights is None or self.guidance.branches == 1:
            return self.weights
        return torch.cat([self.weights, torch.full_like(self.weights, 1 / self.weights.shape[-1])])
