"""Classification by a flow, without training a classifier.

The flow is given a soft label: class weights p = softmax(s), which every block turns into the embedding p @ table. How its
log-likelihood depends on the logits s is evidence for the classes.

| method   | scores                                             | passes over an image            |
|----------|----------------------------------------------------|---------------------------------|
| gradient | d log p(x | softmax(s)) / ds at s = 0              | one forward, one backward       |
| iterated | s after gradient ascent on log p(x | softmax(s))   | the same for each step          |
| bayes    | log p(k | x), equal priors                         | one forward for each class      |

At s = 0 the derivative with respect to logit k is 1/K of the derivative with respect to weight k, less the mean over
classes; so K times the gradient score is the gain log p(x | k) - log p(x) to first order, and the one-step rule is
Bayes' rule with the log-likelihood taken as linear in the weights. `Classification.probability` uses that.

The noise on the images is a choice of its own: `analysis.noise`.

Source: R-REPA, arXiv 2511.22345, Algorithm 1.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rrepa_lab.analysis.label_scores import LabelMask, bayes_scores, evidence_scores, gradient_of, gradient_scores
from rrepa_lab.analysis.noise import NoiseSamples
from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.runs.run import Run

Method = Literal["gradient", "bayes", "iterated"]
METHODS: tuple[Method, ...] = ("gradient", "bayes", "iterated")


class Top(NamedTuple):
    """The best classes of each image, best first."""

    scores: Tensor  # (B, k)
    labels: Tensor  # (B, k) int64


class Classification(NamedTuple):
    """Scores of every class for every image; the largest wins.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> found = rl.classify(run, run.data("test", 4).x)
        >>> found.probability.sum(dim=1).allclose(torch.ones(4)), found.top(2).labels.shape
        (True, torch.Size([4, 2]))
    """

    scores: Tensor  # (B, K); gradient: d log p / d logit, nats per logit; bayes: log posterior, nats; iterated: logits
    label: Tensor  # (B,) int64
    method: str
    path: Tensor  # (S, B, K): iterated: the logits before the first and after each step; else the mean over 1..S noise samples
    n_noise_samples: int = 0  # that were averaged over; 0 for none
    noise_std: float = 0.0  # sigma of these; nan for uniform noise

    @property
    def probability(self) -> Tensor:
        """Class probabilities (B, K) that the scores stand for; by gradient those of the linearised log-likelihood."""
        return (self.scores * (self.scores.shape[1] if self.method == "gradient" else 1)).softmax(dim=1)

    @property
    def margin(self) -> Tensor:
        """Best score minus the second best (B,), in the unit of the scores; infinite where there is one class."""
        if self.scores.shape[1] < 2:  # one class has no rival
            return torch.full_like(self.scores[:, 0], torch.inf)
        best = self.scores.topk(2, dim=1).values
        return best[:, 0] - best[:, 1]

    def top(self, k: int = 5) -> Top:
        """The k best classes of each image; all of them if there are fewer."""
        values, labels = self.scores.topk(min(k, self.scores.shape[1]), dim=1)
        return Top(values, labels)


@dataclass(frozen=True)
class Ascent:
    """Gradient ascent on the logits of a soft label.

    Args:
        steps: at most this many; the first alone decides like the one-step rule.
        step_size: logits moved for a gradient of one nat per logit. The default suits digits.
        tolerance: an image has converged once none of its class weights changes by more than this in a step; when all have,
            the ascent ends. So the answer for an image does not depend on the others of the batch.

    Raises: LabError for a number out of range.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> rl.classify(run, run.data("test", 2).x, "iterated", ascent=rl.Ascent(steps=3)).path.shape
        torch.Size([4, 2, 10])
    """

    steps: int = 20
    step_size: float = 0.3
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        steps = whole_number("steps", self.steps, -(2**31))
        if steps < 1 or real_number("step_size", self.step_size, -float("inf")) <= 0:
            raise LabError(f"steps must be >= 1 and step_size > 0, not {self.steps} and {self.step_size}")
        real_number("tolerance", self.tolerance)


def classify(
    run: Run | FlowModel,
    x: Tensor,
    method: str = "gradient",
    *,
    noise: int | NoiseSamples | None = None,
    blocks: Collection[int] | None = None,
    ascent: Ascent | None = None,
    batch: int = 256,
) -> Classification:
    """Classify images (B, C, H, W) in [-1, 1]; results are in the flow's dtype and on its device.

    Args:
        x: floats in [-1, 1], or uint8 in 0..255, as a tensor or a numpy array (see `flow.inputs`).
        method: "gradient" (the paper's Algorithm 1), "bayes" (exact, equal priors) or "iterated" (see the table above).
        noise: noise samples to average the log-likelihood over, a number or `NoiseSamples`; 0 takes the images as they are;
            None is the run's own choice, `config.read`, and 0 for a bare flow.
        blocks: numbers of the blocks that are given the label, the others none; by default all are.
        ascent: the steps of "iterated".
        batch: images, for bayes pairs of an image and a class, in one pass.

    Raises: LabError for an unknown method, images of another type or shape or with pixels that are not finite, a number out
        of range, a block that does not exist, no images, or a flow without classes; NotFiniteError, naming images and block,
        where the scores are not finite. Warns of pixels far outside [-1, 1].

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> rl.classify(run, run.data("test", 4).x).scores.shape
        torch.Size([4, 10])
    """
    if method not in METHODS:
        raise unknown("classification method", method, METHODS)
    if method == "iterated":
        taken = list(classify_steps(run, x, ascent=ascent, noise=noise, blocks=blocks, batch=batch))
        return taken[-1]._replace(path=torch.stack([step.scores for step in taken]))
    masked = LabelMask(run, x, blocks, noise, batch)
    score = gradient_scores if method == "gradient" else bayes_scores
    totals = torch.stack([score(masked, view) for view in masked.views()]).cumsum(dim=0)
    path = totals / torch.arange(1, len(totals) + 1, device=totals.device)[:, None, None]
    return _answer(masked, path.log_softmax(dim=2) if method == "bayes" else path, method)


def classify_steps(
    run: Run | FlowModel,
    x: Tensor,
    *,
    ascent: Ascent | None = None,
    noise: int | NoiseSamples | None = None,
    blocks: Collection[int] | None = None,
    batch: int = 256,
) -> Iterator[Classification]:
    """Gradient ascent on the logits of the soft label, yielding the classification before the first and after each step.

    The arguments, and the errors, are those of `classify`.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> len(list(rl.classify_steps(run, run.data("test", 2).x, ascent=rl.Ascent(steps=3))))
        4
    """
    settings = Ascent() if ascent is None else ascent
    masked = LabelMask(run, x, blocks, noise, batch)
    views = list(masked.views())
    logits = masked.x.new_zeros(len(masked.x), masked.flow.config.classes)
    moving = torch.arange(len(masked.x), device=masked.x.device)
    yield _answer(masked, logits[None], "iterated")
    for _ in range(settings.steps):
        slopes = [gradient_of(masked.log_prob, view[moving], logits[moving], masked.batch) for view in views]
        moved = logits[moving] + settings.step_size * torch.stack(slopes).mean(dim=0)
        change = (moved.softmax(dim=1) - logits[moving].softmax(dim=1)).abs().amax(dim=1)
        logits = logits.index_copy(0, moving, moved)
        moving = moving[change > settings.tolerance]
        yield _answer(masked, logits[None], "iterated")
        if not len(moving):
            return


def evidence(run: Run | FlowModel, x: Tensor, *, noise: int | NoiseSamples | None = None, batch: int = 256) -> Tensor:
    """The gradient scores of images (B, C, H, W) split by the block whose label moves, (B, N, K) nats per logit.

    They sum over blocks to the scores of `classify` under the same noise: at s = 0 all blocks have the same embedding, so
    the total derivative is the sum of the partial ones. One forward and one backward pass for each noise sample.

    The arguments, and the errors, are those of `classify`.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> rl.evidence(run, run.data("test", 2).x).shape
        torch.Size([2, 4, 10])
    """
    masked = LabelMask(run, x, None, noise, batch)
    parts = torch.stack([evidence_scores(masked, view) for view in masked.views()]).mean(dim=0)
    masked.check(parts)
    return parts


def _answer(masked: LabelMask, path: Tensor, method: str) -> Classification:
    """The scores (S, B, K), checked, as an answer."""
    masked.check(path[-1])
    return Classification(path[-1], path[-1].argmax(dim=1), method, path, masked.noise.n, masked.noise.std)
