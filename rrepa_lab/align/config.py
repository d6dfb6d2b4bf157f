"""What is aligned, by which strategy, and how strongly."""

from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from rrepa_lab.align.strategy import STRATEGIES
from rrepa_lab.config import Config
from rrepa_lab.flow.taps import Depths, Tap, depths_of


class AlignConfig(Config):
    """What is aligned, how, and how strongly."""

    strategy: str = Field("none", description="none, forward, detach, reverse, reverse-exact, or one that was registered")
    blocks: list[int] = Field([], description="aligned blocks, from 1 at the image; -1 is the last")
    layers: list[int] | list[Annotated[list[int], Field(min_length=1)]] = Field(
        [2],
        min_length=1,
        description="aligned Transformer layers of those blocks, from 1; -1 is the last of its block; or a list of them for "
        "each of those blocks",
    )
    weight: float = Field(0.1, ge=0, description="lambda, against the loss per dimension")
    refinements: int = Field(0, ge=0, description="reverse: Jacobi steps from the pseudo-reverse towards the exact one")
    projector_width: int = Field(1024, ge=1, le=2**20, description="hidden width of the projectors")

    @field_validator("strategy")
    @classmethod
    def _registered(cls, name: str) -> str:
        return STRATEGIES.check(name)

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
    def place(self) -> str:
        """Where it aligns in words, "on blocks 3,4 at layer 2", "on block 1 at layer 8, block 3 at layer 2"."""
        if isinstance(self.layers[0], list):
            return "on " + ", ".join(f"block {block} at layer {_listed(layers)}" for block, layers in self.pairs)
        return f"on blocks {_listed(self.blocks)} at layer {_listed(self.layers)}"


def _listed(numbers: Iterable[Any]) -> str:
    return ",".join(map(str, numbers))


def _counted(numbers: list[int], most: int) -> list[int]:
    return list(dict.fromkeys(number if number > 0 else max(1, most + 1 + number) for number in numbers))
