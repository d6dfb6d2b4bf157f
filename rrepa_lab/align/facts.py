"""What protocols, cards and descriptions say of a teacher: its weights, on what they were trained, their licence."""

from collections.abc import Sequence
from typing import NamedTuple

from rrepa_lab.align.named import PACKAGE, NamedTeacher, named_of, timm_name
from rrepa_lab.align.teacher import EncoderConfig


class TeacherFacts(NamedTuple):
    """What is known of the weights of a teacher; "" where nothing is."""

    trained: str  # on what
    licence: str


def teacher_facts(config: EncoderConfig) -> TeacherFacts:
    """On what a teacher was trained, and its licence.

    Of a local file nothing is known, and random weights were not trained.

    Example:
        >>> teacher_facts(EncoderConfig(model="efficientnet-lite0")).trained
        'ImageNet with its labels'
    """
    if config.weights == "pretrained" or config.weights.startswith(PACKAGE):
        known = named_of(config.model)
        return _of_timm(config.model) if known is None else _of_named(known)
    if config.weights.startswith("bundled:"):
        return TeacherFacts(f"{config.weights.removeprefix('bundled:')} without labels", "")
    return TeacherFacts("", "")


def teacher_words(config: EncoderConfig) -> str:
    """A teacher in a protocol: model, weights, layer where it is not the last, and whether it was trained with labels.

    Example:
        >>> teacher_words(EncoderConfig(model="efficientnet-lite0"))
        'efficientnet-lite0, package:efficientnet-lite0, trained on ImageNet with its labels'
    """
    parts = [config.model, config.weights, *([f"layer {config.layer}"] if config.layer != -1 else [])]
    if not config.weights.startswith("bundled:") and (trained := teacher_facts(config).trained):
        parts.append(f"trained on {trained}")
    return ", ".join(parts)


def all_words(teachers: Sequence[EncoderConfig]) -> str:
    """Several teachers in a protocol."""
    return " + ".join(map(teacher_words, teachers))


def _of_named(known: NamedTeacher) -> TeacherFacts:
    return TeacherFacts(known.trained, known.licence)


def _of_timm(model: str) -> TeacherFacts:
    """From timm's settings of the weights; labels show by a classifier of a thousand classes or more."""
    import timm

    settings = timm.get_pretrained_cfg(timm_name(model)) if timm.is_model(timm_name(model)) else None
    if settings is None:
        return TeacherFacts("", "")
    tag = settings.tag or ""
    texts = any(word in f"{model} {tag}" for word in ("clip", "siglip", "openai", "laion"))
    known = {1000: "ImageNet with its labels", 21841: "ImageNet-22k with its labels", 21843: "ImageNet-21k with its labels",
             11821: "ImageNet-12k with its labels", 11221: "ImageNet-21k-P with its labels"}  # fmt: skip
    trained = known.get(settings.num_classes, "")
    if not trained and tag:
        trained = f"{tag} ({'pictures with texts' if texts else 'no ImageNet classifier'})"
    return TeacherFacts(trained, settings.license or "not stated by timm")
