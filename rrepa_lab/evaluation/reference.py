"""What samples are compared with: a split of the run's data, a folder, or a file of statistics or pictures.

Features and moments of a reference are kept in the cache, by the fingerprint of the pictures and the hash of the network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rrepa_lab.data.cache import ArraySpec, cached_array, has_room, is_complete
from rrepa_lab.data.decoded import prepare
from rrepa_lab.data.images import Batch
from rrepa_lab.data.layout import SPLITS
from rrepa_lab.data.splits import split_rule
from rrepa_lab.data.subset import balanced_rows
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.adm import INCEPTION_DIM, AdmFile
from rrepa_lab.evaluation.collect import BATCH, FeatureStatistics, collect
from rrepa_lab.evaluation.moments import Gaussian, gaussian_of
from rrepa_lab.evaluation.networks.contract import FeatureNetwork
from rrepa_lab.evaluation.pictures import FilePictures, PictureSet, SomePictures, SplitPictures, picture_set
from rrepa_lab.processes import gather, is_main, shared
from rrepa_lab.progress import progress
from rrepa_lab.runs.run import Run

KEPT = 10_000  # pictures of a reference whose features are kept, at most; ADM's files hold as many
BAR = 2000  # pictures from which a bar of progress is shown


@dataclass(frozen=True)
class Reference:
    """A set of real pictures, or statistics of one that a file holds.

    Args:
        words: what it is, for a protocol.
        sha256: 16 hex digits of the pictures, or of the file.
        pictures: None for a file without any.
        file: of statistics; None where they are computed from the pictures.
    """

    words: str
    sha256: str
    pictures: PictureSet | None = None
    file: AdmFile | None = None
    cached: bool = True

    def statistics(self, network: FeatureNetwork, device: torch.device | str = "cpu") -> FeatureStatistics:
        """Moments of all pictures, and features of 10,000 of them at most (class-balanced, seed 0), in the order of the set.

        The statistics of a file are taken where they are of this network; of another one its pictures are read, if it has any.

        Raises: LabError for statistics of another network without pictures, or of other weights.
        """
        held_by_file = self.file is not None and self.file.has_statistics
        if self.file is not None and held_by_file and (self.pictures is None or self.file.network[0] == network.name):
            pooled, spatial = _of_file(self.file, network)
            if self.pictures is None:
                return FeatureStatistics(self.file.n, pooled, spatial, None, None)
            kept = some_of(self.pictures, KEPT)
            features = self._features(kept, network, device)[:, : network.dim]
            return FeatureStatistics(self.file.n, pooled, spatial, features, None, kept.labels)
        assert self.pictures is not None
        kept = some_of(self.pictures, KEPT)
        held = self._features(kept, network, device)
        features, labels = held[:, : network.dim], kept.labels
        if len(kept) < len(self.pictures):
            pooled, spatial = self._moments(network, device)
        else:
            pooled, spatial = gaussian_of(features), gaussian_of(held[:, network.dim :]) if network.spatial_dim else None
        return FeatureStatistics(len(self.pictures), pooled, spatial, features, None, labels)

    def features(self, network: FeatureNetwork, limit: int, device: torch.device | str = "cpu") -> Batch:
        """Pooled features (m, d) and labels (m,) of at most `limit` pictures, class-balanced, seed 0.

        Raises: LabError for a file of statistics without pictures.
        """
        if self.pictures is None:
            raise LabError(f"{self.words} holds statistics and no pictures")
        kept = some_of(self.pictures, limit)
        return Batch(self._features(kept, network, device)[:, : network.dim], kept.labels)

    def _features(self, kept: PictureSet, network: FeatureNetwork, device: torch.device | str) -> Tensor:
        """(n, d + s) float32: pooled and spatial features."""
        spec = ArraySpec("reference", (len(kept), network.dim + network.spatial_dim), "float32", _about(kept, network))

        def compute() -> np.ndarray:
            network.to(device)
            with progress(len(kept), "picture", len(kept) < BAR or not is_main(), f"{network.name}, reference") as bar:
                return shared(lambda rows: _both(kept, rows, network, device, bar.update), len(kept)).numpy()

        return torch.from_numpy(np.array(self._made(spec, compute)))

    def _moments(self, network: FeatureNetwork, device: torch.device | str) -> tuple[Gaussian, Gaussian | None]:
        """Of all pictures; one row of the cache, so that the features of 50,000 need not be kept."""
        pictures = self.pictures
        assert pictures is not None
        d, s = network.dim, network.spatial_dim
        spec = ArraySpec("reference", (1, d + d * d + s + s * s), "float64", _about(pictures, network) | {"moments": True})

        def compute() -> np.ndarray:
            with progress(len(pictures), "picture", not is_main(), f"{network.name}, moments") as bar:
                (found,) = collect(pictures, [network], device=device, keep=False, watch=bar.update)
            parts = [found.pooled.mean, found.pooled.covariance]
            parts += [] if found.spatial is None else [found.spatial.mean, found.spatial.covariance]
            return np.concatenate([part.ravel() for part in parts])[None]

        row = np.array(self._made(spec, compute))[0]
        pooled = Gaussian(row[:d], row[d : d + d * d].reshape(d, d), len(pictures))
        rest = row[d + d * d :]
        return pooled, Gaussian(rest[:s], rest[s:].reshape(s, s), len(pictures)) if s else None

    def _made(self, spec: ArraySpec, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """From the cache, or made by all processes together and kept there by the first."""
        if self.cached and all(gather(lambda: is_complete(spec))):
            return cached_array(spec, lambda _: ())
        values = compute()
        if self.cached and is_main() and has_room(spec):
            cached_array(spec, lambda ranges: (values[rows.start : rows.stop] for rows in ranges))
        return values


@torch.no_grad()
def _both(
    pictures: PictureSet, rows: Tensor, network: FeatureNetwork, device: torch.device | str, watch: Callable[[int], object]
) -> Tensor:
    """Pooled and spatial features of some rows, side by side."""
    parts = []
    for part in rows.split(BATCH):
        found = network(pictures.batch(part).to(device))
        both = [found.pooled, *([] if found.spatial is None else [found.spatial])]
        parts.append(torch.cat([one.float() for one in both], dim=1).cpu())
        watch(len(part))
    return torch.cat(parts)


def some_of(pictures: PictureSet, limit: int) -> PictureSet:
    """At most `limit` of them, class-balanced where they have labels, in the order of the set."""
    if len(pictures) <= limit:
        return pictures
    rows = balanced_rows(pictures.labels, limit).sort().values
    return SomePictures(pictures, rows, f"{limit} of {pictures.words}")


def _about(pictures: PictureSet, network: FeatureNetwork) -> dict[str, Any]:
    how = {"network": network.name, "sha256": network.sha256, "resize": network.resize, "bytes": network.bytes}
    return {"data": pictures.sha256, "name": pictures.words, **how}


def _of_file(file: AdmFile, network: FeatureNetwork) -> tuple[Gaussian, Gaussian | None]:
    """The statistics of a file, which must be of this network."""
    name, hashed = file.network
    pooled, spatial = file.statistics(), file.statistics(spatial=True)
    assert pooled is not None
    if name != network.name or (hashed and hashed != network.sha256):
        own, theirs = f"{network.name} ({network.sha256})", f"{name} ({hashed})" if hashed else name
        raise LabError(f"{file.path} holds statistics of {theirs}, and the samples are read by {own}: they cannot be compared")
    if pooled.dim != network.dim or (spatial is not None and spatial.dim != network.spatial_dim):
        found = f"{pooled.dim} features" + ("" if spatial is None else f" and {spatial.dim} spatial ones")
        hint = f"; those of Inception are {INCEPTION_DIM} and 2,023" if name == "inception" else ""
        raise LabError(f"{file.path} holds statistics of {found}, and {network.name} has {network.dim} and "
                       f"{network.spatial_dim}{hint}")  # fmt: skip
    return pooled, spatial


def split_reference(run: Run, split: str, mirrored: bool = False) -> Reference:
    """The images of a split of a run's data; with `mirrored` each of them and its mirror image."""
    images = run.images(split)
    prepare(images)
    rule = split_rule(run.config.data, split)
    words = f"{split} split of {run.config.data.words}"
    words += "" if rule in (f"{split} = {split}/", "") or run.config.data.name == "digits" else f" ({rule})"
    pictures = SplitPictures(images, words, mirrored)
    return Reference(pictures.words, pictures.sha256, pictures, cached=run.config.data.cache != "off")


def find_reference(source: Any, run: Run | None = None) -> Reference:
    """What a user names: a split of the run's data, a .npz file of statistics or pictures, a folder, or pictures in memory.

    Raises: LabError for what is none of these.
    """
    if isinstance(source, Reference):
        return source
    if isinstance(source, str) and source in SPLITS and not Path(source).exists():
        if run is None:
            raise LabError(f"the {source} split of which data? Name a run, or give a file or folder of pictures")
        return split_reference(run, source)
    if isinstance(source, (str, Path)) and Path(source).suffix == ".npz":
        file = AdmFile(source)
        pictures = FilePictures(file) if file.has_pictures else None
        return Reference(file.path.name, file.sha256, pictures, file)
    given = picture_set(source, "the reference")
    return Reference(given.words, given.sha256, given)
