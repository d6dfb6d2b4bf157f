"""The pictures of a split as the teacher sees them: the originals at `data.teacher_size`, before the flow's resize."""

from collections.abc import Sequence

from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.splits import load_split
from rrepa_lab.data.subset import Subset
from rrepa_lab.errors import LabError


def teacher_images(config: DataConfig, split: str, images: ImageSet, classes: Sequence[str] | None = None) -> ImageSet:
    """The same rows of a split at the teacher's size.

    Args:
        images: the split, or a subset of it, at the flow's size; they are the result where both sizes agree.

    Raises: LabError for a set that cannot be read at this size.
    """
    if config.teacher_size in (None, config.image_size):
        return images
    shown = load_split(config.model_copy(update={"image_size": config.teacher_size}), split, classes)
    whole = images.images if isinstance(images, Subset) else images
    if len(shown) != len(whole):
        raise LabError(f"data.teacher_size: {config.name} has {len(shown)} images at that size and {len(whole)} at the flow's")
    return Subset(shown, images.rows) if isinstance(images, Subset) else shown


def originals_of(config: DataConfig, split: str, images: ImageSet) -> ImageSet | None:
    """The same, or None where the teacher sees the flow's own pictures."""
    shown = teacher_images(config, split, images, images.classes)
    return None if shown is images else shown


def seen_words(config: DataConfig) -> str:
    """For protocols, what the teacher sees where that is not the flow's picture: ", sees originals of 224x224"."""
    if config.teacher_size in (None, config.image_size):
        return ""
    return f", sees originals of {config.teacher_size}x{config.teacher_size}"
