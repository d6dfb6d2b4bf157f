"""Reading a class off a flow without training a classifier.

The flow sees a soft label: class weights p = softmax(s), which every block turns into the embedding p @ table. How its
log-likelihood answers to the logits s is evidence for the classes.

| method   | scores                                             | passes over an image            |
|----------|----------------------------------------------------|---------------------------------|
| gradient | d log p(x | softmax(s)) / ds at s = 0              | one forward, one backward       |
| iterated | s after gradient ascent on log p(x | softmax(s))   | the same for each step          |
| bayes    | log p(k | x), equal priors                         | one forward for each class      |

At s = 0 the derivative with respect to logit k is 1/K of the derivative with respect to weight k, less the mean over
classes; so K times the gradient score is the gain log p(x | k) - log p(x) to first order, and the one-step rule is
Bayes' rule with the log-likelihood taken as linear in the weights. `Classification.probability` uses that.

Source: R-REPA, arXiv 2511.22345, Algorithm 1.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.data.loaders import generator
from rrepa_lab.data.pixels import add_noise
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.likelihood import prior_log_prob
from rrepa_lab.flow.tarflow import TarFlow
from rrepa_lab.runs import Run

Method = Literal["gradient", "bayes", "iterated"]
METHODS: tuple[Method, ...] = ("gradient", "bayes", "iterated")


class Top(NamedTuple):
    """The best classes of each image, best first."""

    scores: Tensor  # (B, k)
    labels: Tensor  # (B, k) int64


class Classification(NamedTuple):
    """Scores of every class for every image; the largest wins."""

    scores: Tensor  # (B, K); gradient: d log p / d logit, nats per logit; bayes: log posterior, nats; iterated: logits
    label: Tensor  # (B,) int64
    method: str
    path: Tensor  # (S, B, K): iterated: the logits before the first and after each step; else the mean over 1..S noise draws

    @property
    def probability(self) -> Tensor:
        """Class probabilities (B, K) that the scores stand for; by gradient those of the linearised log-likelihood."""
        return (self.scores * (self.scores.shape[1] if self.method == "gradient" else 1)).softmax(dim=1)

    @property
    def margin(self) -> Tensor:
        """Best score minus the second best (B,), in the unit of the scores."""
        best = self.scores.topk(2, dim=1).values
        return best[:, 0] - best[:, 1]

    def top(self, k: int = 5) -> Top:
        """The k best classes of each image; all of them if there are fewer."""
        values, labels = self.scores.topk(min(k, self.scores.shape[1]), dim=1)
        return Top(values, labels)


def classify(
    run: Run | TarFlow,
    x: Tensor,
    method: str = "gradient",
    *,
    draws: int = 0,
    noise_std: float | None = None,
    blocks: Collection[int] | None = None,
    steps: int = 20,
    step_size: float = 0.3,
    tolerance: float = 1e-3,
    seed: int = 0,
    batch: int = 256,
) -> Classification:
    """Classify images (B, C, H, W) in [-1, 1].

    Args:
        method: "gradient" (the paper's Algorithm 1), "bayes" (exact, equal priors) or "iterated" (see the table above).
        draws: noise draws to average the log-likelihood over; 0 takes the images as they are.
        noise_std: sigma of those draws; the flow's training noise by default.
        blocks: numbers of the blocks that see the label, the others seeing none; by default all do.
        steps, step_size, tolerance: of "iterated", see `classify_steps`.
        seed: of the noise.
        batch: images, for bayes pairs of an image and a class, in one pass.

    Raises: LabError for an unknown method, a wrong image shape, a block that does not exist, no images, or a flow
        without classes.
    """
    flow = run.flow if isinstance(run, Run) else run
    if method not in METHODS:
        raise unknown("classification method", method, METHODS)
    if method == "iterated":
        path = torch.stack([
            taken.scores
            for taken in classify_steps(
                flow, x, steps=steps, step_size=step_size, tolerance=tolerance,
                draws=draws, noise_std=noise_std, blocks=blocks, seed=seed, batch=batch,
            )
        ])  # fmt: skip
        return _result(path, method)
    seen = _Seen(flow, x, blocks)
    score = _gradient_scores if method == "gradient" else _bayes_scores
    views = _views(flow, x, draws, noise_std, seed)
    totals = torch.stack([score(seen, view, batch) for view in views]).cumsum(dim=0)
    path = totals / torch.arange(1, len(totals) + 1, device=totals.device)[:, None, None]
    return _result(path.log_softmax(dim=2) if method == "bayes" else path, method)


def classify_steps(
    run: Run | TarFlow,
    x: Tensor,
    *,
    steps: int = 20,
    step_size: float = 0.3,
    tolerance: float = 1e-3,
    draws: int = 0,
    noise_std: float | None = None,
    blocks: Collection[int] | None = None,
    seed: int = 0,
    batch: int = 256,
) -> Iterator[Classification]:
    """Gradient ascent on the logits of the soft label, yielding the classification before the first and after each step.

    Args:
        steps: at most this many; the first alone decides like the one-step rule.
        step_size: logits moved for a gradient of one nat per logit. The default suits digits.
        tolerance: an image is left alone once none of its class weights moves more than this in a step; when all are,
            the ascent ends. So the answer for an image does not depend on its company.

    The other arguments, and the errors, are those of `classify`.
    """
    if steps < 1 or step_size <= 0:
        raise LabError(f"steps must be >= 1 and step_size > 0, not {steps} and {step_size}")
    flow = run.flow if isinstance(run, Run) else run
    seen = _Seen(flow, x, blocks)
    views = list(_views(flow, x, draws, noise_std, seed))
    logits = torch.zeros(len(x), flow.config.classes, dtype=x.dtype, device=x.device)
    moving = torch.arange(len(x), device=x.device)
    yield _result(logits[None], "iterated")
    for _ in range(steps):
        slopes = [_gradient(seen.log_prob, view[moving], logits[moving], batch) for view in views]
        moved = logits[moving] + step_size * torch.stack(slopes).mean(dim=0)
        still = (moved.softmax(dim=1) - logits[moving].softmax(dim=1)).abs().amax(dim=1) > tolerance
        logits = logits.index_copy(0, moving, moved)
        moving = moving[still]
        yield _result(logits[None], "iterated")
        if not len(moving):
            return


def evidence(run: Run | TarFlow, x: Tensor, batch: int = 256) -> Tensor:
    """The gradient scores of images (B, C, H, W) split by the block whose label moves, (B, N, K) nats per logit.

    They sum over blocks to the scores of `classify`: at s = 0 all blocks see the same embedding, so the total
    derivative is the sum of the partial ones. One forward and one backward pass.
    """
    flow = run.flow if isinstance(run, Run) else run
    return _evidence(_Seen(flow, x, None).flow, x, batch)


@torch.no_grad()
def label_gain(run: Run | TarFlow, x: Tensor, classes: Tensor, points: int = 11, batch: int = 256) -> pd.DataFrame:
    """What a label is worth as its weight grows: log p(x | (1 - w) uniform + w class) - log p(x), in nats, and to first order.

    The first order is the tangent at w = 0, w times K times the gradient score: what the one-step rule goes by. At w = 1
    the exact gains differ from one class to another as Bayes' log posteriors do. Both start from 0.

    Args:
        x: images (B, C, H, W) in [-1, 1].
        classes: ids (B, M) of the classes looked at, M for each image.
        points: weights from 0 to 1.

    Returns: columns image (row), class (id), weight, kind ("exact" or "first order"), value: B * M * points * 2 rows.

    Raises: LabError for a flow without classes, no images, ids out of range, or less than two points.
    """
    flow = run.flow if isinstance(run, Run) else run
    seen = _Seen(flow, x, None)
    count = flow.config.classes
    if points < 2 or not bool(((classes >= 0) & (classes < count)).all()) or len(classes) != len(x):
        raise LabError(f"label_gain wants classes (B, M) in 0..{count - 1} for {len(x)} images, and at least two points")
    w = torch.linspace(0, 1, points, dtype=x.dtype, device=x.device)
    corner = torch.eye(count, dtype=x.dtype, device=x.device)[classes.to(x.device)]  # (B, M, K)
    weights = (1 - w)[:, None] / count + w[:, None] * corner[:, :, None]  # (B, M, S, K)
    images = x.repeat_interleave(classes.shape[1] * points, dim=0)
    pairs = zip(images.split(batch), weights.flatten(0, 2).split(batch), strict=True)
    exact = torch.cat([seen.log_prob(image, weight) for image, weight in pairs]).view(*classes.shape, points)
    slopes = count * _gradient_scores(seen, x, batch).gather(1, classes.to(x.device))
    kinds = {"exact": exact - exact[..., :1], "first order": slopes[..., None] * w}
    columns = {
        "image": torch.arange(len(x)).repeat_interleave(classes.shape[1] * points),
        "class": classes.flatten().repeat_interleave(points),
        "weight": w.repeat(classes.numel()),
    }
    rows = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    parts = [rows.assign(kind=kind, value=gain.flatten().cpu().numpy()) for kind, gain in kinds.items()]
    return pd.concat(parts, ignore_index=True)


class _Seen:
    """A flow, and the blocks of it that see the label."""

    def __init__(self, flow: TarFlow, x: Tensor, blocks: Collection[int] | None) -> None:
        if flow.config.classes == 0:
            raise LabError("this flow was trained without classes: there is nothing to classify")
        if not len(x):
            raise LabError("no images to classify")
        count = flow.config.blocks
        if blocks is not None and not (blocks and all(1 <= number <= count for number in blocks)):
            raise LabError(f"blocks {sorted(blocks)} must be some of 1..{count}")
        self.flow = flow
        self.rows = sorted({number - 1 for number in blocks or range(1, count + 1)})
        self.everywhere = len(self.rows) == count

    def weights(self, weights: Tensor) -> Tensor:
        """Class weights (B, K) as the blocks see them: (B, N, K) where some see no label."""
        if self.everywhere:
            return weights
        mask = torch.zeros(self.flow.config.blocks, 1, dtype=weights.dtype, device=weights.device)
        mask[self.rows] = 1
        return mask * weights[:, None] + (1 - mask) / weights.shape[1]

    def log_prob(self, x: Tensor, weights: Tensor) -> Tensor:
        """log p(x | weights (B, K)) in nats (B,), other blocks than these seeing no label."""
        return self.flow.log_prob(x, self.weights(weights))


def _result(path: Tensor, method: str) -> Classification:
    return Classification(path[-1], path[-1].argmax(dim=1), method, path)


def _views(flow: TarFlow, x: Tensor, draws: int, noise_std: float | None, seed: int) -> Iterator[Tensor]:
    """The images as they are, or under one noise draw after the other; the noise on an image depends on its row alone."""
    if draws == 0:
        yield x
        return
    if draws < 0:
        raise LabError(f"draws must be >= 0, not {draws}")
    if noise_std is None and flow.config.noise != "gaussian":
        raise LabError("this flow was trained with uniform noise: say noise_std to average over draws")
    std = flow.config.noise_std if noise_std is None else noise_std
    for draw in range(draws):
        yield add_noise(x, std, generator(seed, draw))


def _gradient_scores(seen: _Seen, x: Tensor, batch: int) -> Tensor:
    return _evidence(seen.flow, x, batch)[:, seen.rows].sum(dim=1)


def _evidence(flow: TarFlow, x: Tensor, batch: int) -> Tensor:
    """Gradient of log p(x | softmax(s_t) in block t) at s = 0, (B, N, K)."""
    zeros = torch.zeros(len(x), flow.config.blocks, flow.config.classes, dtype=x.dtype, device=x.device)
    return _gradient(flow.log_prob, x, zeros, batch)


def _gradient(log_prob: Callable[[Tensor, Tensor], Tensor], x: Tensor, logits: Tensor, batch: int) -> Tensor:
    """Gradient of log_prob(x, softmax(logits)) with respect to the logits, in their shape."""
    slopes = []
    for part, at in zip(x.split(batch), logits.split(batch), strict=True):
        with torch.enable_grad():
            leaf = at.detach().requires_grad_()
            slopes += torch.autograd.grad(log_prob(part.detach(), leaf.softmax(dim=-1)).sum(), leaf)
    return torch.cat(slopes)


@torch.no_grad()
def _bayes_scores(seen: _Seen, x: Tensor, batch: int) -> Tensor:
    """log p(x | k) in nats, (B, K); all pairs of an image and a class in one row, cut into equal batches.

    Blocks below the first that sees the label give the same for all classes: an image goes through them once.
    """
    flow, classes = seen.flow, seen.flow.config.classes
    one_hot = torch.eye(classes, dtype=x.dtype, device=x.device)
    below, above = range(1, seen.rows[0] + 1), range(seen.rows[0] + 1, flow.config.blocks + 1)
    parts = [flow.through(flow.tokenize(part), flow.label_weights(None, len(part)), below) for part in x.split(batch)]
    tokens, logdet = (torch.cat(values) for values in zip(*parts, strict=True))
    scores = []
    for pairs in torch.arange(len(x) * classes, device=x.device).split(batch):
        images = pairs // classes
        z, term = flow.through(tokens[images], seen.weights(one_hot[pairs % classes]), above)
        scores.append(prior_log_prob(z, flow.prior_var) + logdet[images] + term)
    return torch.cat(scores).view(-1, classes)
