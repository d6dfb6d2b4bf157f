"""How alike two sets of features of the same images are: CKNNA, linear CKA, mutual k-NN, and cosine to the teacher.

The recipe of the field, as REPA's authors state it (sihyun-yu/REPA, issue 24): the flow reads without label, features are
averaged over tokens. CKNNA and mutual k-NN compare directions: features have length 1.
"""

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.align.encoder import Encoder
from rrepa_lab.align.floors import LABEL_POSITION, POSITION, TargetMeans
from rrepa_lab.align.projector import similarity as cosine
from rrepa_lab.align.target import match_grid
from rrepa_lab.analysis.features import Read, Reading, check_spread, image_set, together
from rrepa_lab.analysis.floors import teacher_means
from rrepa_lab.data.images import Batch, ImageSet
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.taps import Tap, Taps
from rrepa_lab.measurements.columns import about, place
from rrepa_lab.runs.run import Run

KERNEL_METRICS = ("cknna", "cka", "mutual_knn")
METRICS = (*KERNEL_METRICS, "teacher_cosine")


# --- metrics of two feature sets --------------------------------------------------------------------------------------


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
        raise LabError(f"{neighbours} neighbours asked for among {len(a)} images: at most {len(a) - 1}")
    for x, which in ((a, "the first set"), (b, "the second set")):
        check_spread(x, which)


# --- a run, layer by layer --------------------------------------------------------------------------------------------


def similarity(
    run: Run,
    other: Run | Encoder | None = None,
    taps: Taps = "block.*.layer.*",
    *,
    other_taps: Taps | None = None,
    metrics: Iterable[str] | None = None,
    direction: str = "forward",
    neighbours: int = 10,
    pool: str = "mean",
    draws: int | None = None,
    noise_std: float | None = None,
    feed_label: bool = False,
    guidance: float = 0.0,
    split: str = "test",
    data: ImageSet | Batch | None = None,
    samples: int = 1000,
    limit: int | None = 1000,
    seed: int = 0,
    batch: int = 256,
) -> pd.DataFrame:
    """Similarity of the features at every tap to those of an encoder or of another run, one row a tap and metric.

    Args:
        other: an encoder or a run; the run's own encoder by default. Another run is compared tap by tap with the same
            one, or with all of `other_taps`.
        metrics: of "cknna", "cka", "mutual_knn" and "teacher_cosine"; by default all that apply. "teacher_cosine" is what
            alignment trains: the mean cosine over patches between the run's own projector and its own encoder, so it is
            there only for taps that have a projector. Beside it stands its floor, see `align.floors`: the cosine that is
            reached without reading the image, by the best constants of the training split (its first `limit` images) for
            each position, where the label is fed for each class and position.
        direction: "forward": real images on their way to the noise. "reverse": the generating pass from fresh noise,
            compared with the other's features of the FINISHED sample (denoised); another run generates from the same noise.
        neighbours: k of CKNNA and mutual k-NN.
        pool: "mean" over tokens, or "all" tokens side by side.
        draws, noise_std: of the noise on the images that the flows read, features being averaged over the draws; an encoder
            reads them clean. None is the run's own choice, `config.read`; see `analysis.noise.read_noise`.
        feed_label: the flow is told the class (under "reverse": asked for one, labels in turn). The class vector that
            every block then adds makes features cluster by class, whatever the image: hence off by default.
        guidance: of the generating pass; needs feed_label.
        split, data, limit: which images, under "forward"; the n x n kernels want a thousand or some thousands.
        samples: how many, under "reverse", with seeds from `seed` on.

    Returns: columns run, strategy, train_seed, tap, block, layer, module_path, metric, value, n, other, other_tap,
        direction, label_fed, guidance, draws, noise_std, pool, neighbours, seed, device; with "teacher_cosine" also floor,
        above_floor (value - floor) and floor_of ("position" or "label and position"), nan and "" beside other metrics.
        The floor is nan too where the training split is not at hand.

    Raises: LabError for a tap or metric that does not exist, an empty set, constant features, more neighbours than
        images, or a run without an encoder to compare with.
    """
    how = Reading(direction, pool, noise_std, feed_label, guidance, samples, seed, batch, draws)
    wanted = run.flow.resolve(taps)
    chosen = _metrics(run, other, wanted, metrics)
    fed = (split, data, limit)
    if isinstance(other, Run):
        if other.flow.config.image_shape != run.flow.config.image_shape:
            raise LabError(f"{run.name} and {other.name} are flows of images of different sizes")
        partners = other.flow.resolve(taps if other_taps is None else other_taps)
        if other_taps is None and partners != wanted:
            raise LabError(f"{taps!r} stands for other taps in {other.name} than in {run.name}: say other_taps too")
        mine = together(how.batches(run, [tap.name for tap in wanted], *fed), keep_images=False)
        theirs = together(how.batches(other, [tap.name for tap in partners], *fed), keep_images=False).features
        pairs = list(zip(wanted, partners, strict=True)) if other_taps is None else list(product(wanted, partners))
        named = [(tap, partner.name) for tap, partner in pairs]
        what, cosines, floor = other.name, dict[str, float](), math.nan
    else:
        encoder = (run.encoder() if other is None else other).to(run.device)
        with_projector = [tap.name for tap in wanted if tap.name in run.projectors.taps and "teacher_cosine" in chosen]
        batches = how.batches(run, [tap.name for tap in wanted], *fed)
        means = _training_means(run, encoder, limit, batch) if with_projector else None
        mine, seen, cosines, floor = _beside_encoder(batches, run, encoder, how, with_projector, means)
        theirs = {"": seen}
        named = [(tap, "") for tap in wanted]
        what = f"{encoder.config.model}, {encoder.config.weights}"
    for name, features in (mine.features | {f"{what} {name}".strip(): value for name, value in theirs.items()}).items():
        check_spread(features, f"{name} over {len(features)} images")
    rows: list[dict[str, Any]] = []
    for tap, partner in named:
        at = {**place(tap), "other_tap": partner}
        for name in chosen:
            if name != "teacher_cosine":
                value = _MEASURES[name](mine.features[tap.name], theirs[partner], neighbours)
                rows.append({**at, "metric": name, "value": value})
            elif tap.name in cosines:
                beside = {"floor": floor, "above_floor": cosines[tap.name] - floor, "floor_of": _floor_of(run, how)}
                rows.append({**at, "metric": name, "value": cosines[tap.name], **beside})
    table = pd.DataFrame([about(run) | row for row in rows])
    if "floor_of" in table:
        table["floor_of"] = table["floor_of"].fillna("")
    return table.assign(other=what, neighbours=neighbours, n=len(mine.y), **how.columns(run))


def _metrics(run: Run, other: Run | Encoder | None, taps: list[Tap], metrics: Iterable[str] | None) -> list[str]:
    """The metrics asked for, checked; by default those that apply."""
    possible = other is None and any(tap.name in run.projectors.taps for tap in taps)
    if metrics is None:
        return [*KERNEL_METRICS, *(["teacher_cosine"] if possible else [])]
    chosen = list(metrics)
    for name in chosen:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    if "teacher_cosine" in chosen and not possible:
        has = ", ".join(run.projectors.taps) or "none"
        raise LabError(f"teacher_cosine needs the run's own encoder and a tap with a projector (run {run.name!r} has: {has})")
    return chosen


def _floor_of(run: Run, how: Reading) -> str:
    """What the best constants may know: the label only where the flow is fed it."""
    return LABEL_POSITION if how.feed_label and run.flow.config.classes else POSITION


def _training_means(run: Run, encoder: Encoder, limit: int | None, batch: int) -> TargetMeans | None:
    """Of the run's training split, where it is at hand."""
    try:
        images = image_set(run, "train", None, limit)
    except LabError:
        return None
    return teacher_means(run, encoder, images, batch)


@torch.no_grad()
def _beside_encoder(
    batches: Iterable[Read], run: Run, encoder: Encoder, how: Reading, with_projector: list[str], means: TargetMeans | None
) -> tuple[Read, Tensor, dict[str, float], float]:
    """The flow's features, the encoder's (n, E) of the same images, the mean cosine over patches by projector, its floor."""
    parts, seen, floors = [], [], list[Tensor]()
    cosines: dict[str, list[Tensor]] = {name: [] for name in with_projector}
    for part in batches:
        patches = encoder(part.x.to(run.device))
        seen.append(how.pooled(patches).cpu())
        target = match_grid(patches, encoder.grid, run.flow.config.side)
        for name, values in cosines.items():
            values.append(cosine(run.projectors.project(name, part.states[name]), target).cpu())
        if means is not None:
            floor = means.floor(target, part.y)
            floors.append(floor.label_position if _floor_of(run, how) == LABEL_POSITION else floor.position)
        parts.append(Read(part.features, part.y, part.x[:0], {}))
    near = {name: float(torch.cat(values).mean()) for name, values in cosines.items()}
    return together(parts), torch.cat(seen), near, float(torch.cat(floors).mean()) if floors else math.nan


_MEASURES: dict[str, Callable[[Tensor, Tensor, int], float]] = {
    "cknna": cknna,
    "cka": lambda a, b, _neighbours: cka(a, b),
    "mutual_knn": mutual_knn,
}
