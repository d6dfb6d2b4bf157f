"""Geometry of a TARFlow, and the noise it was trained with."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator

from rrepa_lab.config import Config
from rrepa_lab.flow.taps import depths_of

MOST_LAYERS = 2**12  # in all blocks
MOST_LAYERS_OF_BLOCK = 2**10

Depth = Annotated[int, Field(ge=1, le=MOST_LAYERS_OF_BLOCK)]


class FlowConfig(Config):
    """Geometry of a flow and the noise it was trained with.

    Example:
        >>> config = FlowConfig(image_size=64, channels=3, patch_size=4, width=1024, blocks=8, layers=8, classes=1000)
        >>> config.tokens, config.token_size, config.dims
        (256, 48, 12288)
        >>> FlowConfig(blocks=3, layers=[8, 2, 2]).layers_of(1)  # deep-shallow, as in STARFlow (arXiv 2506.06276)
        8
    """

    image_size: int = Field(8, ge=1, le=2**14, description="height and width of an image")
    channels: int = Field(1, ge=1, le=2**12, description="channels of an image")
    patch_size: int = Field(2, ge=1, le=2**14, description="height and width of a patch; one patch is one token")
    width: int = Field(64, ge=1, le=2**16, description="D, numbers in a hidden state")
    blocks: int = Field(4, ge=1, le=2**10, description="N, affine blocks")
    layers: Depth | list[Depth] = Field(
        4, description="Transformer layers in a block; or a list, one number for each block, block 1 (at the image) first"
    )
    head_width: int = Field(64, ge=4, description="numbers in an attention head")
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_ratio: float = Field(4.0, gt=0, le=1024)
    positions: Literal["learned", "rotary"] = "learned"
    classes: int = Field(0, ge=-1, description="K; 0 for an unconditional flow, -1 for as many as the data have")
    volume_preserving: bool = Field(False, description="shift only, alpha is 0; the variance of the prior takes its place")
    noise: Literal["gaussian", "uniform"] = "gaussian"
    noise_std: float = Field(0.1, ge=0, description="sigma of the gaussian noise, pixels in [-1, 1]; unused when uniform")

    @field_validator("layers", mode="wrap")
    @classmethod
    def _depth(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            return read(value)
        except ValidationError:  # one message in place of one for each kind
            raise ValueError(f"must be 1 to {MOST_LAYERS_OF_BLOCK}, or a list of such numbers, one for each block") from None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.layers, list) and len(self.layers) != self.blocks:
            raise ValueError(f"layers has {len(self.layers)} entries, but there are {self.blocks} blocks: one for each block")
        if sum(self.depths) > MOST_LAYERS:
            raise ValueError(f"{self.size} are {sum(self.depths)} layers, more than {MOST_LAYERS}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.image_size == self.patch_size:
            raise ValueError("one patch covers the whole image: a flow needs at least two tokens")
        if self.width % self.head_width:
            raise ValueError(f"head_width {self.head_width} does not divide width {self.width}")
        if self.positions == "rotary" and self.head_width % 4:
            raise ValueError(f"rotary positions need a head_width divisible by 4, not {self.head_width}")
        return self

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer layers of each block, block 1 first."""
        return depths_of(self.blocks, self.layers)

    def layers_of(self, block: int) -> int:
        """Transformer layers of the block with this number, from 1."""
        return self.depths[block - 1]

    @property
    def size(self) -> str:
        """Blocks and layers in words, "4 blocks x 4 layers", "3 blocks x 8,2,2 layers"."""
        layers = self.layers if isinstance(self.layers, int) else ",".join(map(str, self.layers))
        return f"{self.blocks} blocks x {layers} layers"

    @property
    def side(self) -> int:
        """Tokens along one edge of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """T."""
        return self.side**2

    @property
    def token_size(self) -> int:
        """P."""
        return self.channels * self.patch_size**2

    @property
    def dims(self) -> int:
        """T * P = C * H * W."""
        return self.tokens * self.token_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.image_size, self.image_size
