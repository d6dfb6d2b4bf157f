"""What is aligned, by which strategy, and how strongly."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from rrepa_lab.align.projector_kind import PROJECTORS
from rrepa_lab.align.schedule import FORMS, Schedule
from rrepa_lab.align.similarity import check_loss
from rrepa_lab.align.strategy import STRATEGIES
from rrepa_lab.config import Config
from rrepa_lab.flow.taps import Depths, Tap, depths_of


class AlignConfig(Config):
    """What is aligned, how, and how strongly."""

    strategy: str = Field(
        "none", description="none, forward, detach, reverse, reverse-exact, reverse-cached, or a registered one"
    )
    blocks: list[int] = Field([], description="aligned blocks, from 1 at the image; -1 is the last")
    layers: list[int] | list[Annotated[list[int], Field(min_length=1)]] = Field(
        [2],
        min_length=1,
        description="aligned Transformer layers of those blocks, from 1; -1 is the last of its block; or a list of them for "
        "each of those blocks",
    )
    weight: float = Field(0.1, ge=0, description="lambda, against the loss per dimension")
    schedule: str = Field("constant", description=f"factor of lambda by the step: {FORMS}")
    refinements: int = Field(0, ge=0, description="reverse: Jacobi steps from the pseudo-reverse towards the exact one")
    projector: str = Field("mlp", description="mlp, linear, conv3, masked, or a registered one")
    projector_width: int = Field(1024, ge=1, le=2**20, description="hidden width of the projectors")
    projector_mask: float = Field(0.2, ge=0, lt=1, description="masked: part of the tokens that is hidden in training")
    sharing: Literal["each", "shared"] = Field("each", description="a projector for each aligned tap, or one for all of them")
    target: Literal["plain", "spatial"] = Field(
        "plain", description="spatial: a z-score over the tokens of an image, less target_gamma of their mean"
    )
    target_gamma: float = Field(0.6, ge=0, le=1, description="spatial: the part of the mean over tokens that is taken away")
    teacher: Literal["encoder", "self", "random"] = Field(
        "encoder",
        description="the configured encoder, the flow's own averaged weights, or the encoder with random weights as a control",
    )
    self_tap: str = Field("", description="self: whose states are the target; empty: the last layer of the last aligned block")
    self_noise: float = Field(0.5, ge=0, le=1, description="self: the part of the training noise that the teacher sees")
    labels: Literal["given", "dropped"] = Field(
        "given", description="dropped: the aligned features are those of a pass without the label"
    )
    similarity: str = Field("cosine", description="cosine, or nt-xent with the other tokens of an image as negatives")

    @field_validator("strategy")
    @classmethod
    def _registered(cls, name: str) -> str:
        return STRATEGIES.check(name)

    @field_validator("projector")
    @classmethod
    def _known_projector(cls, name: str) -> str:
        return PROJECTORS.check(name)

    @field_validator("similarity")
    @classmethod
    def _known_similarity(cls, name: str) -> str:
        return check_loss(name)

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, text: str) -> str:
        Schedule.parse(text)
        return text

    @field_validator("layers", mode="wrap")
    @classmethod
    def _either(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            return read(value)
        except ValidationError:  # one message in place of one for each kind
            raise ValueError("must be a list of layer numbers, or such a list for each aligned block") from None

    @property
    def pairs(self) -> list[tuple[int, list[int]]]:
        """Aligned blocks, each with its layers, as they were given."""
        each = [layers if isinstance(layers, list) else [layers] for layers in self.layers]
        if isinstance(self.layers[0], list):
            return list(zip(self.blocks, each, strict=False))
        return [(block, [layer for (layer,) in each]) for block in self.blocks]

    @property
    def taps(self) -> list[str]:
        """Addresses of the aligned states; none when the strategy is none."""
        if self.strategy == "none":
            return []
        return [Tap(block, layer).name for block, layers in self.pairs for layer in layers]

    def counted(self, blocks: int, layers: Depths) -> Self:
        """With numbers from the end (-1 is the last) as numbers from 1, for a flow of so many blocks and layers.

        Layers are counted within their own block, so that blocks of several depths may get a list of layers each. A number
        that reaches beyond the first is the first.

        Example:
            >>> AlignConfig(strategy="reverse", blocks=[1, -1], layers=[-1]).counted(3, [8, 2, 2]).layers
            [[8], [2]]
        """
        depths, by_block = depths_of(blocks, layers), dict[int, list[int]]()
        for (number,), own in ((_counted([block], blocks), own) for block, own in self.pairs):
            depth = depths[min(number, blocks) - 1]  # where nothing is aligned, blocks may be beyond the last
            by_block[number] = list(dict.fromkeys([*by_block.get(number, []), *_counted(own, depth)]))
        each = list(by_block.values())
        alike = each and all(own == each[0] for own in each)
        return self.model_copy(update={"blocks": list(by_block), "layers": each[0] if alike else each}) if each else self

    @property
    def recipe(self) -> list[str]:
        """What differs from the paper's alignment, in words: "projector conv3", "target spatial (gamma 0.6)".

        Example:
            >>> AlignConfig(projector="conv3", labels="dropped").recipe
            ['projector conv3', 'labels dropped']
        """
        described = {
            "projector": f"projector {self.projector}"
            + (f" ({self.projector_mask:g} of the tokens hidden)" if self.projector == "masked" else ""),
            "sharing": "one projector for all taps",
            "target": f"target spatial (gamma {self.target_gamma:g})",
            "teacher": "teacher with random weights" if self.teacher == "random" else f"teacher {self.own_teacher}",
            "labels": "labels dropped",
            "similarity": f"similarity {self.similarity}",
            "schedule": f"lambda {self.schedule}",
            "refinements": f"{self.refinements} refinements",
        }
        plain = type(self)()
        return [words for name, words in described.items() if getattr(self, name) != getattr(plain, name)]

    @property
    def with_self(self) -> bool:
        """Whether the flow is aligned with its own averaged weights, so that no encoder is needed."""
        return self.strategy != "none" and self.teacher == "self"

    @property
    def own_teacher(self) -> str:
        """What a self-teacher is, in words."""
        where = self.self_tap or "the last layer of the last aligned block"
        return f"self (averaged weights at {where}, {self.self_noise:g} of the noise)"

    @property
    def place(self) -> str:
        """Where it aligns in words, "on blocks 3,4 at layer 2", "on block 1 at layer 8, block 3 at layer 2"."""
        if isinstance(self.layers[0], list):
            return "on " + ", ".join(f"block {block} at layer {_listed(layers)}" for block, layers in self.pairs)
        return f"on blocks {_listed(self.blocks)} at layer {_listed(self.layers)}"


def _listed(numbers: Iterable[Any]) -> str:
    return ",".join(map(str, numbers))


def _counted(numbers: list[int], most: int) -> list[int]:
    return list(dict.fromkeys(number if number > 0 else max(1, most + 1 + number) for number in numbers))
