"""Scores of samples under the named protocols: rows of a table, each with all that its number depends on."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rrepa_lab.data.loaders import generator
from rrepa_lab.errors import LabWarning
from rrepa_lab.evaluation.collect import BATCH, FeatureStatistics, collect
from rrepa_lab.evaluation.distances import (
    Estimate,
    frechet_to,
    inception_score,
    kernel_distance,
    precision_recall,
    vendi_score,
)
from rrepa_lab.evaluation.intervals import around, mean_interval, statistic_interval
from rrepa_lab.evaluation.moments import Gaussian, gaussian_of
from rrepa_lab.evaluation.pictures import PictureSet
from rrepa_lab.evaluation.protocols import FD, IS, KD, PRECISION, RECALL, SFD, VENDI, Chosen
from rrepa_lab.evaluation.reference import Reference
from rrepa_lab.measurements.metrics import metric_of

IS_PART = 5000  # pictures of a part of an Inception score, in ADM's evaluator
MOST_BOOTSTRAP = 1024  # dimensions up to which a Fréchet distance is resampled


class Scored(NamedTuple):
    """Samples under a protocol: its rows, and the features that further measurements take."""

    chosen: Chosen
    rows: list[dict[str, Any]]
    samples: FeatureStatistics
    real: FeatureStatistics


def score_pictures(
    samples: PictureSet,
    pairs: Sequence[tuple[Chosen, Reference]],
    *,
    device: torch.device | str = "cpu",
    batch: int = BATCH,
    seed: int = 0,
    intervals: bool = True,
    watch: Callable[[int], object] | None = None,
) -> list[Scored]:
    """Score pictures under protocols, each with its reference; every picture is made once.

    Args:
        batch: pictures that a network reads at once; no number depends on it.
        seed: of the bootstrap.
        intervals: resample Fréchet distances of up to 1,024 numbers, which takes seconds; of larger ones the
            interval is that of the delta method.
        watch: called with the number of pictures that were read.

    Returns: rows with the columns metric, value, unit, standard_error, low, high, interval (over samples), n, n_reference,
        reference, reference_sha256, network, network_sha256, features, resize, bytes, dtype, batch.

    Raises: LabError for pictures or features that are not finite, and a reference of another network.
        Warns (LabWarning) of fewer pictures than features, and says how many are needed.
    """
    # the references first: one that does not fit is found before 50,000 samples are drawn
    real = [reference.statistics(chosen.network, device) for chosen, reference in pairs]
    found = collect(samples, [one.network for one, _ in pairs], device=device, batch=batch, watch=watch)
    how = {"dtype": "float32, moments float64", "batch": batch}
    return [
        _score(*pair, of_samples, of_real, seed if intervals else None, how)
        for pair, of_samples, of_real in zip(pairs, found, real, strict=True)
    ]


def _score(
    chosen: Chosen,
    reference: Reference,
    samples: FeatureStatistics,
    real: FeatureStatistics,
    seed: int | None,
    how: dict[str, Any],
) -> Scored:
    """The rows of a protocol; without a seed no interval by bootstrap."""
    network = chosen.network
    common = {
        "n": samples.n, "reference": reference.words, "reference_sha256": reference.sha256, "network": network.words,
        "network_sha256": network.sha256, "resize": network.resize, "bytes": network.bytes,
    } | how  # fmt: skip
    rows = []
    for kind in chosen.protocol.metrics:
        for row in _MEASURES[kind](chosen, samples, real, seed):
            unit = metric_of(row["metric"]).unit
            rows.append({"unit": unit, "n_reference": real.n} | row | common)
    return Scored(chosen, rows, samples, real)


def _frechet(chosen: Chosen, samples: FeatureStatistics, real: FeatureStatistics, seed: int | None) -> Iterator[dict[str, Any]]:
    name = chosen.metric(FD)
    _warn_few(name, samples.pooled, real)
    distance = frechet_to(real.pooled)
    value = distance(samples.pooled)
    row = {"metric": name, "value": value, "features": samples.pooled.dim}
    features = samples.features
    if seed is not None and features is not None:
        if samples.pooled.dim <= MOST_BOOTSTRAP:
            row |= statistic_interval(value, lambda rows: distance(gaussian_of(features, rows)), samples.n, seed)
        elif samples.n > samples.pooled.dim:
            row |= around(value, distance.standard_error(features, samples.pooled), "delta method")
    yield row


def _spatial(chosen: Chosen, samples: FeatureStatistics, real: FeatureStatistics, _: int | None) -> Iterator[dict[str, Any]]:
    name = chosen.metric(SFD)
    if samples.spatial is None or real.spatial is None:
        if samples.spatial is not None:
            warnings.warn(
                f"{name} is left out: the reference has no spatial statistics (mu_s, sigma_s)", LabWarning, stacklevel=2
            )
        return
    _warn_few(name, samples.spatial, real)
    value = frechet_to(real.spatial)(samples.spatial)
    yield {"metric": name, "value": value, "features": samples.spatial.dim}


def _warn_few(name: str, samples: Gaussian, real: FeatureStatistics) -> None:
    """FID falls with the number of samples, and of fewer than features the covariance is singular."""
    for which, n in (("samples", samples.n), ("reference pictures", real.n)):
        if 0 < n <= samples.dim:
            text = f"{name} of {n} {which} and {samples.dim} features: the covariance is singular and the distance too large"
            warnings.warn(f"{text}; at least {samples.dim + 1} are needed, and several times as many are usual", LabWarning,
                          stacklevel=2)  # fmt: skip


def _inception(chosen: Chosen, samples: FeatureStatistics, real: FeatureStatistics, _: int | None) -> Iterator[dict[str, Any]]:
    if samples.logits is None:
        return
    score = inception_score(samples.logits.double().log_softmax(dim=1), IS_PART)
    row: dict[str, Any] = {"metric": chosen.metric(IS), "value": score.value, "features": samples.logits.shape[1]}
    row |= around(score.value, score.standard_error, f"parts of {IS_PART}")
    yield row


def _kernel(chosen: Chosen, samples: FeatureStatistics, real: FeatureStatistics, _: int | None) -> Iterator[dict[str, Any]]:
    kept = _kept(chosen.metric(KD), samples, real)
    if kept is None:
        return
    x, y = kept
    found: Estimate = kernel_distance(x, y)
    row = {"metric": chosen.metric(KD), "value": found.value, "standard_error": found.standard_error, "features": x.shape[1]}
    yield row | {"n_reference": len(y)} | around(found.value, found.standard_error, "first-order standard error")


def _precision(
    chosen: Chosen, samples: FeatureStatistics, real: FeatureStatistics, seed: int | None
) -> Iterator[dict[str, Any]]:
    kept = _kept(chosen.metric("precision and recall"), samples, real)
    if kept is None:
        return
    x, y = kept
    found = precision_recall(x, y)
    for kind, inside in ((PRECISION, found.precision), (RECALL, found.recall)):
        row = {"metric": chosen.metric(kind), "value": float(inside.double().mean()), "features": x.shape[1]}
        # recall is a mean over the reference: its interval over samples would need other balls for every resample
        over = mean_interval(inside, seed or 0, "samples") if kind == PRECISION else {}
        yield row | {"n_reference": len(y)} | over


def _vendi(chosen: Chosen, samples: FeatureStatistics, real: FeatureStatistics, _: int | None) -> Iterator[dict[str, Any]]:
    assert samples.features is not None
    x, y = samples.features, real.features
    yield {"metric": chosen.metric(VENDI), "value": vendi_score(x), "features": x.shape[1]}
    if y is not None:  # of as many real pictures, which the score depends on
        rows = torch.randperm(len(y), generator=generator(0))[: len(x)]
        row = {"metric": chosen.metric(f"real {VENDI}"), "value": vendi_score(y[rows]), "features": x.shape[1]}
        yield row | {"n_reference": len(rows)}


def _kept(name: str, samples: FeatureStatistics, real: FeatureStatistics) -> tuple[Tensor, Tensor] | None:
    """The features of both; None, with a warning, for a reference without pictures."""
    if real.features is None:
        text = f"{name} left out: the reference holds statistics and no pictures (arr_0)"
        warnings.warn(text, LabWarning, stacklevel=3)
        return None
    assert samples.features is not None
    return samples.features, real.features


_MEASURES: dict[str, Callable[[Chosen, FeatureStatistics, FeatureStatistics, int | None], Iterator[dict[str, Any]]]] = {
    FD: _frechet, SFD: _spatial, IS: _inception, KD: _kernel, PRECISION: _precision, VENDI: _vendi,
    RECALL: lambda *_: iter(()),  # beside precision
}  # fmt: skip
