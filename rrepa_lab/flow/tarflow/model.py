"""TARFlow: a stack of autoregressive affine blocks in alternating token order.

Source: "Normalizing Flows are Capable Generative Models", arXiv 2412.06329.
Shapes: B images of C channels and H x W; T tokens of P numbers; D width; K classes;
blocks t = 1..N from the image to the noise.
"""

from collections.abc import Iterable
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.condition import Guidance
from rrepa_lab.flow.contract import FlowOutput, InverseOutput
from rrepa_lab.flow.decode.engine import (
    INNER,
    METHODS,
    POLISH,
    BlockReport,
    Progress,
    ToleranceError,
    automatic,
    decode_block,
    default_tolerance,
    keep_states,
    residual,
    windows_of,
)
from rrepa_lab.flow.decode.plan import DecodePlan
from rrepa_lab.flow.finite import NotFiniteError, cause, check_rows, listed, rows_not_finite
from rrepa_lab.flow.likelihood import prior_log_prob
from rrepa_lab.flow.memory import fitting
from rrepa_lab.flow.patches import patchify, unpatchify
from rrepa_lab.flow.taps import Tap, Taps, resolve
from rrepa_lab.flow.tarflow.block import AffineBlock
from rrepa_lab.flow.tarflow.config import FlowConfig

PRECISIONS = ("float32", "bfloat16")


class TarFlow(nn.Module):
    """An exact, invertible map between images and standard normal noise.

    Example:
        >>> flow = TarFlow(FlowConfig(classes=10))
        >>> out = flow(torch.zeros(2, 1, 8, 8), torch.tensor([3, -1]), taps="block.4.layer.2")
        >>> out.z.shape, out.states["block.4.layer.2"].shape
        (torch.Size([2, 16, 4]), torch.Size([2, 16, 64]))
    """

    prior_var: Tensor | None  # (T, P) variance of the noise, where it is not 1

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        variance = torch.ones(config.tokens, config.token_size) if config.volume_preserving else None
        self.register_buffer("prior_var", variance)
        self.plan: DecodePlan | None = None  # how "auto" and "jacobi" decode it, see `sampling.calibrate`
        self.blocks = nn.ModuleList(
            AffineBlock(
                side=config.side,
                token_size=config.token_size,
                width=config.width,
                layers=config.layers,
                classes=config.classes,
                head_width=config.head_width,
                mlp_ratio=config.mlp_ratio,
                mlp=config.mlp,
                positions=config.positions,
                volume_preserving=config.volume_preserving,
                reversed_order=number % 2 == 0,
            )
            for number in range(1, config.blocks + 1)
        )

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        taps: Taps = (),
        guidance: float = 0.0,
        annealed: bool = False,
        temperature: float = 1.0,
    ) -> FlowOutput:
        """Encode images (B, C, H, W) to noise.

        Args:
            y: (B,) int class ids with -1 for a dropped label, (B, K) class weights, (B, N, K) class weights for each
                block, or None for unconditional.
            taps: addresses of inner states to record, glob patterns allowed (see `flow.taps`).
            guidance, annealed, temperature: encode by the guided map, the exact inverse of `inverse` with the same values.

        Raises: LabError for a wrong image shape, a label out of range, or a tap that does not exist.
        """
        wanted = self.resolve(taps)
        tokens = self.tokenize(x)
        label, rule = self.condition(y, len(x), guidance, annealed, temperature)
        logdet = tokens.new_zeros(len(x))
        states: dict[str, Tensor] = {}
        for number, block in enumerate(self.blocks, start=1):
            _record(states, wanted, number, "in", tokens)
            tokens, term, layers = block(tokens, label_of_block(label, number), _layers(wanted, number), rule)
            logdet = logdet + term
            states |= {Tap(number, layer).name: state for layer, state in layers.items()}
            _record(states, wanted, number, "out", tokens)
        return FlowOutput(tokens, logdet, states)

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Exact log density of images (B, C, H, W) in [-1, 1] coordinates, (B,) nats; y as in `forward`."""
        out = self(x, y)
        return prior_log_prob(out.z, self.prior_var) + out.logdet

    def through(self, tokens: Tensor, label: Tensor | None, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Encode tokens (B, T, P) by the blocks with these numbers alone; returns tokens and their logdet (B,) in nats.

        Args:
            label: class weights as `label_weights` gives them.
        """
        logdet = tokens.new_zeros(len(tokens))
        for number in numbers:
            tokens, term, _ = self.block(number)(tokens, label_of_block(label, number))
            logdet = logdet + term
        return tokens, logdet

    def inverse(
        self,
        z: Tensor,
        y: Tensor | None = None,
        guidance: float = 0.0,
        annealed: bool = False,
        temperature: float = 1.0,
        method: str = "auto",
        taps: Taps = (),
        *,
        tolerance: float | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        batch: int | None = None,
        progress: Progress | None = None,
    ) -> InverseOutput:
        """Generate images from noise (B, T, P); `z` is not written to.

        Args:
            y: as in `forward`, and with the same meaning: -1 and None are the mean of the class table.
            guidance: classifier-free guidance weight w >= 0; 0 is none.
            annealed: let w grow linearly along the tokens of each block, from 0 to `guidance`.
            temperature: attention temperature of the unconditional branch; without guidance there is none.
            method: all give the same images. "sequential" is the plain token loop, the only one that is differentiable;
                "cached" the same with memory and branches managed; "jacobi" reads windows of tokens until they stand still;
                "auto" is sequential where a gradient is wanted, else the faster of the two others (see `calibrate`).
            taps: states to record. All tokens are recorded, of the conditional branch when guided.
            tolerance: of jacobi, the largest `error` that is let pass; 1e-5, in float64 1e-10, if left out.
            precision: of the matrix products of cached and jacobi; with bfloat16 the answer's `error` is measured and told.
            batch: images decoded at once; as many as fit into the free memory if left out.
            progress: told after each block, see `decoding.BlockReport`.

        Raises: LabError for a wrong shape, label, tap or method, a guidance, temperature or tolerance out of range, noise
            that is not finite, a tolerance that cannot be met, an image that does not fit into memory; NotFiniteError,
            naming rows and block, where numbers overflow on the way.
        """
        if method not in METHODS:
            raise unknown("decoding method", method, METHODS)
        self.check_noise(z)
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        if batch is not None:
            batch = whole_number("batch", batch, 1)
        if tolerance is not None:
            tolerance = real_number("tolerance", tolerance, above=True)
        wanted = self.resolve(taps)
        check_rows(z, "noise")
        label, rule = self.condition(y, len(z), guidance, annealed, temperature)
        chosen = self._choose(method, z, label, rule)
        size = batch or fitting(image_bytes(self.config, rule.branches, z.element_size()), z.device, "decoding one image")
        parts = []
        for start in range(0, max(len(z), 1), size):
            rows = slice(start, start + size)
            one = z[rows]
            seen = None if label is None else torch.cat([half[rows] for half in label.chunk(rule.branches)])
            goal = default_tolerance(z.dtype) if tolerance is None else tolerance
            try:
                if chosen == "sequential":
                    parts.append(self._sequential(one, seen, rule, wanted, progress))
                    continue
                fast = partial(self._fast, one, seen, rule, wanted, tolerance=goal, precision=precision, progress=progress)
                try:
                    parts.append(fast(method=chosen))
                except ToleranceError:
                    if method != "auto":
                        raise
                    parts.append(fast(method="cached"))
            except NotFiniteError as error:
                raise self._overflow([start + row for row in error.rows], error.block, len(z), rule) from None
        return _joined(parts)

    def _overflow(self, rows: list[int], block: int | None, count: int, rule: Guidance) -> NotFiniteError:
        """The error for rows of a batch that stopped being finite while a block was decoded."""
        what = f"numbers stop being finite in block {block} while generating, in row {listed(rows)} of {count}"
        return NotFiniteError(f"{what}: {cause(self, rule.scale, rule.temperature)}", rows, block)

    def _choose(self, method: str, z: Tensor, label: Tensor | None, rule: Guidance) -> str:
        """The method that "auto" stands for."""
        if method != "auto":
            return method
        inputs = [z, *([] if label is None else [label]), *self.parameters()]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return "sequential"
        return automatic(self.plan, z.device.type, rule.branches * len(z))

    def _sequential(
        self, z: Tensor, label: Tensor | None, rule: Guidance, wanted: list[Tap], progress: Progress | None
    ) -> InverseOutput:
        tokens, states = z, dict[str, Tensor]()
        count, reads = self.config.blocks, rule.branches * (self.config.tokens - 1)
        for number in range(count, 0, -1):
            _record(states, wanted, number, "out", tokens)
            tokens, layers = self.block(number).sequential(tokens, label_of_block(label, number), rule, _layers(wanted, number))
            _check_block(tokens, number)
            states |= {Tap(number, layer).name: state for layer, state in layers.items()}
            _record(states, wanted, number, "in", tokens)
            if progress:
                progress(BlockReport(number, count, len(z), reads, "sequential"))
        return InverseOutput(self.images(tokens), {tap.name: states[tap.name] for tap in wanted}, sweeps=(reads,) * count)

    @torch.no_grad()
    def _fast(
        self,
        z: Tensor,
        label: Tensor | None,
        rule: Guidance,
        wanted: list[Tap],
        method: str,
        tolerance: float,
        precision: str,
        progress: Progress | None,
    ) -> InverseOutput:
        count = self.config.blocks
        windows = [1] * count if method == "cached" else windows_of(self.plan, count, self.config.tokens)
        labels = [label_of_block(label, number) for number in range(1, count + 1)]
        blocks = [self.block(number) for number in range(1, count + 1)]
        made: dict[int, Tensor] = {count + 1: z}
        sweeps: dict[int, int] = {}
        for number in range(count, 0, -1):
            with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                made[number], sweeps[number] = decode_block(
                    blocks[number - 1], made[number + 1], labels[number - 1], rule, windows[number - 1], INNER * tolerance
                )
                if windows[number - 1] > 1 and not bool(made[number].isfinite().all()):
                    # a guess that overflows spoils what is read beside it: token by token there are no guesses
                    made[number], more = decode_block(blocks[number - 1], made[number + 1], labels[number - 1], rule)
                    sweeps[number] += more
            _check_block(made[number], number)
            if progress:
                progress(BlockReport(number, count, len(z), sweeps[number], method))
        error = None
        if method == "jacobi" or precision == "bfloat16":
            held = method == "jacobi" and precision == "float32"  # to the tolerance
            check = residual(blocks, z, made, labels, rule)
            for _ in range(POLISH if held else 0):
                if check.error <= tolerance:
                    break
                made |= check.tokens
                check = residual(blocks, z, made, labels, rule)
            error = check.error
            if held and error > tolerance:
                raise ToleranceError(
                    f"jacobi cannot meet the tolerance {tolerance:g} here: sweeps still move numbers by {error:.2g} in "
                    f"{str(z.dtype).removeprefix('torch.')}; choose a larger one, or method 'cached'"
                )
        states: dict[str, Tensor] = {}
        for number in range(count, 0, -1):
            _record(states, wanted, number, "out", made[number + 1])
            layers = keep_states(blocks[number - 1], made[number], labels[number - 1], rule, _layers(wanted, number))
            states |= {Tap(number, layer).name: state for layer, state in layers.items()}
            _record(states, wanted, number, "in", made[number])
        kept = {tap.name: states[tap.name] for tap in wanted}
        reads = tuple(sweeps[number] for number in range(1, count + 1))
        return InverseOutput(self.images(made[1]), kept, method, reads, error)

    def tokenize(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, T, P); LabError when the images do not fit this flow."""
        self.check_shape(x)
        if not x.is_floating_point():
            raise LabError(f"the flow itself reads floats in [-1, 1], not {x.dtype}: scale the images first")
        return patchify(x, self.config.patch_size)

    def check_shape(self, x: Tensor) -> None:
        """LabError for anything but (B, C, H, W) of this flow's images."""
        if x.ndim != 4 or x.shape[1:] != self.config.image_shape:
            c, h, w = self.config.image_shape
            raise LabError(f"images must be (B, {c}, {h}, {w}) for this flow, not {tuple(x.shape)}")

    def check_noise(self, z: Tensor) -> None:
        """LabError for anything but (B, T, P) of this flow."""
        if z.ndim != 3 or z.shape[1:] != (self.config.tokens, self.config.token_size):
            raise LabError(f"noise must be (B, {self.config.tokens}, {self.config.token_size}), not {tuple(z.shape)}")

    def images(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, P), of any block, -> (B, C, H, W)."""
        return unpatchify(tokens, self.config.patch_size, self.config.image_size)

    def block(self, number: int) -> AffineBlock:
        """The block with this number, from 1."""
        return cast(AffineBlock, self.blocks[number - 1])

    def resolve(self, taps: Taps) -> list[Tap]:
        """The taps that names or glob patterns stand for in this flow."""
        return resolve(taps, self.config.blocks, self.config.layers)

    def label_weights(self, y: Tensor | None, batch: int) -> Tensor | None:
        """Labels in any form -> (B, K) weights of the class tables, or (B, N, K) if they differ from block to block.

        A dropped label (-1) and None weigh all classes alike: the unconditional embedding is the table's mean.
        None for a flow without classes.

        Raises: LabError for ids outside -1..K-1, weights of another shape, or labels for an unconditional flow.
        """
        classes = self.config.classes
        like = next(self.parameters())
        if classes == 0:
            if y is not None and (y.is_floating_point() or bool((y != -1).any())):
                raise LabError("this flow has no classes: leave the label out")
            return None
        uniform = torch.full((batch, classes), 1 / classes, dtype=like.dtype, device=like.device)
        if y is None:
            return uniform
        if y.is_floating_point():
            blocks = self.config.blocks
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

    def condition(
        self, y: Tensor | None, batch: int, guidance: float, annealed: bool = False, temperature: float = 1.0
    ) -> tuple[Tensor | None, Guidance]:
        """Class weights of all branches, the conditional ones first, and the rule that mixes the branches."""
        guidance = real_number("guidance", guidance)
        temperature = real_number("temperature", temperature, above=True)
        label = self.label_weights(y, batch)
        if guidance and label is not None:
            label = torch.cat([label, torch.full_like(label, 1 / self.config.classes)])
        return label, Guidance(guidance, annealed, temperature)


def label_of_block(label: Tensor | None, number: int) -> Tensor | None:
    """The (B, K) class weights that the block with this number sees, of what `TarFlow.label_weights` gives."""
    return label if label is None or label.ndim == 2 else label[:, number - 1]


def _joined(parts: list[InverseOutput]) -> InverseOutput:
    """The parts of a batch as one answer: errors and sweeps are the largest of any part."""
    if len(parts) == 1:
        return parts[0]
    errors = [part.error for part in parts if part.error is not None]
    return InverseOutput(
        torch.cat([part.x for part in parts]),
        {name: torch.cat([part.states[name] for part in parts]) for name in parts[0].states},
        parts[0].method,
        tuple(map(max, *(part.sweeps for part in parts))),
        max(errors) if errors else None,
    )


def image_bytes(config: FlowConfig, branches: int, number: int) -> int:
    """Memory that decoding one image takes, without a graph, in bytes: keys and values of a block, or a parallel pass."""
    hidden = config.tokens * config.width * max(2 * config.layers, 2 * (3 + round(config.mlp_ratio)))
    return number * (branches * hidden + config.dims * (2 * config.blocks + 4))


def _check_block(tokens: Tensor, number: int) -> None:
    """NotFiniteError, with rows and block, for tokens on the image side of a block that are not finite."""
    if not bool(tokens.detach().isfinite().all()):
        raise NotFiniteError("not finite", rows_not_finite(tokens), number)


def _layers(wanted: list[Tap], block: int) -> set[int]:
    return {tap.layer for tap in wanted if tap.block == block and isinstance(tap.layer, int)}


def _record(states: dict[str, Tensor], wanted: list[Tap], block: int, side: str, tokens: Tensor) -> None:
    tap = Tap(block, side)
    if tap in wanted:
        states[tap.name] = tokens
