"""A flow as a stack of blocks: all that families of flows share."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.errors import LabError
from rrepa_lab.flow.condition import Condition, Guidance
from rrepa_lab.flow.contract import Block, FlowOutput, Geometry, InverseOutput, ParameterGroup
from rrepa_lab.flow.finite import check_rows
from rrepa_lab.flow.likelihood import prior_log_prob
from rrepa_lab.flow.patches import patchify, unpatchify
from rrepa_lab.flow.taps import Recorder, Tap, Taps, resolve


class BlockFlow(nn.Module):
    """An exact, invertible map between images and normal noise: patches are tokens, which blocks transform in turn.

    A subclass sets `blocks` and `prior_var`, and may decode faster than block by block.
    """

    prior_var: Tensor | None  # (T, P) variance of the noise, where it is not 1
    blocks: nn.ModuleList

    def __init__(self, config: Geometry) -> None:
        super().__init__()
        self._config = config

    @property
    def config(self) -> Geometry:
        """Sizes, and the noise of the training."""
        return self._config

    def forward(
        self,
        x: Tensor,
        y: Tensor | Condition | None = None,
        taps: Taps = (),
        guidance: float = 0.0,
        annealed: bool = False,
        temperature: float = 1.0,
    ) -> FlowOutput:
        """Encode images (B, C, H, W) to noise.

        Args:
            y: (B,) int class ids with -1 for a dropped label, (B, K) class weights, (B, N, K) class weights for each
                block, None for unconditional; or a `Condition`, which brings its guidance.
            taps: addresses of inner states to record, glob patterns allowed (see `flow.taps`).
            guidance, annealed, temperature: encode by the guided map, the exact inverse of `inverse` with the same values.

        Raises: LabError for a wrong image shape, a label out of range, or a tap that does not exist.
        """
        recorder = Recorder(self.resolve(taps))
        tokens = self.tokenize(x)
        condition = self.condition(y, len(x), guidance, annealed, temperature)
        z, logdet = self.encode_blocks(tokens, condition, range(1, self.config.blocks + 1), recorder)
        return FlowOutput(z, logdet, recorder.states)

    def log_prob(self, x: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """Exact log density of images (B, C, H, W) in [-1, 1] coordinates, (B,) nats; y as in `forward`."""
        out = self(x, y)
        return prior_log_prob(out.z, self.prior_var) + out.logdet

    def encode_blocks(
        self, tokens: Tensor, condition: Condition, numbers: Iterable[int], recorder: Recorder | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode tokens (B, T, P) by the blocks with these numbers alone; returns tokens and their logdet (B,) in nats."""
        recorder, logdet = recorder or Recorder([]), tokens.new_zeros(len(tokens))
        for number in numbers:
            block = self.block(number)
            recorder.tokens(number, "in", tokens)
            tokens, term, states = block(block.encode, tokens, condition.of_block(number), recorder.layers(number))
            logdet = logdet + term
            recorder.add(number, states)
            recorder.tokens(number, "out", tokens)
        return tokens, logdet

    def invert_blocks(
        self, z: Tensor, condition: Condition, taps: list[Tap], after: Callable[[int, Tensor], object] | None = None
    ) -> InverseOutput:
        """Generate from noise (B, T, P), block after block; differentiable.

        Args:
            after: called after each block with its number and the tokens on its image side.
        """
        recorder, tokens = Recorder(taps), z
        for number in range(self.config.blocks, 0, -1):
            block = self.block(number)
            recorder.tokens(number, "out", tokens)
            tokens, states = block(block.invert, tokens, condition.of_block(number), recorder.layers(number))
            if after is not None:
                after(number, tokens)
            recorder.add(number, states)
            recorder.tokens(number, "in", tokens)
        return InverseOutput(self.untokenize(tokens), recorder.states)

    def tokenize(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, T, P); LabError when the images do not fit this flow."""
        self.check_shape(x)
        if not x.is_floating_point():
            raise LabError(f"the flow itself takes floats in [-1, 1], not {x.dtype}: scale the images first")
        return patchify(x, self._patch_size)

    def untokenize(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, P), of any block, -> (B, C, H, W)."""
        return unpatchify(tokens, self._patch_size, self.config.image_shape[1])

    @property
    def _patch_size(self) -> int:
        return self.config.image_shape[1] // self.config.side

    def check_shape(self, x: Tensor) -> None:
        """LabError for anything but (B, C, H, W) of this flow's images."""
        if x.ndim != 4 or x.shape[1:] != self.config.image_shape:
            c, h, w = self.config.image_shape
            raise LabError(f"images must be (B, {c}, {h}, {w}) for this flow, not {tuple(x.shape)}")

    def check_noise(self, z: Tensor) -> None:
        """LabError for anything but (B, T, P) of this flow."""
        if z.ndim != 3 or z.shape[1:] != (self.config.tokens, self.config.token_size):
            raise LabError(f"noise must be (B, {self.config.tokens}, {self.config.token_size}), not {tuple(z.shape)}")

    def block(self, number: int) -> Block:
        """The block with this number, from 1."""
        return cast(Block, self.blocks[number - 1])

    def resolve(self, taps: Taps) -> list[Tap]:
        """The taps that names or glob patterns stand for in this flow."""
        return resolve(taps, self.config.blocks, self.config.layers)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The parameters in the flow's order: what enters a block, each of its layers, and what leaves it."""
        return [
            ParameterGroup(f"block.{number}.{part}", number, parameters)
            for number in range(1, self.config.blocks + 1)
            for part, parameters in self.block(number).parameter_groups().items()
        ]

    def condition(
        self,
        y: Tensor | Condition | None,
        batch: int,
        guidance: float | Guidance = 0.0,
        annealed: bool = False,
        temperature: float = 1.0,
    ) -> Condition:
        """Labels in any form, and guidance, as one value for a batch.

        Raises: LabError as `class_weights`, for guidance out of range, and for guidance beside a `Condition`.
        """
        rule = Guidance.of(guidance if isinstance(guidance, Guidance) else Guidance(guidance, annealed, temperature))
        if not isinstance(y, Condition):
            return Condition(self.class_weights(y, batch), rule)
        if rule != Guidance():
            raise LabError("a Condition brings its own guidance: leave guidance, annealed and temperature out")
        return Condition(self.class_weights(y.weights, batch), y.guidance)

    def class_weights(self, y: Tensor | None, batch: int) -> Tensor | None:
        """Labels in any form -> (B, K) weights of the class tables, or (B, N, K) if they differ from block to block.

        A dropped label (-1) and None weigh all classes alike: the unconditional embedding is the table's mean.
        None for a flow without classes.

        Raises: LabError for ids outside -1..K-1, weights of another shape, or labels for an unconditional flow.
        """
        classes, blocks = self.config.classes, self.config.blocks
        like = next(self.parameters())
        if classes == 0:
            if y is not None and (y.is_floating_point() or bool((y != -1).any())):
                raise LabError("this flow has no classes: leave the label out")
            return None
        uniform = torch.full((batch, classes), 1 / classes, dtype=like.dtype, device=like.device)
        if y is None:
            return uniform
        if y.is_floating_point():
            if y.shape not in ((batch, classes), (batch, blocks, classes)):
                raise LabError(
                    f"class weights must be ({batch}, {classes}), or ({batch}, {blocks}, {classes}) for each block, "
                    f"not {tuple(y.shape)}"
                )
            check_rows(y, "class weights")
            return y.to(uniform)
        if y.dtype == torch.bool:
            raise LabError("class ids must be integers, not bool")
        if y.shape != (batch,):
            raise LabError(f"class ids must be ({batch},), not {tuple(y.shape)}")
        y = y.to(like.device)
        outside = y[(y < -1) | (y >= classes)]
        if len(outside):
            raise LabError(f"label {int(outside[0])} is out of range: 0..{classes - 1}, or -1 for no label")
        return torch.where((y < 0)[:, None], uniform, F.one_hot(y.clamp(min=0).long(), classes).to(uniform))
