"""Reading a class off a flow without training a classifier."""

from typing import NamedTuple

import torch
from torch import Tensor

from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.tarflow import TarFlow
from rrepa_lab.runs import Run

METHODS = ("gradient", "bayes")


class Classification(NamedTuple):
    """Scores of every class for every image; the largest wins."""

    scores: Tensor  # (B, K); gradient: d log p / d logit, nats per logit; bayes: log posterior, nats
    label: Tensor  # (B,) int64


def classify(run: Run | TarFlow, x: Tensor, method: str = "gradient", batch: int = 256) -> Classification:
    """Classify images (B, C, H, W) in [-1, 1].

    Args:
        method: "gradient" is the paper's Algorithm 1: one forward and one backward pass for any number of classes.
            "bayes" is exact for equal priors: one forward pass for each class.
        batch: images at once.

    Raises: LabError for an unknown method, a wrong image shape, or a flow without classes.
    Source: R-REPA, arXiv 2511.22345, Algorithm 1.
    """
    flow = run.flow if isinstance(run, Run) else run
    if method not in METHODS:
        raise unknown("classification method", method, METHODS)
    if flow.config.classes == 0:
        raise LabError("this flow was trained without classes: there is nothing to classify")
    score = _gradient_scores if method == "gradient" else _bayes_scores
    scores = torch.cat([score(flow, part) for part in x.split(batch)])
    return Classification(scores, scores.argmax(dim=1))


def _gradient_scores(flow: TarFlow, x: Tensor) -> Tensor:
    """Gradient of log p(x | softmax(s)) at s = 0, where the flow sees its unconditional embedding; (B, K)."""
    with torch.enable_grad():
        logits = torch.zeros(len(x), flow.config.classes, dtype=x.dtype, device=x.device, requires_grad=True)
        log_prob = flow.log_prob(x.detach(), logits.softmax(dim=1))
        (scores,) = torch.autograd.grad(log_prob.sum(), logits)
    return scores


@torch.no_grad()
def _bayes_scores(flow: TarFlow, x: Tensor) -> Tensor:
    """log p(k | x) for equal priors, (B, K)."""
    classes = range(flow.config.classes)
    joint = torch.stack([flow.log_prob(x, torch.full((len(x),), k, device=x.device)) for k in classes], dim=1)
    return joint.log_softmax(dim=1)
