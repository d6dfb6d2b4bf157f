"""Features of many images, pooled and batch after batch, so that a set of any size can be processed.

A `FeatureProtocol` says which pass they come from and how they are pooled; its fields become the protocol columns of every
table. They come from real images on their way to the noise, or from the generating pass with its samples.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rrepa_lab.analysis.noise import ImageNoise, NoiseSamples, image_noise
from rrepa_lab.analysis.trace import DIRECTIONS
from rrepa_lab.checks import whole_number
from rrepa_lab.data.decoded import prepare
from rrepa_lab.data.images import Batch, ImageSet, TensorImages
from rrepa_lab.data.loaders import stream
from rrepa_lab.data.subset import limited
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.condition import Guidance
from rrepa_lab.flow.decode.plan import Decoding
from rrepa_lab.runs.inputs import as_pictures, for_flow
from rrepa_lab.runs.run import Run
from rrepa_lab.sampling.denoise import finish
from rrepa_lab.sampling.sample import noise, seed_range

POOLS = ("mean", "all")


@dataclass
class FeatureBatch:
    """The features of a batch, or of all of them concatenated; on the CPU."""

    features: dict[str, Tensor]  # tap -> (B, d): the mean over tokens (d = D), or all tokens side by side (d = T * D)
    y: Tensor  # (B,) labels, -1 where there is none
    x: Tensor  # (B, C, H, W) the images, clean; finished samples if they were generated; none if they were not kept
    states: dict[str, Tensor]  # tap -> (B, T, D), not pooled; not kept when batches are concatenated
    original: Tensor | None = None  # (B, C, h, w) what the teacher sees, where that is not x; see `data.teacher_size`

    @property
    def for_teacher(self) -> Tensor:
        """What the teacher sees."""
        return self.x if self.original is None else self.original


class Images(NamedTuple):
    """Which images are measured: a split of the run's data, or others in its place.

    Args:
        split: train, val or test.
        data: images instead of it.
        limit: at most so many, class-balanced, seed 0.

    Example:
        >>> import rrepa_lab as rl
        >>> rl.embed(rl.load("digits-none"), "block.4.layer.2", images=rl.Images("train", limit=20)).shape[0]
        20
    """

    split: str = "test"
    data: ImageSet | Batch | None = None
    limit: int | None = None


@dataclass(frozen=True)
class FeatureProtocol:
    """Which features are measured.

    Args:
        direction: "forward", real images on their way to the noise, or "reverse", the generating pass from fresh noise.
        pool: "mean" over tokens, or "all" tokens side by side.
        noise: on real images, a number of samples or `NoiseSamples`; features are averaged over them. None is the run's own
            choice, `config.read`.
        feed_label: condition the flow on the class. The class vector that every block then adds makes features cluster by
            class, whatever the image.
        guidance: of the generating pass, on the class that is fed.
        samples: how many are generated, with seeds from `seed` on and labels 0..K-1 in turn.
        seed: of the noise and the samples.
        batch: images in one pass.

    Raises: LabError for an unknown direction or pool, and a number out of range.

    Example:
        >>> FeatureProtocol(direction="reverse", feed_label=True, guidance=1.0).direction
        'reverse'
    """

    direction: str = "forward"
    pool: str = "mean"
    noise: int | NoiseSamples | None = None
    feed_label: bool = False
    guidance: float = 0.0
    samples: int = 1000
    seed: int = 0
    batch: int = 256

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise unknown("direction", self.direction, DIRECTIONS)
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)
        whole_number("samples", self.samples, 1)
        whole_number("batch", self.batch, 1)
        Guidance.of(self.guidance)
        seed_range(self.seed, self.samples)
        NoiseSamples.of(self.noise, self.seed)

    def columns(self, run: Run) -> dict[str, Any]:
        """Protocol columns of a table."""
        generated = self.direction == "reverse" and self.feed_label  # features of the generating pass itself
        on_images = ImageNoise(0, 0.0) if generated else self.noise_on(run)
        return {
            "direction": self.direction, "label_fed": "own" if self.feed_label else "none", "guidance": self.guidance,
            **on_images.columns, "pool": self.pool, "seed": self.seed, "device": str(run.device),
        }  # fmt: skip

    def noise_on(self, run: Run) -> ImageNoise:
        """The noise on real images, with the seed of the protocol where it brings none."""
        return image_noise(run, NoiseSamples.of(self.noise, self.seed))

    def batches(
        self, run: Run, taps: Sequence[str], images: Images | None = None, originals: bool = False
    ) -> Iterator[FeatureBatch]:
        """Features in this direction: of images, or of samples, for which no data set is needed.

        Args:
            originals: also read what the teacher sees, where that is not the flow's picture.

        Without feed_label samples are generated unconditionally.
        """
        if self.direction == "forward":
            if self.guidance:
                raise LabError("guidance belongs to the generating pass: direction='reverse'")
            chosen = images or Images()
            found = image_set(run, chosen)
            return self.real(run, taps, found, originals=teacher_set(run, chosen, found) if originals else None)
        if self.guidance and not self.feed_label:
            raise LabError("guidance needs a label that is fed: feed_label=True")
        if isinstance(self.noise, NoiseSamples) and self.noise.std:
            raise LabError("noise_std belongs to real images: direction='forward'")
        labels = cycled_labels(run, self.samples) if self.feed_label else torch.full((self.samples,), -1)
        return self.generated(run, taps, labels)

    @torch.no_grad()
    def real(
        self,
        run: Run,
        taps: Sequence[str],
        images: ImageSet,
        order: Iterable[list[int]] | None = None,
        originals: ImageSet | None = None,
    ) -> Iterator[FeatureBatch]:
        """Features of images on their way to the noise; `order` gives the rows of each batch, by default all in order.

        The noise on an image depends on its row and the seed alone.

        Args:
            originals: the same rows as the teacher sees them.
        """
        batches = [part.tolist() for part in torch.arange(len(images)).split(self.batch)] if order is None else list(order)
        on_images = self.noise_on(run)
        if order is None:
            prepare(images)
        for rows, (x, y) in zip(batches, stream(images, batches, run.config.train.worker_count), strict=True):
            label = y.to(run.device) if self.feed_label else None
            views = [for_flow(run.flow, view) for view in on_images.views_of_rows(run.space.encode(x), rows)]
            taken = [run.flow(view, label, taps).states for view in views]
            states = {name: torch.stack([one[name] for one in taken]).mean(dim=0) for name in taken[0]}
            found = self._pooled(states if len(taken) > 1 else taken[0], y, x)
            if originals is not None and originals is not images:
                found.original = originals.__getitems__(rows).x
            yield found

    @torch.no_grad()
    def generated(self, run: Run, taps: Sequence[str], labels: Tensor) -> Iterator[FeatureBatch]:
        """Features of the generating pass from fresh noise, conditioned on these labels (-1 for none), and the samples."""
        flow, decoding = run.flow, Decoding(plan=run.plan)
        for rows in torch.arange(len(labels)).split(self.batch):
            label = labels[rows].to(run.device) if flow.config.classes else None
            z = noise(flow, [self.seed + row for row in rows.tolist()]).to(next(flow.parameters()))
            made = flow.inverse(z, label, self.guidance, method=decoding, taps=taps)
            x = finish(run, made.x, label).images.clamp(-1, 1)
            yield self._pooled(made.states, labels[rows], x.cpu())

    def pooled(self, states: Tensor) -> Tensor:
        """(B, T, D) -> (B, d), float32 at least."""
        states = states if states.dtype == torch.float64 else states.float()
        return states.mean(dim=1) if self.pool == "mean" else states.flatten(1)

    def _pooled(self, states: dict[str, Tensor], y: Tensor, x: Tensor) -> FeatureBatch:
        return FeatureBatch({name: self.pooled(state).cpu() for name, state in states.items()}, y, x, states)


def concatenate(batches: Iterable[FeatureBatch], keep_images: bool = True) -> FeatureBatch:
    """All batches as one; the states of each, and its images unless these are wanted, are dropped as the next one comes."""
    parts = [FeatureBatch(part.features, part.y, part.x if keep_images else part.x[:0], {}) for part in batches]
    features = {name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features}
    return FeatureBatch(features, torch.cat([part.y for part in parts]), torch.cat([part.x for part in parts]), {})


def cycled_labels(run: Run, count: int) -> Tensor:
    """Labels 0..K-1 in turn, (count,); -1 for a flow without classes."""
    classes = run.flow.config.classes
    return torch.arange(count) % classes if classes else torch.full((count,), -1)


def image_set(run: Run, images: Images) -> ImageSet:
    """The images of a measurement, as a set; a class-balanced part, seed 0, where a limit is below its size.

    Raises: LabError if there are no images, or not as many labels.
    """
    found = run.images(images.split) if images.data is None else images.data
    if isinstance(found, Batch):
        if len(found.x) != len(found.y):
            raise LabError(f"{len(found.x)} images but {len(found.y)} labels")
        x = as_pictures(run, found.x) if len(found.x) else found.x
        found = TensorImages(x.detach().cpu(), torch.as_tensor(found.y).cpu(), run.classes, 0)
    if not len(found) or (images.limit is not None and images.limit < 1):
        raise LabError("there are no images to measure")
    return limited(found, images.limit)


def teacher_set(run: Run, images: Images, found: ImageSet) -> ImageSet:
    """The images of a measurement as the teacher sees them; given images as they are."""
    return found if images.data is not None else run.teacher_images(images.split, found)


def check_spread(features: Tensor, what: str) -> None:
    """LabError for features (n, d) that are the same for all images, rounding apart, or not finite."""
    if not features.isfinite().all():
        raise LabError(f"features of {what} are not finite")
    if (features - features[:1]).abs().max() <= 1e-5 * features.abs().max():
        raise LabError(f"features of {what} are constant: there is nothing to measure")
