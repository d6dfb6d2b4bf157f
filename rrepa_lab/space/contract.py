"""What a flow models: the stage between pictures and the numbers that the flow transforms.

A kind of space is one file below `space/kinds/` (or anywhere else) that registers an object with the methods of
`space.config.SpaceKind`. Every instrument takes pictures and a run: `runs.inputs` encodes them, and
`sampling.denoise.finish` decodes what was generated.
"""

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from rrepa_lab.data.streams import Draws

Shape = tuple[int, int, int]  # (C, H, W)


@dataclass(frozen=True)
class Frame:
    """What a space lies between: pictures on one side, a flow with its noise on the other.

    Args:
        picture: (C, H, W) of a picture.
        x: (C, H, W) that the flow takes.
        levels: integer values that a number of a picture can take: 256 for 8-bit pictures, 17 for digits.
        noise: of the training, "gaussian" or "uniform".
        noise_std: sigma of gaussian noise, in the unit of x.
    """

    picture: Shape
    x: Shape
    levels: int
    noise: str
    noise_std: float


class Space(Protocol):
    """An invertible or lossy map between pictures and the flow's input, with the noise of the training.

    Pictures are (B, C, H, W) in [-1, 1]; x is (B, *shape). Encoding and decoding record no gradients, keep the dtype, and
    give tensors on the device of the space; for pixels on that of the argument.
    """

    @property
    def name(self) -> str:
        """pixels, vae, small-vae, features."""
        ...

    @property
    def unit(self) -> str:
        """The unit of x and of the noise, for protocols: "pixels in [-1, 1]"."""
        ...

    @property
    def shape(self) -> Shape:
        """(C, H, W) of x."""
        ...

    @property
    def picture_shape(self) -> Shape:
        """(C, H, W) of a picture."""
        ...

    @property
    def statistics(self) -> dict[str, Any]:
        """All that x depends on beside the picture, as plain JSON values; kept with a run, and compared when it is loaded."""
        ...

    @property
    def quality(self) -> dict[str, Any]:
        """How near decoded pictures are to those encoded, as it was measured with the space; empty where it was not."""
        ...

    def encode(self, pictures: Tensor, draws: Draws = None) -> Tensor:
        """Pictures -> x, without noise; with `draws` a sample of x where the space has a distribution of them."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """x -> pictures."""
        ...

    def show(self, x: Tensor) -> Tensor:
        """x of any stage of the generation -> pictures to look at, not clipped; see `stage_words`."""
        ...

    @property
    def stage_words(self) -> str:
        """What the pictures of `show` are: "" for x itself, or "decoded from the latents of this stage"."""
        ...

    def add_noise(self, x: Tensor, draws: Draws = None) -> Tensor:
        """x -> x under the noise that the flow is trained under; the noise is drawn on the CPU."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move it; returns itself."""
        ...
