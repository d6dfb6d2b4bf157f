"""Mean and covariance of features that arrive in parts, in float64; moments of parts can be added up."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rrepa_lab.errors import LabError
from rrepa_lab.flow.finite import rows_not_finite


@dataclass
class Moments:
    """How many features, their mean (d,) and their scatter (d, d), the sum of (x - mean)(x - mean)^T; float64, on the CPU.

    Example:
        >>> whole, parts = Moments(3), Moments(3)
        >>> x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
        >>> whole.add(x), parts.add(x[:4]), parts.add(x[4:])
        (None, None, None)
        >>> bool(np.allclose(whole.covariance, parts.covariance, atol=1e-12))
        True
    """

    dim: int
    n: int = 0

    def __post_init__(self) -> None:
        self.mean, self.scatter = np.zeros(self.dim), np.zeros((self.dim, self.dim))

    def add(self, features: Tensor) -> None:
        """Add features (m, d).

        Raises: LabError for features that are not finite.
        """
        bad = rows_not_finite(features)
        if bad:
            raise LabError(f"{len(bad)} of {len(features)} pictures have features that are not finite")
        if len(features):
            x = features.double().cpu()
            mean = x.mean(dim=0)
            centred = x - mean
            self._join(len(x), mean.numpy(), (centred.T @ centred).numpy())

    def _join(self, n: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        """Chan, Golub and LeVeque 1983: moments of two parts together."""
        total, shift = self.n + n, mean - self.mean
        self.scatter += scatter + np.outer(shift, shift) * (self.n * n / total)
        self.mean = self.mean + shift * (n / total)
        self.n = total

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), with n - 1 in the denominator; LabError for fewer than two features."""
        if self.n < 2:
            raise LabError(f"a covariance needs at least two pictures, not {self.n}")
        return self.scatter / (self.n - 1)

    @property
    def gaussian(self) -> "Gaussian":
        """What a Fréchet distance takes."""
        return Gaussian(self.mean, self.covariance, self.n)

    @staticmethod
    def sum_of(parts: "Sequence[Moments]") -> "Moments":
        """The moments of the features of all parts together, which are of one dimension."""
        found = Moments(parts[0].dim)
        for part in parts:
            if part.n:
                found._join(part.n, part.mean, part.scatter)
        return found


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian fitted to features: mean (d,), covariance (d, d), and how many features; 0 where that is not known."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int = 0

    def __post_init__(self) -> None:
        d = len(self.mean)
        if self.mean.shape != (d,) or self.covariance.shape != (d, d):
            raise LabError(f"a mean of shape {self.mean.shape} does not go with a covariance of {self.covariance.shape}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise LabError("mean or covariance of the features hold numbers that are not finite")

    @property
    def dim(self) -> int:
        """d."""
        return len(self.mean)


def gaussian_of(features: Tensor, rows: Sequence[int] | Tensor | None = None) -> Gaussian:
    """The Gaussian fitted to features (n, d), or to some rows of them."""
    chosen = features if rows is None else features[torch.as_tensor(rows)]
    moments = Moments(features.shape[1])
    moments.add(chosen)
    return moments.gaussian
