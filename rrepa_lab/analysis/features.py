"""Features of many images, pooled and batch after batch, so that a set of any size can be read.

A `Reading` says what is fed and how it is pooled; its fields become the protocol columns of every table. It reads real
images on their way to the noise, or the generating pass with the samples that came of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rrepa_lab.analysis.noise import ReadNoise, read_noise
from rrepa_lab.analysis.trace import DIRECTIONS
from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.data.images import Batch, ImageSet, TensorImages
from rrepa_lab.data.loaders import stream
from rrepa_lab.data.subset import limited
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.inputs import as_images
from rrepa_lab.runs.run import Run
from rrepa_lab.sampling.denoise import finish
from rrepa_lab.sampling.sample import noise, seed_range

POOLS = ("mean", "all")


@dataclass
class Read:
    """A batch that was read, or all of them put together; on the CPU."""

    features: dict[str, Tensor]  # tap -> (B, d): the mean over tokens (d = D), or all tokens side by side (d = T * D)
    y: Tensor  # (B,) labels, -1 where there is none
    x: Tensor  # (B, C, H, W) the images, clean; finished samples if they were generated; none if they were let go
    states: dict[str, Tensor]  # tap -> (B, T, D), not pooled; not kept when batches are put together


@dataclass(frozen=True)
class Reading:
    """How features are read.

    direction: "forward" reads real images, "reverse" the generating pass from fresh noise. pool: "mean" over tokens, or
    "all" tokens side by side. noise_std, draws: of the noise on real images, features being averaged over the draws; None is
    as `analysis.noise.read_noise` has it. feed_label: tell the flow the class.
    guidance: of the generating pass. samples: how many are generated, with seeds from `seed` on and labels in turn.
    """

    direction: str = "forward"
    pool: str = "mean"
    noise_std: float | None = None
    feed_label: bool = False
    guidance: float = 0.0
    samples: int = 1000
    seed: int = 0
    batch: int = 256
    draws: int | None = None

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise unknown("direction", self.direction, DIRECTIONS)
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)
        whole_number("samples", self.samples, 1)
        whole_number("batch", self.batch, 1)
        real_number("guidance", self.guidance)
        seed_range(self.seed, self.samples)

    def columns(self, run: Run) -> dict[str, Any]:
        """Protocol columns of a table."""
        generated = self.direction == "reverse" and self.feed_label  # features of the generating pass itself
        read = ReadNoise(0, 0.0) if generated else self.noise(run)
        return {
            "direction": self.direction, "label_fed": "own" if self.feed_label else "none", "guidance": self.guidance,
            **read.columns, "pool": self.pool, "seed": self.seed, "device": str(run.device),
        }  # fmt: skip

    def noise(self, run: Run) -> ReadNoise:
        """The noise on real images."""
        return read_noise(run, self.draws, self.noise_std)

    def batches(
        self, run: Run, taps: Sequence[str], split: str = "test", data: ImageSet | Batch | None = None, limit: int | None = None
    ) -> Iterator[Read]:
        """Features in this direction: of the images that `image_set` gives, or of samples, for which no data set is needed.

        Without feed_label samples are generated unconditionally.
        """
        if self.direction == "forward":
            if self.guidance:
                raise LabError("guidance belongs to the generating pass: direction='reverse'")
            return self.real(run, taps, image_set(run, split, data, limit))
        if self.guidance and not self.feed_label:
            raise LabError("guidance needs a label that is fed: feed_label=True")
        if self.noise_std:
            raise LabError("noise_std belongs to real images: direction='forward'")
        return self.generated(run, taps, in_turn(run, self.samples) if self.feed_label else torch.full((self.samples,), -1))

    @torch.no_grad()
    def real(self, run: Run, taps: Sequence[str], images: ImageSet, order: Iterable[list[int]] | None = None) -> Iterator[Read]:
        """Features of images on their way to the noise; `order` gives the rows of each batch, by default all in order.

        The noise on an image depends on its row and the seed alone.
        """
        batches = [part.tolist() for part in torch.arange(len(images)).split(self.batch)] if order is None else list(order)
        read = self.noise(run)
        workers = 0 if isinstance(images, TensorImages) else run.config.train.worker_count
        for rows, (x, y) in zip(batches, stream(images, batches, workers), strict=True):
            label = y.to(run.device) if self.feed_label else None
            views = [as_images(run.flow, view) for view in _views(read, x, rows, self.seed)]
            taken = [run.flow(view, label, taps).states for view in views]
            states = {name: torch.stack([one[name] for one in taken]).mean(dim=0) for name in taken[0]}
            yield self._pooled(states if len(taken) > 1 else taken[0], y, x)

    @torch.no_grad()
    def generated(self, run: Run, taps: Sequence[str], labels: Tensor) -> Iterator[Read]:
        """Features of the generating pass from fresh noise, fed these labels (-1 for none), and the finished samples."""
        flow = run.flow
        for rows in torch.arange(len(labels)).split(self.batch):
            label = labels[rows].to(run.device) if flow.config.classes else None
            z = noise(flow, [self.seed + row for row in rows.tolist()]).to(next(flow.parameters()))
            made = flow.inverse(z, label, self.guidance, taps=taps)
            x = finish(run, made.x, label).images.clamp(-1, 1)
            yield self._pooled(made.states, labels[rows], x.cpu())

    def pooled(self, states: Tensor) -> Tensor:
        """(B, T, D) -> (B, d), float32 at least."""
        states = states if states.dtype == torch.float64 else states.float()
        return states.mean(dim=1) if self.pool == "mean" else states.flatten(1)

    def _pooled(self, states: dict[str, Tensor], y: Tensor, x: Tensor) -> Read:
        return Read({name: self.pooled(state).cpu() for name, state in states.items()}, y, x, states)


def _views(read: ReadNoise, x: Tensor, rows: Sequence[int], seed: int) -> Iterator[Tensor]:
    """A batch without noise, or under one draw after the other; the noise depends on seed, row and draw alone."""
    if not read.draws:
        yield read.clean(x)
    for number in range(read.draws):
        key = (number,) if number else ()
        yield torch.cat([read.draw(image[None], seed, row, *key) for image, row in zip(x, rows, strict=True)])


def together(reads: Iterable[Read], keep_images: bool = True) -> Read:
    """All batches as one; the states of each, and its images unless these are wanted, are let go as the next one comes."""
    parts = [Read(read.features, read.y, read.x if keep_images else read.x[:0], {}) for read in reads]
    features = {name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features}
    return Read(features, torch.cat([part.y for part in parts]), torch.cat([part.x for part in parts]), {})


def in_turn(run: Run, count: int) -> Tensor:
    """Labels 0..K-1 in turn, (count,); -1 for a flow without classes."""
    classes = run.flow.config.classes
    return torch.arange(count) % classes if classes else torch.full((count,), -1)


def image_set(run: Run, split: str, data: ImageSet | Batch | None = None, limit: int | None = None) -> ImageSet:
    """A split of the run's own data, or what was given instead; class-balanced, seed 0, where a `limit` is below its size.

    Raises: LabError if there are no images, or not as many labels.
    """
    images = run.images(split) if data is None else data
    if isinstance(images, Batch):
        if len(images.x) != len(images.y):
            raise LabError(f"{len(images.x)} images but {len(images.y)} labels")
        x = as_images(run.flow, images.x) if len(images.x) else images.x
        images = TensorImages(x.detach().cpu(), torch.as_tensor(images.y).cpu(), run.classes, 0)
    if not len(images) or (limit is not None and limit < 1):
        raise LabError("there are no images to read")
    return limited(images, limit)


def check_spread(features: Tensor, what: str) -> None:
    """LabError for features (n, d) that are the same for all images, rounding apart, or not finite."""
    if not features.isfinite().all():
        raise LabError(f"features of {what} are not finite")
    if (features - features[:1]).abs().max() <= 1e-5 * features.abs().max():
        raise LabError(f"features of {what} are constant: there is nothing to read")
