"""Probes: how much of the class can be predicted from a flow's features, layer by layer.

A linear probe is a multinomial logistic regression on standardised features; a k-NN probe asks the nearest training
images by cosine. Both are trained on real images that the flow encoded WITHOUT label, features averaged over tokens: the
recipe of REPA's authors (sihyun-yu/REPA, issues 32 and 55: no label, mean over patches, normalisation and one linear layer).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd
from torch import Tensor

from rrepa_lab.analysis.classify import METHODS, classify
from rrepa_lab.analysis.features import (
    FeatureBatch,
    FeatureProtocol,
    Images,
    check_spread,
    concatenate,
    cycled_labels,
    image_set,
)
from rrepa_lab.analysis.noise import NoiseSamples
from rrepa_lab.analysis.probe_fit import ProbeFit, check_classes, fit_knn, fit_linear, fit_torch
from rrepa_lab.data.images import Batch, ImageSet, TensorImages
from rrepa_lab.data.splits import splits
from rrepa_lab.data.subset import Subset
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.taps import Tap, Taps
from rrepa_lab.measurements.columns import about, accuracy, encoder_tap, encoder_words, is_baseline, place
from rrepa_lab.runs.run import Run, check_names

PROBES = ("linear", "knn")


def probe(
    runs: Run | Sequence[Run],
    taps: Taps = "block.*.layer.*",
    *,
    protocol: FeatureProtocol | Sequence[FeatureProtocol] | None = None,
    probes: Iterable[str] = PROBES,
    classifiers: Iterable[str] = (),
    baselines: bool = True,
    fit: ProbeFit | None = None,
    force: bool = False,
    data: Mapping[str, ImageSet | Batch] | None = None,
    limit: int | None = None,
) -> pd.DataFrame:
    """Accuracy of probes on the features of every tap, one row a tap and probe.

    Args:
        protocol: which features, or several protocols with rows for each. Direction "forward" scores the probes on the test
            split. "reverse" scores them on images that the flow generates from fresh noise, encoded again without label,
            against the label they were generated with: whether its own features find in a sample the class it was
            conditioned on. (At an image's own z both directions have the same features, see `agreement`; that would be the
            forward table again.) With `feed_label` a probe reads the label off the label: refused unless `force` is set too.
            Under "reverse" the features are then those of the generating pass itself. The mean over tokens loses where
            things are: a probe of it may stay below one of raw pixels where a probe of all tokens does not.
        probes: "linear", "knn".
        classifiers: methods of `rl.classify` scored on the same images, one row each with tap "": with "gradient" the
            table is the paper's Figure 4, a curve over layers with the training-free accuracy as a level.
        baselines: also probe raw pixels (tap "pixels") and the run's encoder (tap "encoder", of several also "encoder.1"
            and so on), which the flow's features should be compared with. Column `encoder` says which it is, and what its
            weights were trained on: an encoder that was trained with labels is no unsupervised baseline.
        fit: how the probes are fitted.
        force: allow features that were fed the label.
        data: "train" and "test": image sets or (x, y) batches instead of the run's own splits.
        limit: so many images of each, class-balanced, seed 0.

    Returns: columns run, strategy, data, space, encoder, train_seed, tap, block, layer, module_path, metric (linear_accuracy,
        knn_accuracy, <method>_accuracy), value, standard_error (binomial), n (images scored), n_train, direction,
        label_fed, guidance, n_noise_samples, noise_std, pool, probe (what was fitted), seed, device.

    Raises: LabError for a tap that does not exist, an empty or single-class set, features that are constant, more
        neighbours than images, or labels that would leak.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.probe(rl.load("digits-reverse"), "block.3.layer.2", probes=["knn"], baselines=False, limit=50)
        >>> table[["tap", "metric", "n"]].values.tolist()
        [['block.3.layer.2', 'knn_accuracy', 50]]
    """
    probes, classifiers = list(probes), list(classifiers)
    for names, known, kind in ((probes, PROBES, "probe"), (classifiers, METHODS, "classification method")):
        for name in names:
            if name not in known:
                raise unknown(kind, name, known)
    protocols = _protocols(protocol, force)
    settings = ProbeFit() if fit is None else fit
    measured = [runs] if isinstance(runs, Run) else list(runs)
    check_names(measured)
    sets = {split: Images(split, (data or {}).get(split), limit) for split in ("train", "test")}
    tables = []
    for run, how in product(measured, protocols):
        if how.direction == "reverse" and run.flow.config.classes == 0:
            raise LabError(f"run {run.name!r} has no classes to condition on: its samples cannot be scored")
        fitting = image_set(run, sets["train"])
        extractor = _Extractor(run, [tap.name for tap in run.flow.resolve(taps)], baselines, how)
        scored = extractor.features(image_set(run, sets["test"])) if how.direction == "forward" else extractor.samples()
        rows = _accuracies(extractor, fitting, scored, probes, settings)
        for method in classifiers if how is protocols[0] else ():
            noise = NoiseSamples.of(how.noise, how.seed)
            right = classify(run, scored.x, method, noise=noise, batch=how.batch).label.cpu() == scored.y
            rows.append({**place(""), "metric": f"{method}_accuracy", **accuracy(right), "n_train": 0, "probe": "none"})
        baselines_of = {name: {"encoder": encoder_words(run, one.config)} for name, one in extractor.encoders.items()}
        of_run = about(run)
        table = pd.DataFrame([of_run | baselines_of.get(row["tap"], {}) | row for row in rows])
        tables.append(table.assign(**how.columns(run)))
    return pd.concat(tables, ignore_index=True)


def _protocols(protocol: FeatureProtocol | Sequence[FeatureProtocol] | None, force: bool) -> list[FeatureProtocol]:
    """The protocols of a call, checked."""
    protocols = (
        [FeatureProtocol()] if protocol is None else [protocol] if isinstance(protocol, FeatureProtocol) else list(protocol)
    )
    for how in protocols:
        if how.feed_label and not force:
            raise LabError(
                "features that were fed the label carry it: every block adds the class vector to all tokens, and a probe "
                "would read it back; leave feed_label out, or insist with force=True (--force)"
            )
        if how.guidance and how.direction == "forward":
            raise LabError("guidance belongs to generated samples: direction='reverse'")
    return protocols


class _Extractor:
    """Computes the features of image sets alike for fitting and for scoring, baselines included."""

    def __init__(self, run: Run, taps: list[str], baselines: bool, how: FeatureProtocol) -> None:
        self.run, self.taps, self.baselines, self.how = run, taps, baselines, how
        each = run.reference_encoders() if baselines else []
        self.encoders = {encoder_tap(number): one for number, one in enumerate(each)}

    def batches(self, images: ImageSet, order: Iterable[list[int]] | None = None) -> Iterable[FeatureBatch]:
        """Features batch after batch."""
        originals = self._originals(images) if self.encoders else None
        return map(self._with_baselines, self.how.real(self.run, self.taps, images, order, originals))

    def _originals(self, images: ImageSet) -> ImageSet | None:
        """What the teacher sees of images that belong to a split of the run; None for others, which it sees as they are."""
        if self.run.config.data.teacher_size is None:
            return None
        for split in splits(self.run.config.data):
            whole = self.run.images(split)
            of = images.images if isinstance(images, Subset) else images
            if len(of) == len(whole) and of.fingerprint == whole.fingerprint:
                return self.run.teacher_images(split, images)
        return None

    def features(self, images: ImageSet, keep_images: bool = True) -> FeatureBatch:
        """Features of all images of a set, with the images if these are to be kept."""
        return concatenate(self.batches(images), keep_images)

    def samples(self) -> FeatureBatch:
        """Features of generated images: encoded again as images, or of the generating pass if the label is to be fed."""
        labels = cycled_labels(self.run, self.how.samples)
        if self.how.feed_label:
            return concatenate(map(self._with_baselines, self.how.generated(self.run, self.taps, labels)))
        made = concatenate(self.how.generated(self.run, [], labels))
        return self.features(TensorImages(made.x, made.y, self.run.classes, 0))

    def _with_baselines(self, batch: FeatureBatch) -> FeatureBatch:
        """The same with the pixels and the encoders' features of the clean images added."""
        if self.baselines:
            batch.features["pixels"] = batch.x.flatten(1)
        for name, encoder in self.encoders.items():
            batch.features[name] = self.how.pooled(encoder(batch.for_teacher.to(self.run.device))).cpu()
        return batch


def _accuracies(
    extractor: _Extractor, fitting: ImageSet, scored: FeatureBatch, probes: list[str], fit: ProbeFit
) -> list[dict[str, Any]]:
    """Rows of all probes; of a large set only the first images are kept in memory, for the k-NN probe."""
    rows, large, seed = [], fit.by_torch(len(fitting)), extractor.how.seed
    if "linear" in probes and large:
        if len(scored.y) > 1:
            for name, features in scored.features.items():
                check_spread(features, f"{name} over {len(features)} images")
        answers = fit_torch(extractor.batches, fitting, scored, fit, extractor.how.batch, seed, extractor.run.device)
        what = f"torch: batch norm and linear, {fit.epochs} epochs, AdamW lr {fit.lr:g}"
        rows += [_row(name, "linear_accuracy", answer, scored, len(fitting), what) for name, answer in answers.items()]
    if probes == ["linear"] and large:
        return rows
    known = extractor.features(image_set(extractor.run, Images("train", fitting, fit.small)), keep_images=False)
    check_classes(known.y)
    for name, features in known.features.items():
        check_spread(features, f"{name} over {len(features)} training images")
    if "linear" in probes and not large:
        for name, features in known.features.items():
            answer = fit_linear(features, known.y, scored.features[name])
            rows.append(_row(name, "linear_accuracy", answer, scored, len(features), "sklearn: standardised, logistic, C 1"))
    if "knn" in probes:
        for name, features in known.features.items():
            answer = fit_knn(features, known.y, scored.features[name], fit.neighbours)
            rows.append(_row(name, "knn_accuracy", answer, scored, len(features), f"{fit.neighbours}-NN, cosine"))
    return rows


def _row(name: str, metric: str, answer: Tensor, scored: FeatureBatch, n_train: int, what: str) -> dict[str, Any]:
    where = place(name if is_baseline(name) else Tap.parse(name))
    return {**where, "metric": metric, **accuracy(answer == scored.y), "n_train": n_train, "probe": what}


def best_layer(table: pd.DataFrame, metric: str = "linear_accuracy") -> pd.DataFrame:
    """The row of the best layer for each run and training seed, in a table of `rl.probe` or `rl.similarity`.

    The best of many layers is partly luck: compare it with the same layer of other seeds before believing it.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.probe(rl.load("digits-reverse"), "block.[34].layer.2", probes=["knn"], baselines=False, limit=50)
        >>> len(best_layer(table, "knn_accuracy"))
        1
    """
    rows = table[(table["metric"] == metric) & (table["layer"] > 0)]
    if rows.empty:
        raise LabError(f"the table has no layer measured by {metric}")
    keys = [name for name in ("run", "train_seed") if name in rows]  # a mean over seeds has no seed
    return rows.loc[rows.groupby(keys, sort=False)["value"].idxmax()]
