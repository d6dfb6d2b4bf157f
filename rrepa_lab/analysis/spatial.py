"""Spatial structure of features: how the similarity of two tokens of an image depends on how far apart they are.

The measures are those of iREPA (Singh et al. 2025, arXiv 2512.10794), which finds that the spatial structure of a teacher,
more than its accuracy, predicts how well alignment with it works. Its public code (End2End-Diffusion/iREPA,
metrics/spatial_metrics.py) sets the distances for 16x16 tokens; on other grids they are in proportion to the side. All
distances are Manhattan distances, in tokens.
"""

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.align.target import TeacherTargets, check_grid
from rrepa_lab.align.teacher import Teacher
from rrepa_lab.analysis.features import FeatureProtocol, Images
from rrepa_lab.checks import whole_number
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.taps import Tap, Taps
from rrepa_lab.measurements.columns import about, average, encoder_tap, encoder_words, place
from rrepa_lab.measurements.metrics import metric_of
from rrepa_lab.runs.run import Run

PAPER_SIDE, PAPER_FAR, PAPER_REACH = 16, 6, 8  # tokens along an edge, and its distances, in iREPA
MAX_COSINES = 2**22  # in memory at once
DEFAULT_IMAGES = Images(limit=1000)


def lds(features: Tensor, far: int | None = None) -> Tensor:
    """Local-versus-distant similarity: the mean cosine of neighbouring tokens minus that of distant ones.

    Neighbours are at distance 1, up, down, left or right. Pairs are counted once and weigh the same.

    Args:
        features: (B, T, D), T = side * side tokens row by row.
        far: the distance from which on tokens are distant; by default `far_distance`, 6 for 16x16 tokens.

    Returns: (B,) float64, cosine; 0 where all tokens of an image have the same direction.

    Raises: LabError for features of another shape or not finite, and a grid without distant tokens.

    Source: arXiv 2512.10794, its code's `metric_lds`.

    Example:
        >>> rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        >>> gradual = torch.stack([rows + 1, columns + 1], dim=-1).view(1, 16, 2)
        >>> lds(gradual) > 0, lds(torch.ones(1, 16, 1))
        (tensor([True]), tensor([0.], dtype=torch.float64))
    """
    side = _side(features)
    start = far_distance(side) if far is None else whole_number("far", far, 2, _farthest(side))
    mean, pairs = cosine_by_distance(features)
    distant = mean[:, start - 1 :] @ pairs[start - 1 :] / pairs[start - 1 :].sum()
    return mean[:, 0] - distant


def cds(features: Tensor, reach: int | None = None) -> Tensor:
    """Correlation decay slope: how fast the cosine of two tokens falls with their distance.

    The negative slope of the least-squares line through the mean cosines at the distances 1..reach, which weigh the same.

    Args:
        features: (B, T, D), T = side * side tokens row by row.
        reach: the largest distance of the line; by default `slope_reach`, 8 for 16x16 tokens.

    Returns: (B,) float64, cosine per token of distance. A token is a larger part of an image on a smaller grid: values of
        different grids are not comparable.

    Raises: LabError as `lds`.

    Source: arXiv 2512.10794, its code's `metric_cds`.

    Example:
        >>> cds(torch.ones(2, 16, 1)).tolist()
        [0.0, 0.0]
    """
    side = _side(features)
    last = slope_reach(side) if reach is None else whole_number("reach", reach, 2, _farthest(side))
    mean, _ = cosine_by_distance(features)
    distances = torch.arange(1, last + 1, device=mean.device, dtype=mean.dtype)
    centred = distances - distances.mean()
    return mean[:, :last] @ -centred / (centred @ centred)


def rmsc(features: Tensor) -> Tensor:
    """Root mean square spatial contrast: the spread of the tokens of an image, each scaled to length 1.

    The root of the mean squared distance to their mean; where tokens are does not matter.

    Args:
        features: (B, T, D), T = side * side tokens.

    Returns: (B,) float64, in 0..1: 0 for tokens of the same direction, 1 where the scaled tokens have mean 0.

    Raises: LabError for features of another shape, not finite, or of a single token.

    Source: arXiv 2512.10794, its code's `metric_rmsc`.

    Example:
        >>> rmsc(torch.eye(4).unsqueeze(0))  # four orthogonal tokens: sqrt(1 - 1/4)
        tensor([0.8660], dtype=torch.float64)
    """
    _side(features)
    unit = _directions(features)
    return (unit - unit.mean(dim=1, keepdim=True)).square().sum(dim=2).mean(dim=1).sqrt()


def cosine_by_distance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of the pairs of tokens at each distance 1..2 (side - 1), and how many pairs there are.

    A token of length 0 has cosine 0 with all.

    Args:
        features: (B, T, D), T = side * side tokens row by row.

    Returns: (B, 2 (side - 1)) and (2 (side - 1),), float64.

    Raises: LabError for features of another shape, not finite, or of a single token.

    Example:
        >>> mean, pairs = cosine_by_distance(torch.ones(1, 9, 2))
        >>> pairs.tolist()
        [12.0, 14.0, 8.0, 2.0]
    """
    side = _side(features)
    distance = _distances(side).flatten().to(features.device)
    pairs = torch.bincount(distance).double()
    sums = []
    for part in features.split(max(1, MAX_COSINES // len(distance))):
        unit = _directions(part)
        cosines = (unit @ unit.transpose(1, 2)).flatten(1)
        sums.append(cosines.new_zeros(len(part), len(pairs)).index_add_(1, distance, cosines))
    return (torch.cat(sums) / pairs)[:, 1:], pairs[1:] / 2  # of both orders


# metric -> its values (B,) of features (B, T, D)
SPATIAL_METRICS: dict[str, Callable[[Tensor], Tensor]] = {"lds": lds, "cds": cds, "rmsc": rmsc}


def far_distance(side: int) -> int:
    """From which distance on tokens are distant: 6/16 of the side, rounded.

    Raises: LabError for fewer than 4x4 tokens, where that is the distance of neighbours.

    Example:
        >>> [far_distance(side) for side in (4, 8, 16, 32)]
        [2, 3, 6, 12]
    """
    return _in_proportion(PAPER_FAR, side, "lds", "far")


def slope_reach(side: int) -> int:
    """The largest distance of the line of `cds`: 8/16 of the side, rounded.

    Raises: LabError for fewer than 3x3 tokens, where the line has one point.

    Example:
        >>> [slope_reach(side) for side in (4, 8, 16, 32)]
        [2, 4, 8, 16]
    """
    return _in_proportion(PAPER_REACH, side, "cds", "reach")


@torch.no_grad()
def spatial_structure(
    run: Run,
    taps: Taps = "block.*.layer.*",
    *,
    metrics: Iterable[str] | None = None,
    protocol: FeatureProtocol | None = None,
    baselines: bool = True,
    images: Images = DEFAULT_IMAGES,
) -> pd.DataFrame:
    """Spatial structure of the features at every tap and of each teacher, one row a tap and metric.

    The measures of iREPA (arXiv 2512.10794), means over images: "lds", the mean cosine of neighbouring tokens (Manhattan
    distance 1) minus that of distant ones; "cds", the negative slope of the mean cosine over the distance; "rmsc", the root
    mean square distance of the tokens, scaled to length 1, from their mean. Features whose tokens are alike, or differ
    without regard to where they are, have lds and cds near 0.

    Distances are in proportion to the side of the grid. iREPA has 16x16 tokens: distant from 6 on, slope over 1..8. For
    8x8 tokens that is 3 and 1..4, for 4x4 tokens 2 and 1..2 (column `protocol`). Compare values of the same grid only.

    Args:
        metrics: of "lds", "cds" and "rmsc"; by default all.
        protocol: which features; tokens are not pooled, whatever its `pool`. Direction "reverse" is the generating pass from
            fresh noise. Features are averaged over noise samples first.
        baselines: also measure each teacher of the run (tap "encoder", of several also "encoder.1" and so on), on its own
            features of the images without noise, under "reverse" of the FINISHED samples. They are taken on the flow's
            grid, as alignment takes them: averages where the teacher has more patches, and interpolated where it has fewer,
            which makes neighbours more alike (column `protocol`). There are no such rows where the run has no teacher, or is
            not aligned and has none at hand (a warning).
        images: which, under "forward".

    Returns: columns run, strategy, data, space, encoder, train_seed, tap, block, layer, module_path, metric, value, unit,
        standard_error (over images; nan for one), n (images), protocol (distances and grid), direction, label_fed, guidance,
        n_noise_samples, noise_std, pool (""), seed, device.

    Raises: LabError for a tap or metric that does not exist, an empty set, features that are not finite, a grid that is too
        small (4x4 tokens for "lds", 3x3 for "cds", 2x2 for "rmsc"), or a teacher with one patch.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.spatial_structure(rl.load("digits-reverse"), "block.3.layer.2", images=rl.Images(limit=50))
        >>> table[["tap", "metric", "n"]].values.tolist()[1:4]
        [['block.3.layer.2', 'cds', 50], ['block.3.layer.2', 'rmsc', 50], ['encoder', 'lds', 50]]
        >>> table.protocol[0]
        '4x4 tokens, Manhattan distances: 1, and distant from 2 on'
    """
    how = FeatureProtocol() if protocol is None else protocol
    chosen = list(SPATIAL_METRICS) if metrics is None else list(metrics)
    for name in chosen:
        if name not in SPATIAL_METRICS:
            raise unknown("metric", name, SPATIAL_METRICS)
    wanted, side = run.flow.resolve(taps), run.flow.config.side
    words = {name: _words(name, side) for name in chosen}
    encoders = {encoder_tap(number): one for number, one in enumerate(run.reference_encoders() if baselines else [])}
    places: dict[str, Tap | str] = {tap.name: tap for tap in wanted} | {name: name for name in encoders}
    values: dict[tuple[str, str], list[Tensor]] = {key: [] for key in product(places, chosen)}
    for features in _batches(run, [tap.name for tap in wanted], encoders, how, images):
        for (name, metric), parts in values.items():
            parts.append(SPATIAL_METRICS[metric](features[name]).cpu())
    known, rows = about(run), []
    for (name, metric), parts in values.items():
        row = known | place(places[name]) | _mean(metric, torch.cat(parts)) | {"protocol": words[metric]}
        if name in encoders:
            row["encoder"] = encoder_words(run, encoders[name].config)
            row["protocol"] += _regridded(encoders[name], side)
        rows.append(row)
    return pd.DataFrame(rows).assign(**how.columns(run) | {"pool": ""})


def _batches(
    run: Run, taps: list[str], encoders: dict[str, Teacher], how: FeatureProtocol, images: Images
) -> Iterable[dict[str, Tensor]]:
    """Features (B, T, D) batch after batch: of the taps, and of each teacher on the flow's grid."""
    side = run.flow.config.side
    for encoder in encoders.values():
        check_grid(encoder, side)
    targets = {name: TeacherTargets(encoder, side) for name, encoder in encoders.items()}
    for part in how.batches(run, taps, images, originals=bool(encoders)):
        seen = part.for_teacher.to(run.device)
        features = part.states | {name: target.read(seen) for name, target in targets.items()}
        for name, values in features.items():
            if not values.isfinite().all():
                raise LabError(f"features of {name} are not finite")
        yield features


def _mean(metric: str, values: Tensor) -> dict[str, Any]:
    """Columns metric, value (mean over images), unit, standard_error and n."""
    found = average(values)
    return {"metric": metric, "value": found.pop("value"), "unit": metric_of(metric).unit, **found}


def _words(metric: str, side: int) -> str:
    """Protocol of a metric on a grid; LabError where it cannot be measured there."""
    _check_side(side)
    grid = f"{side}x{side} tokens"
    if metric == "lds":
        return f"{grid}, Manhattan distances: 1, and distant from {far_distance(side)} on"
    return f"{grid}, Manhattan distances 1..{slope_reach(side)}" if metric == "cds" else grid


def _regridded(encoder: Teacher, side: int) -> str:
    """How a teacher's features came on the flow's grid, if its own is another."""
    rows, columns = encoder.grid
    if (rows, columns) == (side, side):
        return ""
    return f"; {'averages of' if min(rows, columns) >= side else 'interpolated from'} {rows}x{columns} patches"


def _in_proportion(distance: int, side: int, metric: str, argument: str) -> int:
    """A distance of iREPA's grid on one of another side, rounded half up; LabError where it is no more than 1."""
    _check_side(side)
    found = (2 * distance * side + PAPER_SIDE) // (2 * PAPER_SIDE)
    if found < 2:
        raise LabError(
            f"{side}x{side} tokens are too few for {metric}: the distance {distance} on {PAPER_SIDE}x{PAPER_SIDE} tokens is in "
            f"proportion {found} here, that of neighbours; leave {metric} out, or call {metric}(features, {argument}=2)"
        )
    return found


def _check_side(side: int) -> None:
    if side < 2:
        raise LabError("features of a single token have no spatial structure: it needs at least 2x2 tokens")


def _farthest(side: int) -> int:
    """The largest distance of two tokens."""
    return 2 * (side - 1)


def _distances(side: int) -> Tensor:
    """Manhattan distances (T, T) of tokens row by row."""
    token = torch.arange(side * side)
    at = torch.stack([token // side, token % side], dim=1)
    return (at[:, None] - at[None]).abs().sum(dim=2)


def _side(features: Tensor) -> int:
    """Tokens along an edge, of features that are checked."""
    if features.ndim != 3 or not features.numel():
        raise LabError(f"features must be (B, T, D), none of them 0, not {tuple(features.shape)}")
    side = math.isqrt(features.shape[1])
    if side**2 != features.shape[1]:
        raise LabError(f"{features.shape[1]} tokens are not side x side; leave out tokens that stand for no patch")
    _check_side(side)
    if not features.isfinite().all():
        raise LabError("features are not finite")
    return side


def _directions(features: Tensor) -> Tensor:
    """Tokens of length 1, float64; those of length 0 stay 0."""
    return F.normalize(features.double(), dim=2, eps=torch.finfo(torch.float64).tiny)
