"""TARFlow: a stack of autoregressive affine blocks in alternating token order.

Source: "Normalizing Flows are Capable Generative Models", arXiv 2412.06329.
Shapes: B images of C channels and H x W; T tokens of P numbers; D width; K classes;
blocks t = 1..N from the image to the noise.
"""

from typing import cast

import torch
from torch import Tensor, nn

from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import InverseOutput
from rrepa_lab.flow.decode.engine import decode
from rrepa_lab.flow.decode.plan import Decoding, Progress
from rrepa_lab.flow.finite import check_rows
from rrepa_lab.flow.stack import BlockFlow
from rrepa_lab.flow.taps import Taps
from rrepa_lab.flow.tarflow.block import AffineBlock
from rrepa_lab.flow.tarflow.config import FlowConfig


class TarFlow(BlockFlow):
    """An exact, invertible map between images and standard normal noise.

    Example:
        >>> flow = TarFlow(FlowConfig(classes=10))
        >>> out = flow(torch.zeros(2, 1, 8, 8), torch.tensor([3, -1]), taps="block.4.layer.2")
        >>> out.z.shape, out.states["block.4.layer.2"].shape
        (torch.Size([2, 16, 4]), torch.Size([2, 16, 64]))
        >>> flow.inverse(out.z, torch.tensor([3, -1])).x.shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        variance = torch.ones(config.tokens, config.token_size) if config.volume_preserving else None
        self.register_buffer("prior_var", variance)
        self.blocks = nn.ModuleList(
            AffineBlock(config, reversed_order=number % 2 == 0, layers=depth)
            for number, depth in enumerate(config.depths, start=1)
        )

    @property
    def config(self) -> FlowConfig:
        """Geometry, and the noise of the training."""
        return cast(FlowConfig, self._config)

    def block(self, number: int) -> AffineBlock:
        """The block with this number, from 1."""
        return cast(AffineBlock, self.blocks[number - 1])

    def inverse(
        self,
        z: Tensor,
        y: Tensor | Condition | None = None,
        guidance: float = 0.0,
        annealed: bool = False,
        temperature: float = 1.0,
        method: str | Decoding = "auto",
        taps: Taps = (),
        *,
        progress: Progress | None = None,
    ) -> InverseOutput:
        """Generate images from noise (B, T, P); `z` is not written to.

        Args:
            y: as in `forward`, and with the same meaning: -1 and None are the mean of the class table.
            guidance: classifier-free guidance weight w >= 0; 0 is none.
            annealed: let w grow linearly along the tokens of each block, from 0 to `guidance`.
            temperature: attention temperature of the unconditional branch; without guidance there is none.
            method: "sequential", "cached", "jacobi" or "auto", or all settings of the decoding: see `Decoding`. All methods
                give the same images; "sequential" alone is differentiable.
            taps: states to record. All tokens are recorded, of the conditional branch when guided.
            progress: called after each block, with a `BlockReport`.

        Raises: LabError for a wrong shape, label, tap or method, a guidance, temperature or tolerance out of range, noise
            that is not finite, a tolerance that cannot be met, an image that does not fit into memory; NotFiniteError,
            naming rows and block, where numbers overflow.
        """
        decoding = Decoding.of(method)
        self.check_noise(z)
        wanted = self.resolve(taps)
        check_rows(z, "noise")
        condition = self.condition(y, len(z), guidance, annealed, temperature)
        return decode(self, z, condition, wanted, decoding, progress)

    def configure_layers(self, checkpointing: bool = False, compile: bool = False) -> None:
        """Recompute the layers' activations in the backward pass, or compile the layers; parameters and names stay."""
        for number in range(1, self.config.blocks + 1):
            transformer = self.block(number).transformer
            transformer.checkpointing = checkpointing
            if compile:
                for layer in transformer.layers:
                    layer.compile()
