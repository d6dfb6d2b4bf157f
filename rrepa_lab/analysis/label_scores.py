"""Scores of the classes of images: log p and its gradient in the class weights, where only some blocks are given the label."""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from rrepa_lab.analysis.noise import NoiseSamples, image_noise
from rrepa_lab.checks import whole_number
from rrepa_lab.errors import LabError
from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.finite import NotFiniteError, cause, listed, rows_not_finite
from rrepa_lab.flow.inputs import gradients, leaf, usable
from rrepa_lab.flow.likelihood import prior_log_prob
from rrepa_lab.runs.inputs import encoded
from rrepa_lab.runs.run import Run, flow_of


class LabelMask:
    """A flow, its input for images, their noise, and which blocks are given the label."""

    def __init__(
        self,
        run: Run | FlowModel,
        x: Tensor,
        blocks: Collection[int] | None,
        noise: int | NoiseSamples | None,
        batch: int,
    ) -> None:
        self.flow = flow_of(run)
        if self.flow.config.classes == 0:
            raise LabError("this flow was trained without classes: there is nothing to classify")
        self.noise, self.batch = image_noise(run, noise), whole_number("batch", batch, 1)
        self.x = encoded(run, x)
        if not len(self.x):
            raise LabError("no images to classify")
        count = self.flow.config.blocks
        if blocks is not None and not (blocks and all(1 <= number <= count for number in blocks)):
            raise LabError(f"blocks {sorted(blocks)} must be some of 1..{count}")
        self.rows = sorted({number - 1 for number in blocks or range(1, count + 1)})
        self.everywhere = len(self.rows) == count

    def views(self) -> Iterator[Tensor]:
        """The images without noise, or under one noise sample after the other; the noise depends on the row alone."""
        return self.noise.views(self.x)

    def weights(self, weights: Tensor) -> Tensor:
        """Class weights (B, K) for the blocks: (B, N, K) where some are given no label."""
        if self.everywhere:
            return weights
        mask = torch.zeros(self.flow.config.blocks, 1, dtype=weights.dtype, device=weights.device)
        mask[self.rows] = 1
        return mask * weights[:, None] + (1 - mask) / weights.shape[1]

    def log_prob(self, x: Tensor, weights: Tensor) -> Tensor:
        """log p(x | weights (B, K)) in nats (B,), other blocks being given no label."""
        return self.flow.log_prob(x, self.weights(weights))

    def check(self, scores: Tensor) -> None:
        """NotFiniteError for scores (B, ...) that are not finite, with the images and the first block that is not."""
        bad = rows_not_finite(scores)
        if bad:
            block = first_block_not_finite(self.flow, self.x[bad])
            where = f"from block {block} on" if block else "in the gradient"
            text = f"scores are not finite for image {listed(bad)} of {len(scores)}, {where}"
            raise NotFiniteError(f"{text}: {cause(self.flow)}", bad, block)


@torch.no_grad()
def first_block_not_finite(flow: FlowModel, x: Tensor) -> int | None:
    """The first block whose output or log-determinant is not finite when images (B, C, H, W) are encoded, if any."""
    tokens, condition = flow.tokenize(x), flow.condition(None, len(x))
    for number in range(1, flow.config.blocks + 1):
        tokens, logdet = flow.encode_blocks(tokens, condition, [number])
        if not bool(tokens.isfinite().all() and logdet.isfinite().all()):
            return number
    return None


def gradient_scores(masked: LabelMask, x: Tensor) -> Tensor:
    """Gradient of log p(x | softmax(s)) at s = 0 in nats per logit, (B, K), summed over the blocks with the label."""
    return evidence_scores(masked, x)[:, masked.rows].sum(dim=1)


def evidence_scores(masked: LabelMask, x: Tensor) -> Tensor:
    """Gradient of log p(x | softmax(s_t) in block t) at s = 0, (B, N, K)."""
    zeros = x.new_zeros(len(x), masked.flow.config.blocks, masked.flow.config.classes)
    return gradient_of(masked.flow.log_prob, x, zeros, masked.batch)


def gradient_of(log_prob: Callable[[Tensor, Tensor], Tensor], x: Tensor, logits: Tensor, batch: int) -> Tensor:
    """Gradient of log_prob(x, softmax(logits)) with respect to the logits, in their shape."""
    slopes = list[Tensor]()
    for part, at in zip(x.split(batch), logits.split(batch), strict=True):
        with gradients():
            s = leaf(at)
            slopes += torch.autograd.grad(log_prob(usable(part).detach(), s.softmax(dim=-1)).sum(), s)
    return torch.cat(slopes)


@torch.no_grad()
def bayes_scores(masked: LabelMask, x: Tensor) -> Tensor:
    """log p(x | k) in nats, (B, K); all pairs of an image and a class in one row, cut into equal batches.

    Blocks below the first that is given the label give the same for all classes: an image passes through them once.
    """
    flow, classes = masked.flow, masked.flow.config.classes
    one_hot = torch.eye(classes, dtype=x.dtype, device=x.device)
    below, above = range(1, masked.rows[0] + 1), range(masked.rows[0] + 1, flow.config.blocks + 1)
    parts = [flow.encode_blocks(flow.tokenize(part), flow.condition(None, len(part)), below) for part in x.split(masked.batch)]
    tokens, logdet = (torch.cat(values) for values in zip(*parts, strict=True))
    scores = []
    for pairs in torch.arange(len(x) * classes, device=x.device).split(masked.batch):
        images = pairs // classes
        weights = masked.weights(one_hot[pairs % classes])
        z, term = flow.encode_blocks(tokens[images], Condition(weights), above)
        scores.append(prior_log_prob(z, flow.prior_var) + logdet[images] + term)
    return torch.cat(scores).view(-1, classes)
