"""Targets of the alignment: the features of one or several teachers on the grid of the flow's tokens."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.projector_kind import PROJECTORS
from rrepa_lab.align.self_teacher import SelfTeacher
from rrepa_lab.align.table import FeatureTable, feature_spec, in_memory, on_disk
from rrepa_lab.align.teacher import Teacher
from rrepa_lab.data import augment
from rrepa_lab.data.cache import ArraySpec
from rrepa_lab.data.images import ImageSet
from rrepa_lab.errors import LabError


def match_grid(features: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Resample patch features (B, n, E) from the encoder's grid to the flow's (B, side * side, E).

    Averages where the encoder is finer, interpolates where it is coarser; the same tensor when the grids agree.
    """
    if grid == (side, side):
        return features
    maps = features.transpose(1, 2).unflatten(2, grid)
    if min(grid) >= side:
        maps = F.adaptive_avg_pool2d(maps, side)
    else:
        maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def grid_hint(teacher: Teacher, side: int) -> str:
    """What to set so that a teacher has one patch for each of the flow's side x side tokens; "" if it has at least one.

    A vision Transformer with patches of 16 pixels has a grid of 14x14 at 224 pixels. For 16x16 tokens its features are
    interpolated, while images of 256 pixels give 16x16 patches.
    """
    rows, columns = teacher.grid
    if min(rows, columns) >= side:
        return ""
    size = teacher.config.image_size * side // rows
    exact = teacher.config.image_size % rows == 0
    advice = f"; encoder.image_size={size} gives {side}x{side} patches, if the model takes that size" if exact else ""
    return f"the teacher has {rows}x{columns} patches for {side}x{side} tokens, and its features are interpolated{advice}"


def spatially_normalized(features: Tensor, gamma: float) -> Tensor:
    """Features (B, T, E) less gamma times their mean over the tokens of an image, over their standard deviation there.

    Source: the spatial normalization of iREPA (arXiv 2512.10794): what all patches of an image have in common is reduced, so
    that a cosine depends on how they differ.

    Example:
        >>> spatially_normalized(torch.tensor([[[1.0], [3.0], [5.0]]]), 1.0).flatten().round().tolist()
        [-1.0, 0.0, 1.0]
    """
    mean, std = features.mean(dim=1, keepdim=True), features.std(dim=1, keepdim=True)
    return (features - gamma * mean) / (std + 1e-6)


def check_grid(teacher: Teacher, side: int, align: AlignConfig | None = None) -> None:
    """LabError for a teacher whose features have no place: one patch along an edge for several of the flow's tokens.

    A projector that hides tokens needs a patch for each token: interpolated features could be read off a neighbour's.
    """
    rows, columns = teacher.grid
    if align is not None and PROJECTORS[align.projector].masks and min(rows, columns) < side:
        raise LabError(
            f"align.projector {align.projector!r} hides tokens, and the teacher {teacher.config.model} has {rows}x{columns} "
            f"patches for the flow's {side}x{side} tokens: interpolated features can be read from the tokens beside them; set "
            f"a larger encoder.image_size (now {teacher.config.image_size}), or another align.projector"
        )
    if side > 1 and min(rows, columns) == 1:
        raise LabError(
            f"the teacher {teacher.config.model} has {rows}x{columns} patches for the flow's {side}x{side} tokens: features of "
            f"one patch do not say where; set a larger encoder.image_size (now {teacher.config.image_size}), an earlier "
            "encoder.layer of a CNN, or a model of smaller patches"
        )


class TeacherTargets:
    """Maps clean images to the features of one teacher on the grid of a flow with `side` tokens along an edge.

    With a table (`keep`) they are taken from it by row and view, and the teacher itself is released.
    """

    def __init__(self, teacher: Teacher, side: int) -> None:
        self.teacher: Teacher | None = teacher
        self.side, self.dim, self.grid = side, teacher.dim, teacher.grid
        self.model = teacher.config.model
        self.fingerprint: str | None = getattr(teacher, "fingerprint", None)
        self.table: FeatureTable | None = None

    def spec(self, images: ImageSet, views: int) -> ArraySpec | None:
        """The table on disk of images as the teacher sees them; None for a teacher without a fingerprint."""
        if self.fingerprint is None:
            return None
        picture = images.__getitems__([0]).x.shape[1:]
        return feature_spec(images, views, min(self.side**2, prod(self.grid)), self.dim, self.fingerprint, picture)

    def keep(self, images: ImageSet, views: int, device: torch.device, num_workers: int = 0, disk: bool = False) -> None:
        """Compute the features of all views of a split as the teacher sees it, or open the table on disk that holds them.

        Raises: LabError as `align.table.on_disk`.
        """
        if disk:
            spec = self.spec(images, views)
            assert spec is not None
            self.table = FeatureTable(on_disk(images, spec, self._stored, device, num_workers), device, self._from_disk)
        else:
            values = in_memory(images, views, self.read, device, num_workers)
            self.table = FeatureTable(values, device, lambda features: features)
        self.teacher = None

    def read(self, clean: Tensor) -> Tensor:
        """Features (B, T, E) of clean images (B, C, H, W) in [-1, 1], by the teacher's pass."""
        assert self.teacher is not None
        return self.on_grid(self.teacher(clean))

    def on_grid(self, patches: Tensor) -> Tensor:
        """The teacher's features (B, n, E) on the flow's grid (B, T, E)."""
        return match_grid(patches, self.grid, self.side)

    @property
    def _averages(self) -> bool:
        """Whether the flow's grid has no more patches than the teacher's: then that is the one that is stored."""
        return self.side**2 <= prod(self.grid)

    def _stored(self, x: Tensor) -> Tensor:
        assert self.teacher is not None
        return self.on_grid(self.teacher(x)) if self._averages else self.teacher(x)

    def _from_disk(self, features: Tensor) -> Tensor:
        return features if self._averages else self.on_grid(features)


class Targets:
    """Maps clean images to the features (B, T, E) of the teachers on the grid of a flow with `side` tokens along an edge.

    The features of several teachers stand side by side, E = E1 + E2 + ...; each teacher keeps a table of its own.

    Args:
        align: how they are normalized; not at all by default. Tables hold them as the teachers give them.
        own: the flow as its own teacher, in place of `teachers`; its features come from x, not from pictures.
        encode: pictures (B, C, H, W) -> x (B, *shape), for `own`.
        originals: the training images as the teachers see them, where these are not the flow's own (`data.teacher_size`).
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        side: int,
        align: AlignConfig | None = None,
        *,
        originals: ImageSet | None = None,
        own: SelfTeacher | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.each = [TeacherTargets(teacher, side) for teacher in teachers]
        self.side, self.originals, self.own, self.encode = side, originals, own, encode
        self.gamma = align.target_gamma if align is not None and align.target == "spatial" else None

    @property
    def dims(self) -> tuple[int, ...]:
        """E of each teacher."""
        return tuple(one.dim for one in self.each) if self.own is None else (self.own.dim,)

    def of_encoded(self, encoded: Tensor, noised: Tensor | None = None) -> Tensor:
        """Features (B, T, D) of the self-teacher for x (B, *shape), and x under the training noise; see `SelfTeacher`."""
        assert self.own is not None
        return self.normalized(self.own(encoded, noised))

    def normalized(self, features: Tensor) -> Tensor:
        """Features of one teacher on the flow's grid (B, T, E) as the target that they are, by `align.target`."""
        return features if self.gamma is None else spatially_normalized(features, self.gamma)

    def table_bytes(self, images: int, views: int = 1) -> int:
        """Size of the tables in memory of so many images, float32."""
        return images * views * self.side**2 * sum(self.dims) * 4

    def shown(self, images: ImageSet) -> ImageSet:
        """The training images as the teachers see them."""
        return images if self.originals is None else self.originals

    def __call__(self, clean: Tensor, rows: Sequence[int] | None = None, mirrored: Tensor | None = None) -> Tensor:
        """Features (B, T, E) of clean images (B, C, H, W) in [-1, 1].

        Args:
            rows: their rows in the training split: features come from the tables that there are, and other teachers are
                given the originals if there are such. Where both hold, `clean` is not read.
            mirrored: (B,) bool, which of them are mirrored; `clean` holds them mirrored already.
        """
        if self.own is not None:
            assert self.encode is not None
            return self.of_encoded(self.encode(clean))
        if rows is not None and self.originals is not None and not self.kept:
            clean = augment.mirrored(self.originals.__getitems__(rows).x, mirrored).to(clean.device)
        parts = [one.read(clean) if rows is None or one.table is None else one.table(rows, mirrored) for one in self.each]
        parts = [self.normalized(part) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @property
    def kept(self) -> bool:
        """Whether there is a table of every teacher."""
        return self.own is None and all(one.table is not None for one in self.each)

    @property
    def on_disk(self) -> bool:
        """Whether a table lies on disk, so that reading all of it takes time."""
        return any(one.table is not None and not isinstance(one.table.values, Tensor) for one in self.each)

    @property
    def needs_pictures(self) -> bool:
        """Whether a training step gives them the flow's own pictures."""
        return self.own is None and not self.kept and self.originals is None
