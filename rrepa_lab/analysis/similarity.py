"""How alike the features of a flow are to those of its teacher or of another run, layer by layer.

The recipe of the field, as REPA's authors state it (sihyun-yu/REPA, issue 24): the flow encodes without label, features are
averaged over tokens.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.align.aligner import Aligner
from rrepa_lab.align.floors import LABEL_POSITION, POSITION, TargetMeans
from rrepa_lab.align.target import Targets
from rrepa_lab.align.teacher import Teacher
from rrepa_lab.analysis.features import FeatureBatch, FeatureProtocol, Images, check_spread, concatenate, image_set
from rrepa_lab.analysis.floors import teacher_means
from rrepa_lab.analysis.kernels import KERNEL_METRICS
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.taps import Tap, Taps
from rrepa_lab.measurements.columns import about, encoder_words, place
from rrepa_lab.runs.run import Run

METRICS = (*KERNEL_METRICS, "teacher_cosine")
DEFAULT_IMAGES = Images(limit=1000)


def similarity(
    run: Run,
    other: Run | Teacher | None = None,
    taps: Taps = "block.*.layer.*",
    *,
    other_taps: Taps | None = None,
    metrics: Iterable[str] | None = None,
    protocol: FeatureProtocol | None = None,
    neighbours: int = 10,
    images: Images = DEFAULT_IMAGES,
) -> pd.DataFrame:
    """Similarity of the features at every tap to those of an encoder or of another run, one row a tap and metric.

    Args:
        other: an encoder or a run; by default the run's own encoder, or each of its encoders, with rows for each. Another
            run is compared tap by tap with the same one, or with all of `other_taps`.
        metrics: of "cknna", "cka", "mutual_knn" and "teacher_cosine"; by default all that apply. "teacher_cosine" is what
            alignment trains: the mean cosine over patches between the run's own projector and its own encoder, so it is
            there only for taps that have a projector. Beside it stands its floor, see `align.floors`: the cosine that is
            reached without the image, by the best constants of the training split (`images.limit` of it) for
            each position, where the label is fed for each class and position.
        protocol: which features. Direction "reverse" is the generating pass from fresh noise, compared with the other's
            features of the FINISHED sample (denoised); another run generates from the same noise. An encoder is given
            images without noise.
        neighbours: k of CKNNA and mutual k-NN.
        images: which, under "forward"; the n x n kernels want a thousand or some thousands.

    Returns: columns run, strategy, data, space, encoder, train_seed, tap, block, layer, module_path, metric, value, n, other,
        other_tap, direction, label_fed, guidance, n_noise_samples, noise_std, pool, neighbours, seed, device; with
        "teacher_cosine" also floor, above_floor (value - floor) and floor_of ("position" or "label and position"), nan and ""
        beside other metrics. The floor is nan too where the training split is not at hand.

    Raises: LabError for a tap or metric that does not exist, an empty set, constant features, more neighbours than
        images, or a run without an encoder to compare with.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.similarity(rl.load("digits-reverse"), taps="block.3.layer.2", images=rl.Images(limit=50))
        >>> table.metric.tolist()
        ['cknna', 'cka', 'mutual_knn', 'teacher_cosine']
    """
    how = FeatureProtocol() if protocol is None else protocol
    wanted = run.flow.resolve(taps)
    chosen = _metrics(run, other, wanted, metrics)
    if isinstance(other, Run):
        pairs = [_with_run(run, other, wanted, other_taps, taps, how, images)]
    else:
        pairs = _with_encoders(run, other, wanted, "teacher_cosine" in chosen, how, images)
    rows = [row for pair in pairs for row in _rows(run, pair, chosen, neighbours, how)]
    known = about(run)
    table = pd.DataFrame([known | row for row in rows])
    if "floor_of" in table:
        table["floor_of"] = table["floor_of"].fillna("")
    return table.assign(**how.columns(run))


def _rows(run: Run, pair: "_Pair", metrics: list[str], neighbours: int, how: FeatureProtocol) -> Iterable[dict[str, Any]]:
    """The rows of one other, by tap and metric."""
    for name, features in (
        pair.own.features | {f"{pair.other} {name}".strip(): value for name, value in pair.theirs.items()}
    ).items():
        check_spread(features, f"{name} over {len(features)} images")
    of = {"other": pair.other, "neighbours": neighbours, "n": len(pair.own.y)}
    for tap, partner in pair.taps:
        at = {**place(tap), "other_tap": partner}
        for name in metrics:
            if name in KERNEL_METRICS:
                value = KERNEL_METRICS[name](pair.own.features[tap.name], pair.theirs[partner], neighbours)
                yield at | {"metric": name, "value": value} | of
            elif tap.name in pair.cosines:
                value = pair.cosines[tap.name]
                floor = {"floor": pair.floor, "above_floor": value - pair.floor, "floor_of": _floor_of(run, how)}
                yield at | {"metric": name, "value": value} | of | floor


class _Pair(NamedTuple):
    """The features that are compared."""

    own: FeatureBatch
    theirs: dict[str, Tensor]  # the other's tap, "" for an encoder -> (n, e)
    taps: list[tuple[Tap, str]]  # own tap and the other's
    other: str  # its name
    cosines: Mapping[str, float] = MappingProxyType({})  # tap -> mean cosine of the projected feature with the teacher
    floor: float = math.nan  # of that


def _with_run(
    run: Run, other: Run, wanted: list[Tap], other_taps: Taps | None, taps: Taps, how: FeatureProtocol, images: Images
) -> _Pair:
    if other.space.picture_shape != run.space.picture_shape:
        raise LabError(f"{run.name} and {other.name} are flows of images of different sizes")
    partners = other.flow.resolve(taps if other_taps is None else other_taps)
    if other_taps is None and partners != wanted:
        raise LabError(f"{taps!r} stands for other taps in {other.name} than in {run.name}: say other_taps too")
    own = concatenate(how.batches(run, [tap.name for tap in wanted], images), keep_images=False)
    theirs = concatenate(how.batches(other, [tap.name for tap in partners], images), keep_images=False).features
    pairs = list(zip(wanted, partners, strict=True)) if other_taps is None else list(product(wanted, partners))
    return _Pair(own, theirs, [(tap, partner.name) for tap, partner in pairs], other.name)


def _metrics(run: Run, other: Run | Teacher | None, taps: list[Tap], metrics: Iterable[str] | None) -> list[str]:
    """The metrics of a call, checked; by default those that apply."""
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


def _floor_of(run: Run, how: FeatureProtocol) -> str:
    """What the best constants may depend on: the label only where the flow is fed it."""
    return LABEL_POSITION if how.feed_label and run.flow.config.classes else POSITION


class _OfEncoder:
    """What is collected of one encoder: its features, their cosines with the run's projected ones, and the floor of these.

    Args:
        projected: taps whose cosines are wanted; then the encoder is the run's own one of this number.
    """

    def __init__(self, run: Run, encoder: Teacher, number: int, projected: list[str], how: FeatureProtocol) -> None:
        self.run, self.encoder, self.how = run, encoder, how
        self.targets = Targets([encoder], run.flow.config.side, run.config.align)
        projectors = run.projectors.of_teacher(number) if projected else run.projectors
        self.aligner = Aligner(run.config.align, projectors, self.targets)
        self.cosines: dict[str, list[Tensor]] = {name: [] for name in projected}
        self.features, self.floors = list[Tensor](), list[Tensor]()
        self.means: TargetMeans | None = None

    def add(self, part: FeatureBatch) -> None:
        """Of a batch with the states of the projected taps."""
        patches = self.encoder(part.for_teacher.to(self.run.device))
        self.features.append(self.how.pooled(patches).cpu())
        target = self.targets.normalized(self.targets.each[0].on_grid(patches))
        for name, values in self.cosines.items():
            values.append(self.aligner.similarity(name, part.states[name], target).cpu())
        if self.means is not None:
            floor = self.means.floor(target, part.y)
            self.floors.append(floor.label_position if _floor_of(self.run, self.how) == LABEL_POSITION else floor.position)

    def pair(self, own: FeatureBatch, taps: list[Tap]) -> _Pair:
        """With the flow's features of the same images."""
        near = {name: float(torch.cat(values).mean()) for name, values in self.cosines.items()}
        what = encoder_words(self.run, self.encoder.config)
        floor = float(torch.cat(self.floors).mean()) if self.floors else math.nan
        return _Pair(own, {"": torch.cat(self.features)}, [(tap, "") for tap in taps], what, near, floor)


@torch.no_grad()
def _with_encoders(
    run: Run, other: Teacher | None, wanted: list[Tap], with_cosine: bool, how: FeatureProtocol, images: Images
) -> list[_Pair]:
    """The flow's features beside those of each encoder (n, E) of the same images, and the cosines by projector."""
    projected = [tap.name for tap in wanted if tap.name in run.projectors.taps and with_cosine]
    encoders = run.encoders() if other is None else [other.to(run.device)]
    each = [_OfEncoder(run, encoder, number, projected, how) for number, encoder in enumerate(encoders)]
    for one in each if projected else ():
        one.means = _training_means(run, one.targets, images.limit, how.batch)
    parts = list[FeatureBatch]()
    for part in how.batches(run, [tap.name for tap in wanted], images, originals=True):
        for one in each:
            one.add(part)
        parts.append(FeatureBatch(part.features, part.y, part.x[:0], {}))
    own = concatenate(parts)
    return [one.pair(own, wanted) for one in each]


def _training_means(run: Run, targets: Targets, limit: int | None, batch: int) -> TargetMeans | None:
    """Of the run's training split, where it is at hand."""
    try:
        images = image_set(run, Images("train", None, limit))
        images = run.teacher_images("train", images)
    except LabError:
        return None
    return teacher_means(run, targets, images, batch)
