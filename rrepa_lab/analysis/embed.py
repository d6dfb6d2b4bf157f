"""Maps of feature space: PCA and UMAP of many images, neighbours of one, and features as colours on the image."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.analysis.features import FeatureBatch, FeatureProtocol, Images, check_spread, concatenate
from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.taps import Taps
from rrepa_lab.measurements.columns import about, place
from rrepa_lab.runs.run import Run

METHODS = ("pca", "umap")
DEFAULT_IMAGES = Images(limit=2000)
DEFAULT_PROTOCOL = FeatureProtocol(noise=0, samples=360)
_umap_lock = Lock()  # numba's workqueue threading layer aborts the process when two fits overlap


@dataclass(frozen=True)
class Umap:
    """Settings of a UMAP (arXiv 1802.03426), by cosine distance.

    Args:
        neighbours: of each image; smaller shows more local structure.
        min_dist: smallest distance of two points, 0..1.

    Example:
        >>> Umap(neighbours=5).min_dist
        0.1
    """

    neighbours: int = 15
    min_dist: float = 0.1


def embed(
    run: Run,
    taps: Taps,
    method: str = "pca",
    *,
    protocol: FeatureProtocol | None = None,
    components: int = 2,
    umap: Umap | None = None,
    images: Images = DEFAULT_IMAGES,
) -> pd.DataFrame:
    """Coordinates of images in a map of the features at each tap.

    Args:
        method: "pca" is immediate; "umap" (arXiv 1802.03426) needs seconds, more the first time. With a seed it is
            reproducible and uses one thread. Only one fit runs at a time.
        protocol: which features: of images on their way to the noise, or of samples as they are generated; clean images and
            360 samples by default.
        components: 2 or 3.
        umap: its settings.
        images: which, under direction "forward".

    Returns: one row a tap and image: run, strategy, data, space, encoder, train_seed, tap, block, layer, module_path, image
        (row, or the seed of a sample), label (class name, "" if there is none), c1, c2 and c3, method, explained (part of the
        variance that the PCA axes shown hold; nan for umap), direction, label_fed, guidance, n_noise_samples, noise_std, pool,
        seed, n.

    Raises: LabError for a tap or method that does not exist, an empty set, constant features, or more neighbours than images.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.embed(rl.load("digits-reverse"), "block.4.layer.2", images=rl.Images(limit=20))
        >>> table[["c1", "c2"]].shape
        (20, 2)
    """
    if method not in METHODS:
        raise unknown("embedding", method, METHODS)
    if components not in (2, 3):
        raise LabError(f"components must be 2 or 3, not {components}")
    how = DEFAULT_PROTOCOL if protocol is None else protocol
    wanted = run.flow.resolve(taps)
    features = concatenate(how.batches(run, [tap.name for tap in wanted], images), keep_images=False)
    return project(run, features, how, taps, method, components, umap)


def project(
    run: Run,
    batch: FeatureBatch,
    how: FeatureProtocol,
    taps: Taps,
    method: str = "pca",
    components: int = 2,
    umap: Umap | None = None,
) -> pd.DataFrame:
    """The table of `embed`, of features that were computed by this protocol, whose seed is also that of the UMAP."""
    first = 0 if how.direction == "forward" else how.seed
    labels = [run.classes[k] if k >= 0 else "" for k in batch.y.tolist()]
    images = pd.DataFrame({"image": range(first, first + len(labels)), "label": labels})
    tables = []
    for tap in run.flow.resolve(taps):
        features = batch.features[tap.name]
        check_spread(features, f"{tap.name} over {len(features)} images")
        explained = float("nan")
        if method == "pca":
            at, explained = pca(features, components)
        else:
            at = fit_umap(features, components, umap, how.seed)
        axes = {f"c{axis + 1}": at[:, axis].numpy() for axis in range(components)}
        tables.append(images.assign(**axes, **about(run), **place(tap), explained=explained))
    return pd.concat(tables, ignore_index=True).assign(method=method, **how.columns(run), n=len(labels))


def pca(features: Tensor, components: int = 2) -> tuple[Tensor, float]:
    """Features (n, d) on their first principal axes (n, components), and the part of the variance these hold; scikit-learn.

    Raises: LabError for fewer images or numbers than components.
    """
    from sklearn.decomposition import PCA

    if min(features.shape) < components:
        raise LabError(f"{components} components of {tuple(features.shape)} features: there are not as many axes")
    model = PCA(components, random_state=0)
    at = model.fit_transform(features.double().numpy())
    return torch.from_numpy(at), float(model.explained_variance_ratio_.sum())


@contextmanager
def _same_threads() -> Iterator[None]:
    """Restore torch's number of threads: numba sets that of OpenMP, which both share, to all cores."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit_umap(features: Tensor, components: int = 2, settings: Umap | None = None, seed: int = 0) -> Tensor:
    """Features (n, d) in a UMAP (n, components), by cosine distance; umap-learn.

    The start is spectral, or random where there are too few images for as many eigenvectors.

    Raises: LabError for less than three images, unless 2 <= neighbours < n, for a min_dist outside 0..1 or a seed above
        2^32 - 1, and for features that are not finite.
    """
    settings = Umap() if settings is None else settings
    neighbours = whole_number("neighbours", settings.neighbours)
    if len(features) < 3:
        raise LabError(f"a UMAP needs at least 3 images, not {len(features)}")
    if not 2 <= neighbours < len(features):
        raise LabError(f"{neighbours} neighbours among {len(features)} images: between 2 and {len(features) - 1}")
    min_dist = real_number("min_dist", settings.min_dist, 0.0, 1.0)
    seed = whole_number("the seed of a UMAP", seed, 0, 2**32 - 1)
    if not features.isfinite().all():
        raise LabError("a UMAP needs finite features: some are NaN or infinite")
    start = "spectral" if len(features) > components + 2 else "random"
    with _umap_lock, warnings.catch_warnings(), _same_threads():
        # a seed means one thread, which umap warns of at every fit; numba and sklearn add deprecations of their own
        warnings.simplefilter("ignore")
        from umap import UMAP

        model = UMAP(
            n_components=components, n_neighbors=neighbours, min_dist=min_dist, metric="cosine", random_state=seed, init=start
        )
        at = model.fit_transform(features.float().numpy())
    return torch.from_numpy(np.asarray(at)).double()


def neighbours(features: Tensor, queries: Tensor, k: int = 5, exclude: Sequence[int] | None = None) -> pd.DataFrame:
    """The k nearest of features (n, d) to each query (m, d) by cosine.

    Args:
        exclude: for each query the row that is itself, which is then not its own neighbour.

    Returns: columns query, rank (from 1), image (row of `features`), cosine.

    Raises: LabError for more neighbours than there are rows.

    Example:
        >>> neighbours(torch.eye(3), torch.eye(3)[:1], k=1).image.tolist()
        [0]
    """
    most = len(features) - (exclude is not None)
    if not 1 <= k <= most:
        raise LabError(f"{k} neighbours among {most} images")
    near = F.normalize(queries.double(), dim=1) @ F.normalize(features.double(), dim=1).T
    if exclude is not None:
        near[torch.arange(len(queries)), torch.as_tensor(exclude)] = -torch.inf
    values, rows = near.topk(k, dim=1)
    return pd.DataFrame({
        "query": np.repeat(np.arange(len(queries)), k), "rank": np.tile(np.arange(1, k + 1), len(queries)),
        "image": rows.flatten().numpy(), "cosine": values.flatten().numpy(),
    })  # fmt: skip


def patch_colours(states: Mapping[str, Tensor], side: int) -> dict[str, Tensor]:
    """Features as pictures: three principal components as red, green and blue, one basis for all that is given.

    Args:
        states: any names -> (B, T, D) states with one D: layers, directions and runs that are to be compared.
        side: T = side * side.

    Each name's states are centred and brought to unit spread before the common basis is fitted: otherwise the first
    component would tell the layers apart, whose scales differ, and not the places in the image. One colour scale too:
    the 1st and 99th percentile of a component over everything become 0 and 1.

    Returns: name -> (B, 3, side, side) in [0, 1].

    Raises: LabError for nothing, states of different width or another number of tokens, or constant states.

    Example:
        >>> patch_colours({"a layer": torch.randn(2, 16, 8)}, side=4)["a layer"].shape
        torch.Size([2, 3, 4, 4])
    """
    if not states:
        raise LabError("no states to colour")
    widths = {name: value.shape[2] for name, value in states.items()}
    if len(set(widths.values())) > 1:
        raise LabError(f"states of different widths have no common basis: {widths}")
    even = {}
    for name, value in states.items():
        if value.shape[1] != side * side:
            raise LabError(f"{name} has {value.shape[1]} tokens, not {side} x {side}")
        flat = value.double().flatten(0, 1)
        check_spread(flat, name)
        even[name] = (flat - flat.mean(dim=0)) / flat.std()
    stacked = torch.cat(list(even.values()))
    _, _, axes = torch.linalg.svd(stacked.T @ stacked)
    axes = axes[:3]
    axes = axes * axes.sum(dim=1, keepdim=True).sign()  # an axis has no sign of its own: fix one
    shown = stacked @ axes.T
    low, high = (torch.quantile(shown, q, dim=0) for q in (0.01, 0.99))
    pictures = {}
    for name, value in even.items():
        colours = ((value @ axes.T - low) / (high - low)).clamp(0, 1)
        pictures[name] = colours.view(-1, side, side, 3).permute(0, 3, 1, 2)
    return pictures
