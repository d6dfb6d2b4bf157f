"""How alike two sets of features of the same images are: CKNNA, linear CKA, mutual k-NN.

CKNNA and mutual k-NN compare directions: features have length 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.analysis.features import check_spread
from rrepa_lab.errors import LabError


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Unbiased estimate of the Hilbert-Schmidt independence criterion from two kernel matrices (n, n); n >= 4.

    Zero in the mean for independent features. Source: Song et al. 2012, JMLR 13, equation 5 (their HSIC_1).
    """
    n = len(k)
    k, l = (kernel.clone().fill_diagonal_(0) for kernel in (k, l))  # noqa: E741
    trace = (k * l.T).sum()
    sums = k.sum() * l.sum() / ((n - 1) * (n - 2))
    cross = 2 * (k.sum(dim=0) @ l.sum(dim=1)) / (n - 2)
    return (trace + sums - cross) / (n * (n - 3))


def cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of features (n, d) and (n, e) of the same images, unbiased: 1 for the same
    features up to rotation and scale, 0 in the mean for independent ones (it can be a little below).

    Source: Kornblith et al. 2019, arXiv 1905.00414, with the estimator of Nguyen et al. 2021, arXiv 2010.15327.
    """
    _check_pair(a, b, 3)
    k, l = ((x - x.mean(dim=0)) @ (x - x.mean(dim=0)).T for x in (a.double(), b.double()))  # noqa: E741
    return _aligned(hsic(k, l), hsic(k, k), hsic(l, l))


def cknna(a: Tensor, b: Tensor, neighbours: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment of features (n, d) and (n, e) of the same images.

    CKA with both kernels set to zero wherever j is not among the k nearest of i under BOTH features; cosine kernels,
    an image not being its own neighbour. With neighbours = n - 1 it is CKA of the cosine kernels.
    Source: Huh et al. 2024, arXiv 2405.07987, appendix A; the arithmetic is that of its public code
    (minyoungg/platonic-rep, metrics.py, unbiased), without that code's clipping of outliers.
    """
    _check_pair(a, b, neighbours)
    (k, near_k), (l, near_l) = (_cosine_kernel(x, neighbours) for x in (a, b))  # noqa: E741

    def aligned(k: Tensor, l: Tensor, mask: Tensor) -> Tensor:  # noqa: E741
        return hsic(k * mask, l * mask)

    return _aligned(aligned(k, l, near_k & near_l), aligned(k, k, near_k), aligned(l, l, near_l))


def mutual_knn(a: Tensor, b: Tensor, neighbours: int = 10) -> float:
    """Mean part of an image's k nearest neighbours that both features (n, d) and (n, e) agree on, by cosine.

    Independent features give k / (n - 1). Source: Huh et al. 2024, arXiv 2405.07987.
    """
    _check_pair(a, b, neighbours)
    (_, near_a), (_, near_b) = (_cosine_kernel(x, neighbours) for x in (a, b))
    return float((near_a & near_b).sum(dim=1).double().mean() / neighbours)


def _aligned(kl: Tensor, kk: Tensor, ll: Tensor) -> float:
    return float(kl / (kk * ll).sqrt())


def _cosine_kernel(x: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Cosines (n, n), and which j is among the nearest of each i."""
    x = F.normalize(x.double(), dim=1)
    kernel = x @ x.T
    nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(neighbours, dim=1).indices
    return kernel, torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, nearest, True)


def _check_pair(a: Tensor, b: Tensor, neighbours: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise LabError(f"features must be (n, d) and (n, e) of the same images, not {tuple(a.shape)} and {tuple(b.shape)}")
    if len(a) < 4:
        raise LabError(f"{len(a)} images are too few: a similarity needs at least 4")
    if not 1 <= neighbours < len(a):
        raise LabError(f"{neighbours} neighbours among {len(a)} images: at most {len(a) - 1}")
    for x, which in ((a, "the first set"), (b, "the second set")):
        check_spread(x, which)


# metric -> its value for features (n, d) and (n, e), with k neighbours
KERNEL_METRICS: dict[str, Callable[[Tensor, Tensor, int], float]] = {
    "cknna": cknna,
    "cka": lambda a, b, _neighbours: cka(a, b),
    "mutual_knn": mutual_knn,
}
