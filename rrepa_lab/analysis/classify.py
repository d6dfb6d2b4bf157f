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

The noise under which images are read is a choice of its own: `analysis.noise`.

Source: R-REPA, arXiv 2511.22345, Algorithm 1.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.analysis.noise import ReadNoise, read_noise
from rrepa_lab.checks import real_number, seed_number, whole_number
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.finite import NotFiniteError, cause, listed, rows_not_finite
from rrepa_lab.flow.inputs import as_images, gradients, leaf, usable
from rrepa_lab.flow.likelihood import prior_log_prob
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.runs.run import Run

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
    draws: int = 0  # of noise that were averaged over; 0 for none
    noise_std: float = 0.0  # sigma of these draws; nan for uniform noise

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


def classify(
    run: Run | TarFlow,
    x: Tensor,
    method: str = "gradient",
    *,
    draws: int | None = None,
    noise_std: float | None = None,
    blocks: Collection[int] | None = None,
    steps: int = 20,
    step_size: float = 0.3,
    tolerance: float = 1e-3,
    seed: int = 0,
    batch: int = 256,
) -> Classification:
    """Classify images (B, C, H, W) in [-1, 1]; results are in the flow's dtype and on its device.

    Args:
        x: floats in [-1, 1], or uint8 in 0..255, as a tensor or a numpy array (see `flow.inputs`).
        method: "gradient" (the paper's Algorithm 1), "bayes" (exact, equal priors) or "iterated" (see the table above).
        draws: noise draws to average the log-likelihood over; 0 takes the images as they are; None is the run's own choice,
            `config.read`, and 0 for a bare flow (see `analysis.noise`).
        noise_std: sigma of those draws; the run's own, or the flow's training noise, by default.
        blocks: numbers of the blocks that see the label, the others seeing none; by default all do.
        steps, step_size, tolerance: of "iterated", see `classify_steps`.
        seed: of the noise.
        batch: images, for bayes pairs of an image and a class, in one pass.

    Raises: LabError for an unknown method, images of another type or shape or with pixels that are not finite, a number out
        of range, a block that does not exist, no images, or a flow without classes; NotFiniteError, naming images and block,
        where the scores are not finite. Warns of pixels far outside [-1, 1].
    """
    if method not in METHODS:
        raise unknown("classification method", method, METHODS)
    if method == "iterated":
        taken = list(
            classify_steps(
                run, x, steps=steps, step_size=step_size, tolerance=tolerance,
                draws=draws, noise_std=noise_std, blocks=blocks, seed=seed, batch=batch,
            )
        )  # fmt: skip
        return taken[-1]._replace(path=torch.stack([step.scores for step in taken]))
    seen = _Seen(run, x, blocks, draws, noise_std, seed, batch)
    score = _gradient_scores if method == "gradient" else _bayes_scores
    totals = torch.stack([score(seen, view) for view in seen.views()]).cumsum(dim=0)
    path = totals / torch.arange(1, len(totals) + 1, device=totals.device)[:, None, None]
    return seen.result(path.log_softmax(dim=2) if method == "bayes" else path, method)


def classify_steps(
    run: Run | TarFlow,
    x: Tensor,
    *,
    steps: int = 20,
    step_size: float = 0.3,
    tolerance: float = 1e-3,
    draws: int | None = None,
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
    if whole_number("steps", steps, -(2**31)) < 1 or real_number("step_size", step_size, -float("inf")) <= 0:
        raise LabError(f"steps must be >= 1 and step_size > 0, not {steps} and {step_size}")
    real_number("tolerance", tolerance)
    seen = _Seen(run, x, blocks, draws, noise_std, seed, batch)
    views = list(seen.views())
    logits = seen.x.new_zeros(len(seen.x), seen.flow.config.classes)
    moving = torch.arange(len(seen.x), device=seen.x.device)
    yield seen.result(logits[None], "iterated")
    for _ in range(steps):
        slopes = [_gradient(seen.log_prob, view[moving], logits[moving], seen.batch) for view in views]
        moved = logits[moving] + step_size * torch.stack(slopes).mean(dim=0)
        still = (moved.softmax(dim=1) - logits[moving].softmax(dim=1)).abs().amax(dim=1) > tolerance
        logits = logits.index_copy(0, moving, moved)
        moving = moving[still]
        yield seen.result(logits[None], "iterated")
        if not len(moving):
            return


def evidence(
    run: Run | TarFlow,
    x: Tensor,
    batch: int = 256,
    *,
    draws: int | None = None,
    noise_std: float | None = None,
    seed: int = 0,
) -> Tensor:
    """The gradient scores of images (B, C, H, W) split by the block whose label moves, (B, N, K) nats per logit.

    They sum over blocks to the scores of `classify` under the same noise: at s = 0 all blocks see the same embedding, so
    the total derivative is the sum of the partial ones. One forward and one backward pass for each draw.

    The other arguments, and the errors, are those of `classify`.
    """
    seen = _Seen(run, x, None, draws, noise_std, seed, batch)
    parts = torch.stack([_evidence(seen, view) for view in seen.views()]).mean(dim=0)
    seen.check(parts)
    return parts


@torch.no_grad()
def label_gain(
    run: Run | TarFlow,
    x: Tensor,
    classes: Tensor,
    points: int = 11,
    batch: int = 256,
    *,
    draws: int | None = None,
    noise_std: float | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What a label is worth as its weight grows: log p(x | (1 - w) uniform + w class) - log p(x), in nats, and to first order.

    The first order is the tangent at w = 0, w times K times the gradient score: what the one-step rule goes by. At w = 1
    the exact gains differ from one class to another as Bayes' log posteriors do. Both start from 0.

    Args:
        x: images (B, C, H, W) in [-1, 1].
        classes: ids (B, M) of the classes looked at, M for each image.
        points: weights from 0 to 1.
        draws, noise_std, seed: as in `classify`; log p is averaged over the draws.

    Returns: columns image (row), class (id), weight, kind ("exact" or "first order"), value, draws, noise_std:
        B * M * points * 2 rows.

    Raises: LabError for a flow without classes, no images, ids out of range, or less than two points.
    """
    seen = _Seen(run, x, None, draws, noise_std, seed, batch)
    count, points = seen.flow.config.classes, whole_number("points", points)
    classes = torch.as_tensor(classes).to(seen.x.device)
    if points < 2 or classes.ndim != 2 or not bool(((classes >= 0) & (classes < count)).all()) or len(classes) != len(x):
        raise LabError(f"label_gain wants classes (B, M) in 0..{count - 1} for {len(x)} images, and at least two points")
    w = torch.linspace(0, 1, points, dtype=seen.x.dtype, device=seen.x.device)
    corner = torch.eye(count, dtype=seen.x.dtype, device=seen.x.device)[classes]  # (B, M, K)
    weights = (1 - w)[:, None] / count + w[:, None] * corner[:, :, None]  # (B, M, S, K)
    exact, slopes = [], []
    for view in seen.views():
        images = view.repeat_interleave(classes.shape[1] * points, dim=0)
        pairs = zip(images.split(seen.batch), weights.flatten(0, 2).split(seen.batch), strict=True)
        exact.append(torch.cat([seen.log_prob(image, weight) for image, weight in pairs]).view(*classes.shape, points))
        slopes.append(count * _gradient_scores(seen, view).gather(1, classes))
    mean, slope = torch.stack(exact).mean(dim=0), torch.stack(slopes).mean(dim=0)
    seen.check(mean.flatten(1))
    kinds = {"exact": mean - mean[..., :1], "first order": slope[..., None] * w}
    columns = {
        "image": torch.arange(len(x)).repeat_interleave(classes.shape[1] * points),
        "class": classes.flatten().repeat_interleave(points),
        "weight": w.repeat(classes.numel()),
    }
    rows = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    parts = [rows.assign(kind=kind, value=gain.flatten().cpu().numpy()) for kind, gain in kinds.items()]
    return pd.concat(parts, ignore_index=True).assign(**seen.noise.columns)


class _Seen:
    """A flow, images as it reads them, their noise, and the blocks that see the label."""

    def __init__(
        self,
        run: Run | TarFlow,
        x: Tensor,
        blocks: Collection[int] | None,
        draws: int | None,
        noise_std: float | None,
        seed: int,
        batch: int,
    ) -> None:
        flow = run.flow if isinstance(run, Run) else run
        if flow.config.classes == 0:
            raise LabError("this flow was trained without classes: there is nothing to classify")
        self.noise: ReadNoise = read_noise(run, draws, noise_std)
        self.seed, self.batch = seed_number(seed), whole_number("batch", batch, 1)
        self.flow, self.x = flow, as_images(flow, x)
        if not len(self.x):
            raise LabError("no images to classify")
        count = flow.config.blocks
        if blocks is not None and not (blocks and all(1 <= number <= count for number in blocks)):
            raise LabError(f"blocks {sorted(blocks)} must be some of 1..{count}")
        self.rows = sorted({number - 1 for number in blocks or range(1, count + 1)})
        self.everywhere = len(self.rows) == count

    def views(self) -> Iterator[Tensor]:
        """The images without noise, or under one draw after the other; the noise on an image depends on its row alone."""
        return self.noise.views(self.x, self.seed)

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

    def check(self, scores: Tensor) -> None:
        """NotFiniteError for scores (B, ...) that are not finite, with the images and the first block that is not."""
        bad = rows_not_finite(scores)
        if bad:
            block = first_block_not_finite(self.flow, self.x[bad])
            where = f"from block {block} on" if block else "in the gradient"
            text = f"scores are not finite for image {listed(bad)} of {len(scores)}, {where}"
            raise NotFiniteError(f"{text}: {cause(self.flow)}", bad, block)

    def result(self, path: Tensor, method: str) -> Classification:
        """The scores (S, B, K), checked, as an answer."""
        self.check(path[-1])
        return Classification(path[-1], path[-1].argmax(dim=1), method, path, self.noise.draws, self.noise.std)


@torch.no_grad()
def first_block_not_finite(flow: TarFlow, x: Tensor) -> int | None:
    """The first block whose output or log-determinant is not finite when images (B, C, H, W) are encoded, if any."""
    tokens, label = flow.tokenize(x), flow.label_weights(None, len(x))
    for number in range(1, flow.config.blocks + 1):
        tokens, logdet = flow.through(tokens, label, [number])
        if not bool(tokens.isfinite().all() and logdet.isfinite().all()):
            return number
    return None


def _gradient_scores(seen: _Seen, x: Tensor) -> Tensor:
    return _evidence(seen, x)[:, seen.rows].sum(dim=1)


def _evidence(seen: _Seen, x: Tensor) -> Tensor:
    """Gradient of log p(x | softmax(s_t) in block t) at s = 0, (B, N, K)."""
    zeros = x.new_zeros(len(x), seen.flow.config.blocks, seen.flow.config.classes)
    return _gradient(seen.flow.log_prob, x, zeros, seen.batch)


def _gradient(log_prob: Callable[[Tensor, Tensor], Tensor], x: Tensor, logits: Tensor, batch: int) -> Tensor:
    """Gradient of log_prob(x, softmax(logits)) with respect to the logits, in their shape."""
    slopes = list[Tensor]()
    for part, at in zip(x.split(batch), logits.split(batch), strict=True):
        with gradients():
            s = leaf(at)
            slopes += torch.autograd.grad(log_prob(usable(part).detach(), s.softmax(dim=-1)).sum(), s)
    return torch.cat(slopes)


@torch.no_grad()
def _bayes_scores(seen: _Seen, x: Tensor) -> Tensor:
    """log p(x | k) in nats, (B, K); all pairs of an image and a class in one row, cut into equal batches.

    Blocks below the first that sees the label give the same for all classes: an image goes through them once.
    """
    flow, classes = seen.flow, seen.flow.config.classes
    one_hot = torch.eye(classes, dtype=x.dtype, device=x.device)
    below, above = range(1, seen.rows[0] + 1), range(seen.rows[0] + 1, flow.config.blocks + 1)
    parts = [flow.through(flow.tokenize(part), flow.label_weights(None, len(part)), below) for part in x.split(seen.batch)]
    tokens, logdet = (torch.cat(values) for values in zip(*parts, strict=True))
    scores = []
    for pairs in torch.arange(len(x) * classes, device=x.device).split(seen.batch):
        images = pairs // classes
        z, term = flow.through(tokens[images], seen.weights(one_hot[pairs % classes]), above)
        scores.append(prior_log_prob(z, flow.prior_var) + logdet[images] + term)
    return torch.cat(scores).view(-1, classes)
