"""What is aligned, by which strategy, and how strongly."""

from typing import Self

from pydantic import Field, field_validator

from rrepa_lab.align.strategy import STRATEGIES
from rrepa_lab.config import Config
from rrepa_lab.flow.taps import Tap


class AlignConfig(Config):
    """What is aligned, how, and how strongly."""

    strategy: str = Field("none", description="none, forward, detach, reverse, reverse-exact, or one that was registered")
    blocks: list[int] = Field([], description="aligned blocks, from 1 at the image; -1 is the last")
    layers: list[int] = Field(
        [2], min_length=1, description="aligned Transformer layers of those blocks, from 1; -1 is the last"
    )
    weight: float = Field(0.1, ge=0, description="lambda, against the loss per dimension")
    refinements: int = Field(0, ge=0, description="reverse: Jacobi steps from the pseudo-reverse towards the exact one")
    projector_width: int = Field(1024, ge=1, le=2**20, description="hidden width of the projectors")

    @field_validator("strategy")
    @classmethod
    def _registered(cls, name: str) -> str:
        return STRATEGIES.check(name)

    @property
    def taps(self) -> list[str]:
        """Addresses of the aligned states; none when the strategy is none."""
        if self.strategy == "none":
            return []
        return [Tap(block, layer).name for block in self.blocks for layer in self.layers]

    def counted(self, blocks: int, layers: int) -> Self:
        """With numbers from the end (-1 is the last) as numbers from 1, for a flow of so many blocks and layers.

        One that reaches beyond the first is the first.
        """
        found = {"blocks": _counted(self.blocks, blocks), "layers": _counted(self.layers, layers)}
        return self.model_copy(update=found)

    @property
    def place(self) -> str:
        """Where it aligns in words, "on blocks 3,4 at layer 2"."""
        blocks, layers = (",".join(map(str, part)) for part in (self.blocks, self.layers))
        return f"on blocks {blocks} at layer {layers}"


def _counted(numbers: list[int], most: int) -> list[int]:
    return list(dict.fromkeys(number if number > 0 else max(1, most + 1 + number) for number in numbers))
