"""Fitting the probes: scikit-learn on features in memory, or torch batch after batch."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.analysis.features import FeatureBatch
from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.loaders import SeededBatches, seeded
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.training.fit import FitSettings, minimize

SOLVERS = ("auto", "sklearn", "torch")
Batches = Callable[[ImageSet, Iterable[list[int]]], Iterable[FeatureBatch]]  # a set, the rows of each batch -> features


@dataclass(frozen=True)
class ProbeFit:
    """How probes are fitted.

    Args:
        neighbours: of the k-NN probe.
        solver: "sklearn" fits the linear probes to convergence on features held in memory; "torch" trains those of
            all taps together, encoding the set `epochs` times and keeping no features; "auto" chooses by size. With
            "torch" the k-NN probe knows `small` training images.
        epochs, lr: of the torch solver.
        small: training images up to which scikit-learn fits the linear probes.

    Raises: LabError for an unknown solver, or a number out of range.

    Example:
        >>> import rrepa_lab as rl
        >>> fit = rl.ProbeFit(neighbours=3)
        >>> rl.probe(rl.load("digits-none"), "block.4.layer.2", probes=["knn"], fit=fit, limit=40).probe[0]
        '3-NN, cosine'
    """

    neighbours: int = 5
    solver: str = "auto"
    epochs: int = 20
    lr: float = 1e-2
    small: int = 20_000

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise unknown("solver", self.solver, SOLVERS)
        whole_number("epochs", self.epochs, 1)
        real_number("lr", self.lr, above=True)

    def by_torch(self, images: int) -> bool:
        """Whether linear probes on so many training images are fitted by torch."""
        return images > self.small if self.solver == "auto" else self.solver == "torch"


def check_classes(y: Tensor) -> None:
    """LabError for labels (n,) that hold fewer than two classes."""
    present = y.unique().tolist()
    if len(present) < 2:
        raise LabError(f"every label is {present[0]}: a probe needs at least two classes")


def fit_linear(features: Tensor, y: Tensor, scored: Tensor) -> Tensor:
    """Labels (m,) that a `logistic_regression` of (n, d), (n,) gives to (m, d)."""
    return torch.from_numpy(logistic_regression(features, y).predict(scored.numpy()))


def logistic_regression(features: Tensor, y: Tensor) -> Any:
    """Standardised features (n, d) and labels (n,), fitted to convergence: a scikit-learn pipeline."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(features.numpy(), y.numpy())


def fit_knn(features: Tensor, y: Tensor, scored: Tensor, neighbours: int) -> Tensor:
    """Labels (m,) by majority of the nearest of (n, d), (n,) by cosine; scikit-learn."""
    from sklearn.neighbors import KNeighborsClassifier

    if not 1 <= neighbours <= len(features):
        raise LabError(f"{neighbours} neighbours among {len(features)} images")
    model = KNeighborsClassifier(neighbours, metric="cosine").fit(features.numpy(), y.numpy())
    return torch.from_numpy(model.predict(scored.numpy()))


def fit_torch(
    batches: Batches, fitting: ImageSet, scored: FeatureBatch, fit: ProbeFit, batch: int, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Labels (m,) by a linear probe for each tap, all trained together: a batch is encoded once and updates every probe.

    Each probe is a batch norm without gain and bias, and a linear layer, as in REPA and MAE (arXiv 2111.06377); one
    AdamW with a cosine schedule.

    Args:
        batches: the features of images of a set, in the order of these rows.
        batch: images in a step, at most.
        seed: of the probes' weights and the order.
    """
    size = min(batch, len(fitting))
    if size < 2:
        raise LabError("a probe is trained on batches of at least two images")
    steps, classes = fit.epochs * (len(fitting) // size), len(fitting.classes)
    with seeded(seed):
        fresh = {_module_name(name): _linear_probe(value.shape[1], classes) for name, value in scored.features.items()}
    probes = nn.ModuleDict(fresh).to(device)
    met = torch.zeros(classes, dtype=torch.bool)

    def loss_of(step: int, part: FeatureBatch) -> Tensor:
        met[part.y] = True
        y = part.y.to(device)
        scores = [probes[_module_name(name)](value.float().to(device)) for name, value in part.features.items()]
        # the probes share nothing: each has the gradient of its own loss
        return torch.stack([F.cross_entropy(score, y) for score in scores]).sum()

    rows = SeededBatches(len(fitting), size, seed, 0, steps)
    deque(minimize(probes.parameters(), batches(fitting, rows), loss_of, FitSettings(steps, fit.lr)), maxlen=0)
    check_classes(met.nonzero()[:, 0])
    probes.eval()
    with torch.no_grad():
        scores = {name: probes[_module_name(name)](value.float().to(device)) for name, value in scored.features.items()}
    return {name: value.argmax(dim=1).cpu() for name, value in scores.items()}


def _module_name(tap: str) -> str:
    """A module's name may not contain a dot."""
    return tap.replace(".", "_")


def _linear_probe(dim: int, classes: int) -> nn.Module:
    linear = nn.Linear(dim, classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False), linear)
