"""Whether samples show the class that they should, and how varied they are within it."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.analysis.probe_fit import fit_linear
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.intervals import mean_interval
from rrepa_lab.evaluation.protocols import ENCODER, choose
from rrepa_lab.evaluation.reference import find_reference, split_reference
from rrepa_lab.evaluation.run_samples import RunSamples, Sampling
from rrepa_lab.evaluation.scores import Scored, score_pictures
from rrepa_lab.measurements.columns import about, accuracy
from rrepa_lab.runs.run import Run

LABELLED = 5000  # training images that a classifier of samples is fitted on, at most


class Classified(NamedTuple):
    """What a classifier in the features of a network says of samples, and of the real pictures."""

    samples: Tensor  # (n,) classes
    real: Tensor | None  # (m,); None where the classifier is that of the network, or the reference has no pictures
    how: str


def classified(run: Run, one: Scored) -> Classified:
    """The classes of samples, by the network's own scores where its classes are the data's, else by a linear probe.

    The probe is fitted on the features of 5,000 training images at most, class-balanced.

    Raises: LabError for samples whose labels are outside of the run's classes.
    """
    network, samples, real = one.chosen.network, one.samples, one.real
    assert samples.features is not None
    assert samples.labels is not None
    classes = run.flow.config.classes
    outside = samples.labels[(samples.labels < 0) | (samples.labels >= classes)]
    if len(outside):
        raise LabError(f"{len(outside)} of {samples.n} samples have a label outside of 0..{classes - 1}: {int(outside[0])}")
    if network.labels and samples.logits is not None:
        return Classified(samples.logits.argmax(dim=1), None, "its own classes")
    train = split_reference(run, "train").features(network, LABELLED, run.device)
    both = samples.features if real.features is None else torch.cat([samples.features, real.features])
    found = fit_linear(train.x, train.y, both)
    on_real = None if real.features is None else found[samples.n :]
    return Classified(found[: samples.n], on_real, f"linear probe of its features, {len(train.y)} training images")


def label_rows(run: Run, one: Scored) -> Iterator[dict[str, Any]]:
    """Rows label_agreement, and where they can be had classifier_accuracy (on real pictures) and class_diversity."""
    samples, real = one.samples, one.real
    assert samples.features is not None
    assert samples.labels is not None
    answers = classified(run, one)
    common = {"unit": "fraction", "probe": answers.how}
    agree = answers.samples == samples.labels
    yield common | {"metric": "label_agreement"} | accuracy(agree) | mean_interval(agree, over="samples")
    if real.features is None or real.labels is None or bool((real.labels < 0).any()):
        return
    if answers.real is not None:
        right = answers.real == real.labels
        yield common | {"metric": "classifier_accuracy", "n_reference": len(right)} | accuracy(right) | mean_interval(right)
    ratio = mean_spread(samples.features, samples.labels) / mean_spread(real.features, real.labels)
    row = {"metric": "class_diversity", "value": ratio, "unit": "", "n": samples.n}
    yield row | {"n_reference": len(real.labels)}


def mean_spread(features: Tensor, labels: Tensor) -> float:
    """Mean over classes of the trace of the covariance within a class; classes of one picture are left out."""
    traces = [_trace(features[labels == label]) for label in labels.unique()]
    known = [trace for trace in traces if math.isfinite(trace)]
    return sum(known) / len(known) if known else float("nan")


def _trace(features: Tensor) -> float:
    """Trace of the covariance of features (n, d); nan of fewer than two."""
    return float(features.double().var(dim=0).sum()) if len(features) > 1 else float("nan")


def samples_by_class(
    run: Run, samples: int | Sampling = 2000, *, split: str = "test", protocol: str | None = None, seed: int = 0
) -> pd.DataFrame:
    """Agreement and diversity of samples, class by class: which classes a run confuses, and in which it repeats itself.

    Args:
        samples: how many, with labels in turn; or all settings.
        split: the real images that the diversity is compared with.
        protocol: "encoder", or a network.
        seed: of the first sample.

    Returns: for every class a row label_agreement, with the wrong class that its samples are taken for most often in
        `predicted` ("" where none is), and a row class_diversity (the trace of the covariance of features, as a part of that of
        real images of the class); columns run, strategy, data, space, encoder, train_seed, split, class, metric, value,
        standard_error, unit, n, predicted, probe, network, protocol.

    Raises: LabError for a run without classes, and as `rl.evaluate_samples`.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.samples_by_class(rl.load("digits-reverse"), 100)
        >>> table[table["class"] == "3"].metric.tolist()
        ['label_agreement', 'class_diversity']
    """
    if not run.flow.config.classes:
        raise LabError(f"run {run.name!r} has no classes")
    (chosen,) = choose(protocol, run)
    if chosen.protocol.name != ENCODER:
        raise LabError(f"protocol {chosen.protocol.name} has no classifier: give encoder, or a network")
    pictures = RunSamples(run, Sampling.of(samples, seed))
    (one,) = score_pictures(pictures, [(chosen, find_reference(split, run))], device=run.device, intervals=False)
    answers = classified(run, one)
    rows = [row for number, name in enumerate(run.classes) for row in _of_class(run, one, answers, number, name)]
    common = about(run) | {"split": split, "network": chosen.network.words, "probe": answers.how, "protocol": pictures.words}
    return pd.DataFrame([common | row for row in rows])


def _of_class(run: Run, one: Scored, answers: Classified, number: int, name: str) -> Iterator[dict[str, Any]]:
    samples, real = one.samples, one.real
    assert samples.features is not None
    assert samples.labels is not None
    own = samples.labels == number
    if not bool(own.any()):
        return
    wrong = answers.samples[own][answers.samples[own] != number]
    taken_for = run.classes[int(wrong.mode().values)] if len(wrong) else ""
    agree = answers.samples[own] == number
    yield {"class": name, "metric": "label_agreement", "unit": "fraction", "predicted": taken_for} | accuracy(agree)
    if real.features is not None and real.labels is not None:
        ratio = _trace(samples.features[own]) / _trace(real.features[real.labels == number])
        yield {"class": name, "metric": "class_diversity", "unit": "", "predicted": "", "value": ratio, "n": int(own.sum())}
