"""How two sets of features differ, and how varied one is, each by its published definition, in float64.

| function | definition | source |
|---|---|---|
| frechet_distance | of the fitted Gaussians | FID, arXiv 1706.08500 |
| kernel_distance | squared maximum mean discrepancy, unbiased, kernel (x.y / d + 1)^3 | KID, arXiv 1801.01401 |
| precision_recall | part inside the other set's balls to the third neighbour | arXiv 1904.06991 |
| inception_score | exp of the mean KL divergence of p(class | picture) from p(class) | arXiv 1606.03498 |
| vendi_score | exp of the entropy of the eigenvalues of the cosine similarities | arXiv 2210.02410 |
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from rrepa_lab.checks import whole_number
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.moments import Gaussian, gaussian_of

NEIGHBOURS = 3  # of precision and recall
ROWS = 2048  # features of which distances to all others are held at once


class Estimate(NamedTuple):
    """A number with its standard error over the samples."""

    value: float
    standard_error: float


def frechet_distance(a: Gaussian | Tensor, b: Gaussian | Tensor) -> float:
    """Fréchet distance of two Gaussians, or of those fitted to features (n, d) and (m, d).

    |mean difference|^2 + trace(A + B - 2 (A B)^(1/2)). The trace of the root is the sum of the singular values of
    A^(1/2) B^(1/2), which exist for singular covariances too. Of fewer than d + 1 features a covariance is singular and the
    distance too large; see `evaluation.scores` for the warning.

    Raises: LabError for features of different dimensions, fewer than two of them, and numbers that are not finite.
    """
    first, second = (one if isinstance(one, Gaussian) else gaussian_of(one) for one in (a, b))
    return frechet_to(second)(first)


class frechet_to:  # used as a function
    """The Fréchet distance to one Gaussian, whose root is computed once: `frechet_to(reference)(samples)`."""

    def __init__(self, reference: Gaussian) -> None:
        self.reference, self.root = reference, _root(reference.covariance)

    def __call__(self, samples: Gaussian) -> float:
        """The distance of another Gaussian."""
        if samples.dim != self.reference.dim:
            raise LabError(
                f"features of {samples.dim} and of {self.reference.dim} numbers are not of one network: the reference was made "
                "with another one"
            )
        shift = samples.mean - self.reference.mean
        roots = np.sqrt(np.clip(scipy.linalg.eigvalsh(self._inner(samples), check_finite=False), 0, None)).sum()
        return float(shift @ shift + np.trace(samples.covariance) + np.trace(self.reference.covariance) - 2 * roots)

    def _inner(self, samples: Gaussian) -> np.ndarray:
        """B^(1/2) A B^(1/2): its eigenvalues are those of A B, and it is symmetric."""
        inner = self.root @ samples.covariance @ self.root
        return (inner + inner.T) / 2

    def standard_error(self, features: Tensor, samples: Gaussian) -> float:
        """Over the samples, by the delta method: the spread of their influence on the distance; one decomposition.

        The derivative of trace (A B)^(1/2) in A is T / 2 with the transport map
        T = B^(1/2) (B^(1/2) A B^(1/2))^(-1/2) B^(1/2), so that a sample x moves the distance by
        2 shift.(x - mean) + (x - mean)^T (1 - T) (x - mean) over n, beside a constant.

        Args:
            features: (n, d) of the samples, n > d.
            samples: the Gaussian fitted to them.
        """
        values, vectors = scipy.linalg.eigh(self._inner(samples), check_finite=False)
        inverse = np.where(values > values.max() * 1e-10, 1 / np.sqrt(np.clip(values, 1e-300, None)), 0)
        transport = self.root @ (vectors * inverse) @ vectors.T @ self.root
        shift = samples.mean - self.reference.mean
        influence = []
        for part in features.split(ROWS):
            x = part.double().numpy() - samples.mean
            influence.append(2 * x @ shift + ((x - x @ transport) * x).sum(axis=1))
        return float(np.concatenate(influence).std(ddof=1) / math.sqrt(len(features)))


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric root of a covariance; eigenvalues that rounding made negative count as zero."""
    values, vectors = scipy.linalg.eigh(covariance, check_finite=False)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def kernel_distance(samples: Tensor, real: Tensor) -> Estimate:
    """Unbiased squared maximum mean discrepancy of features (n, d) and (m, d), with the kernel (x.y / d + 1)^3.

    The standard error is that over the samples, by the first term of Hoeffding's decomposition; the real set is taken as
    given. Around zero the value may be negative.

    Raises: LabError for fewer than two features of either, or of different dimensions.
    """
    _check_pair(samples, real)
    x, y = samples.double(), real.double()
    n, m = len(x), len(y)
    own, cross, real_total = [], [], 0.0
    for part in torch.arange(n).split(ROWS):
        inner = _cubic(x[part], x)
        own.append((inner.sum(dim=1) - inner[torch.arange(len(part)), part]) / (n - 1))
        cross.append(_cubic(x[part], y).mean(dim=1))
    for part in torch.arange(m).split(ROWS):
        inner = _cubic(y[part], y)
        real_total += float(inner.sum() - inner[torch.arange(len(part)), part].sum())
    each = torch.cat(own) - torch.cat(cross)  # half the influence of a sample, beside a constant
    value = float(torch.cat(own).mean()) + real_total / (m * (m - 1)) - 2 * float(torch.cat(cross).mean())
    return Estimate(value, 2 * float(each.std()) / math.sqrt(n))


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


class PrecisionRecall(NamedTuple):
    """precision: of the samples (n,), inside the real manifold; recall: of the real ones (m,), inside that of the samples."""

    precision: Tensor
    recall: Tensor


def precision_recall(samples: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Which features of each set lie within a ball of the other, whose radius is the distance to the k-th neighbour.

    Args:
        samples, real: (n, d) and (m, d).
        neighbours: k; the point itself is not counted.

    Returns: bool tensors; their means are precision and recall.   Raises: LabError for k features or fewer in a set.
    """
    _check_pair(samples, real)
    k = whole_number("neighbours", neighbours, 1)
    if min(len(samples), len(real)) <= k:
        raise LabError(f"{k} neighbours need more than {k} pictures in each set, not {len(samples)} and {len(real)}")
    x, y = samples.double(), real.double()
    return PrecisionRecall(_inside(x, y, _radii(y, k)), _inside(y, x, _radii(x, k)))


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distances of each to its k-th neighbour (n,); a picture itself, at distance 0, is the first of k + 1."""
    return torch.cat([squared_distances(part, x).kthvalue(k + 1, dim=1).values for part in x.split(ROWS)])


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    return torch.cat([(squared_distances(part, centres) <= radii).any(dim=1) for part in points.split(ROWS)])


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) squared Euclidean distances of (n, d) and (m, d), none below zero."""
    return (x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T).clamp(min=0)


def inception_score(log_probabilities: Tensor, size: int | None = None) -> Estimate:
    """exp(mean KL(p(class | picture) || p(class))) of pictures (n, K): the mean over parts, and their standard error.

    Args:
        size: pictures of a part, in their order, the last one may be smaller: ADM's evaluator has 5,000. None: one part.

    Raises: LabError for no pictures.
    """
    n = len(log_probabilities)
    size = whole_number("pictures of a part", n if size is None else size, 1)
    scores = []
    for part in log_probabilities.double().split(size):
        p = part.exp()
        marginal = p.mean(dim=0)
        divergence = (torch.special.xlogy(p, p) - torch.special.xlogy(p, marginal)).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    error = float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
    return Estimate(float(np.mean(scores)), error)


def vendi_score(features: Tensor) -> float:
    """The effective number of different pictures among features (n, d): 1 where all are alike, n where all are orthogonal.

    Raises: LabError for no features, or one of length zero.
    """
    x = features.double()
    lengths = x.norm(dim=1, keepdim=True)
    if not len(x) or not bool((lengths > 0).all()):
        raise LabError("a Vendi score needs features of positive length")
    x = x / lengths
    # X X^T / n and X^T X / n have the same eigenvalues but for zeros
    gram = x.T @ x if x.shape[1] < len(x) else x @ x.T
    values = torch.linalg.eigvalsh(gram / len(x)).clamp(min=0)
    return float(torch.special.entr(values).sum().exp())


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape[1] != b.shape[1]:
        raise LabError(f"features of {a.shape[1]} and of {b.shape[1]} numbers are not of one network")
    if min(len(a), len(b)) < 2:
        raise LabError(f"at least two pictures are needed in each set, not {len(a)} and {len(b)}")
