"""What the objective is given in a step: noised images, labels with some dropped, targets of the clean images."""

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rrepa_lab.align.floors import position_floor
from rrepa_lab.align.projector_kind import PROJECTORS
from rrepa_lab.align.target import Targets, TeacherTargets
from rrepa_lab.data.augment import drawn_mirrors, mirrored, shifted
from rrepa_lab.data.cache import has_room, is_complete
from rrepa_lab.data.images import Batch, ImageSet
from rrepa_lab.data.streams import RowStreams
from rrepa_lab.data.subset import balanced_rows
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.readers import MIB
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.space.contract import Space
from rrepa_lab.training.latents import LatentTable, latent_table, views, wants_table

# purposes of the random streams of a step, so that none shares its numbers with another
FLIP, NOISE, DROP, SHIFT, POSTERIOR, MASK = 2, 3, 4, 5, 6, 7
FLOOR_BATCH = 256  # images in one pass of the teacher for the floors of the similarity
FLOOR_IMAGES = 512  # that the floors are taken over where the teacher's features are not kept in memory
FEATURE_MEMORY = 256 * MIB  # features of all training views that are kept in memory, not on disk


class StepBatch(NamedTuple):
    """What the objective is given in a step."""

    x: Tensor  # (B, *shape), under the training noise
    y: Tensor | None  # (B,) labels, -1 where they are dropped
    target: Tensor | None  # (B, T, E) of the clean images
    mask: Tensor | None = None  # (B, T) bool, tokens that are hidden from the projectors


class StepInputs:
    """Makes the inputs of a step from a batch of the training split; its random numbers depend on seed, epoch and image.

    Args:
        space: of the run, which adds the noise.
        targets: of the alignment; None without one.
    """

    def __init__(self, config: RunConfig, space: Space, targets: Targets | None, device: torch.device) -> None:
        self.config, self.space, self.targets, self.device = config, space, targets, device
        self.latents: LatentTable | None = None

    def __call__(self, batch: Batch, rows: list[int], epoch: int, aligned: bool = True) -> StepBatch:
        """The inputs of a step.

        Args:
            rows: of the images in the training split.
            epoch: passes through the training split before this one.
            aligned: whether the step is aligned; else there is no target.
        """
        mirrors = drawn_mirrors(self._draws(FLIP, rows, epoch)) if self.config.data.flip else None
        clean = self._view(batch.x, mirrors, rows, epoch).to(self.device) if self.needs_pictures else batch.x
        if self.latents is None:
            encoded = self.space.encode(clean, self._draws(POSTERIOR, rows, epoch))
        else:
            encoded = self.latents(rows, mirrors).to(self.device)
        noised = self.space.add_noise(encoded, self._draws(NOISE, rows, epoch))
        labels = None
        if self.config.flow.classes:
            dropped = self._draws(DROP, rows, epoch).scalars()[:, 0] < self.config.train.label_drop
            labels = torch.where(dropped, -1, batch.y).to(self.device)
        if self.targets is None or not aligned:
            return StepBatch(noised, labels, None)
        own = self.targets.own is not None
        target = self.targets.of_encoded(encoded, noised) if own else self.targets(clean, rows, mirrors)
        return StepBatch(noised, labels, target, self._mask(rows, epoch))

    def _mask(self, rows: list[int], epoch: int) -> Tensor | None:
        """(B, T) bool, tokens that are hidden from the projectors; None for a kind without a mask."""
        align, tokens = self.config.align, self.config.flow.tokens
        if not PROJECTORS[align.projector].masks or not align.projector_mask:
            return None
        draws = self._draws(MASK, rows, epoch)
        return (draws.scalars(tokens) < align.projector_mask).to(self.device)

    @property
    def needs_pictures(self) -> bool:
        """Whether a step reads pictures: not where it has the latents and the targets of all images."""
        return self.latents is None or (self.targets is not None and self.targets.needs_pictures)

    def _view(self, x: Tensor, mirrors: Tensor | None, rows: list[int], epoch: int) -> Tensor:
        """The pictures (B, C, H, W) as this epoch shows them: mirrored, and shifted."""
        data, x = self.config.data, mirrored(x, mirrors)
        return shifted(x, data.shift, data.shift_probability, self._draws(SHIFT, rows, epoch)) if data.shift else x

    def _draws(self, purpose: int, rows: list[int], epoch: int) -> RowStreams:
        return RowStreams((self.config.train.seed, purpose, epoch), rows)

    def precompute(self, images: ImageSet, num_workers: int) -> dict[str, float]:
        """Keep the latents and the targets of all training images where that pays; returns the floors of the similarity.

        These are taken over all training images then, else over a class-balanced subset of them. Without targets there are
        none.
        """
        if wants_table(self.config, len(images)):
            self.latents = latent_table(self.config, self.space, images)
        targets = self.targets
        if targets is None or targets.own is not None:
            return {}
        shown = targets.shown(images)
        store = feature_store(self.config, targets.table_bytes(len(images), views(self.config)))
        for one in targets.each if store != "off" else ():
            self._keep(one, shown, num_workers, store)
        all_rows = targets.kept and not targets.on_disk
        chosen = torch.arange(len(images)) if all_rows else balanced_rows(images.labels, FLOOR_IMAGES)
        found = []
        for part in chosen.split(FLOOR_BATCH):  # of the images as they are
            rows = part.tolist()
            clean = torch.empty(0) if targets.kept else shown.__getitems__(rows).x
            found.append(targets(clean.to(self.device), rows))
        table, labels = torch.cat(found), images.labels[chosen] if self.config.flow.classes else None
        return position_floor(table, labels, dims=targets.dims) if len(table) > 1 else {}

    def _keep(self, teacher: TeacherTargets, images: ImageSet, num_workers: int, store: str) -> None:
        """Keep a teacher's features in memory or on disk, where it would run again or where they are there already.

        Args:
            images: the training images as the teachers see them.
        """
        number, again = views(self.config), features_come_again(self.config, len(images))
        if store == "memory":
            if again:
                teacher.keep(images, number, self.device, num_workers)
            return
        spec, forced = teacher.spec(images, number), self.config.train.feature_cache == "disk"
        if spec is None and forced:
            raise LabError(f"train.feature_cache is disk, but the teacher {teacher.model} has no fingerprint: set auto or off")
        if spec is None or not (again or is_complete(spec)):
            return
        if forced or has_room(spec):
            teacher.keep(images, number, self.device, num_workers, disk=True)
            return
        what = f"{teacher.model} runs in every step: its features take {spec.bytes / MIB:.0f} MiB"
        advice = "(--cache DIR or $RREPA_CACHE sets another folder)"
        warnings.warn(f"{what}, which {spec.folder.parent} has no room for {advice}", LabWarning, stacklevel=2)


def feature_store(config: RunConfig, size: float) -> Literal["off", "memory", "disk"]:
    """Where the features of the teachers are kept, by `train.feature_cache`.

    Args:
        size: bytes of all of them in memory, float32.
    """
    mode, data = config.train.feature_cache, config.data
    if data.shift and data.shift_probability:
        return "off"
    if mode == "auto":
        return "memory" if size <= FEATURE_MEMORY else "disk"
    return mode


def features_come_again(config: RunConfig, images: int) -> bool:
    """Whether the steps of a training take more views than so many images have."""
    return config.train.steps * config.train.batch > images * views(config)
