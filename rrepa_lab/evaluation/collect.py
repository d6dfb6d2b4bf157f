"""The features of pictures under a network: moments of all of them, in float64, and the features of as many as are kept.

Pictures are decoded, read and forgotten part by part; several processes share them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.moments import Gaussian, Moments
from rrepa_lab.evaluation.networks.contract import FeatureNetwork, Features
from rrepa_lab.evaluation.pictures import PictureSet
from rrepa_lab.processes import gather, rows_of_process

MADE = 256  # pictures that are made or decoded at once
BATCH = 64  # pictures that a network reads at once

Watch = Callable[[int], object]  # pictures that were read


@dataclass(frozen=True)
class FeatureStatistics:
    """What is known of the features of n pictures."""

    n: int
    pooled: Gaussian
    spatial: Gaussian | None
    features: Tensor | None  # (n, d) float32 on the CPU, in the order of the pictures
    logits: Tensor | None  # (n, K)
    labels: Tensor | None = None  # (n,) of the kept features, -1 where there is none


class _Part(NamedTuple):
    """What one process found."""

    rows: Tensor
    pooled: Moments
    spatial: Moments
    features: Tensor | None
    logits: Tensor | None


def collect(
    pictures: PictureSet,
    networks: list[FeatureNetwork],
    *,
    device: torch.device | str = "cpu",
    keep: bool = True,
    batch: int = BATCH,
    watch: Watch | None = None,
) -> list[FeatureStatistics]:
    """Statistics of the features of all pictures, one for each network; every picture is made once.

    Args:
        keep: also keep pooled features and class scores of every picture, which kernel distance, precision and recall,
            bootstrap and Inception score take.
        batch: pictures that a network reads at once; a result does not depend on it.
        watch: called with the number of pictures that this process has read since the last call.

    Raises: LabError for fewer than two pictures, and for pixels or features that are not finite.
    """
    if len(pictures) < 2:
        raise LabError(f"{pictures.words}: at least two pictures are needed, not {len(pictures)}")
    for network in networks:
        network.to(device)
    parts = gather(lambda: _own(pictures, networks, torch.device(device), keep, batch, watch))
    return [_together([part[number] for part in parts], pictures) for number in range(len(networks))]


@torch.no_grad()
def _own(
    pictures: PictureSet, networks: list[FeatureNetwork], device: torch.device, keep: bool, batch: int, watch: Watch | None
) -> list[_Part]:
    """The part of this process."""
    rows = rows_of_process(len(pictures))
    moments = [(Moments(network.dim), Moments(network.spatial_dim)) for network in networks]
    kept: list[list[Features]] = [[] for _ in networks]
    for part in rows.split(MADE):
        x = pictures.batch(part).to(device)
        for network, (pooled, spatial), held in zip(networks, moments, kept, strict=True):
            found = _read(network, x, batch)
            pooled.add(found.pooled)
            if found.spatial is not None:
                spatial.add(found.spatial)
            if keep:
                held.append(Features(found.pooled, None, found.logits))
        if watch is not None:
            watch(len(part))
    return [
        _Part(rows, pooled, spatial, _joined([one.pooled for one in held]), _joined([one.logits for one in held]))
        for (pooled, spatial), held in zip(moments, kept, strict=True)
    ]


def _read(network: FeatureNetwork, x: Tensor, batch: int) -> Features:
    """The features of pictures, `batch` at once; on the CPU."""
    parts = list(map(network, x.split(batch)))
    return Features(*(None if one[0] is None else torch.cat(one).float().cpu() for one in zip(*parts, strict=True)))  # type: ignore[arg-type]


def _joined(parts: list[Tensor] | list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _together(parts: list[_Part], pictures: PictureSet) -> FeatureStatistics:
    """The parts of all processes as one."""
    n = len(pictures)
    pooled, spatial = Moments.sum_of([part.pooled for part in parts]), Moments.sum_of([part.spatial for part in parts])
    features = _in_order([(part.rows, part.features) for part in parts], n)
    logits = _in_order([(part.rows, part.logits) for part in parts], n)
    early = spatial.gaussian if spatial.dim and spatial.n else None
    return FeatureStatistics(n, pooled.gaussian, early, features, logits, pictures.labels)


def _in_order(parts: list[tuple[Tensor, Tensor | None]], n: int) -> Tensor | None:
    there = [(rows, values) for rows, values in parts if values is not None]
    if not there:
        return None
    found = there[0][1].new_empty(n, *there[0][1].shape[1:])
    for rows, values in there:
        found[rows] = values
    return found
