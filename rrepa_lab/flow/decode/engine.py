"""Decoding of a whole flow: the method is chosen, the batch divided to fit into memory, the answer checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rrepa_lab.errors import LabError
from rrepa_lab.flow.condition import Condition, Guidance
from rrepa_lab.flow.contract import FlowModel, InverseOutput
from rrepa_lab.flow.decode.jacobi import Residual, decode_windows, residual
from rrepa_lab.flow.decode.plan import BlockReport, Decoding, Progress
from rrepa_lab.flow.finite import NotFiniteError, cause, listed, rows_not_finite
from rrepa_lab.flow.memory import fitting
from rrepa_lab.flow.taps import Recorder, Tap
from rrepa_lab.flow.tarflow.block import AffineBlock
from rrepa_lab.flow.tarflow.config import FlowConfig

MAX_RESIDUAL_ITERATIONS = 8  # over all blocks, to bring an answer below its tolerance
INNER_TOL_RATIO = 0.5  # a token of a window has converged when it changes by less than this part of the tolerance


class ToleranceError(LabError):
    """Jacobi stopped above its tolerance."""


class AutoregressiveFlow(FlowModel, Protocol):
    """A flow of autoregressive blocks, which this engine decodes."""

    @property
    def config(self) -> FlowConfig:
        """Sizes."""
        ...

    def block(self, number: int) -> AffineBlock:
        """The block with this number."""
        ...

    def invert_blocks(
        self, z: Tensor, condition: Condition, taps: list[Tap], after: Callable[[int, Tensor], object] | None = None
    ) -> InverseOutput:
        """Generate from noise (B, T, P), token after token."""
        ...


@dataclass(frozen=True)
class _Task:
    """What all parts of a batch are decoded with."""

    flow: AutoregressiveFlow
    taps: list[Tap]
    decoding: Decoding
    progress: Progress | None

    @property
    def blocks(self) -> int:
        return self.flow.config.blocks

    def report(self, number: int, images: int, iterations: int, method: str) -> None:
        if self.progress:
            self.progress(BlockReport(number, self.blocks, images, iterations, method))


def decode(
    flow: AutoregressiveFlow,
    z: Tensor,
    condition: Condition,
    taps: list[Tap],
    decoding: Decoding,
    progress: Progress | None = None,
) -> InverseOutput:
    """Generate images from noise (B, T, P); see `TarFlow.inverse`."""
    task, guidance = _Task(flow, taps, decoding, progress), condition.guidance
    method = _method(task, z, condition)
    bytes_each = image_bytes(flow.config, guidance.branches, z.element_size())
    size = decoding.batch or fitting(bytes_each, z.device, "decoding one image")
    parts = []
    for start in range(0, max(len(z), 1), size):
        rows = slice(start, start + size)
        try:
            parts.append(_decode_part(task, z[rows], condition.rows(rows), method))
        except NotFiniteError as error:
            raise _overflow(flow, [start + row for row in error.rows], error.block, len(z), guidance) from None
    return _concatenate(parts)


def image_bytes(config: FlowConfig, branches: int, element: int) -> int:
    """Memory that decoding one image takes, without a graph, in bytes: keys and values of a block, or a parallel pass.

    Args:
        branches: of the guidance.
        element: bytes of a number.
    """
    hidden = config.tokens * config.width * max(2 * max(config.depths), 2 * (3 + round(config.mlp_ratio)))
    return element * (branches * hidden + config.dims * (2 * config.blocks + 4))


def _method(task: _Task, z: Tensor, condition: Condition) -> str:
    """The method that is used; auto is sequential where a gradient is wanted."""
    if task.decoding.method == "auto" and torch.is_grad_enabled():
        inputs = [z, *([] if condition.weights is None else [condition.weights]), *task.flow.parameters()]
        if any(tensor.requires_grad for tensor in inputs):
            return "sequential"
    return task.decoding.choose(z.device.type, condition.guidance.branches * len(z))


def _decode_part(task: _Task, z: Tensor, condition: Condition, method: str) -> InverseOutput:
    if method == "sequential":
        return _sequential(task, z, condition)
    try:
        return _windowed(task, z, condition, method)
    except ToleranceError:
        if task.decoding.method != "auto":
            raise
        return _windowed(task, z, condition, "cached")


def _sequential(task: _Task, z: Tensor, condition: Condition) -> InverseOutput:
    passes = condition.guidance.branches * (task.flow.config.tokens - 1)

    def after(number: int, tokens: Tensor) -> None:
        _check_block(tokens, number)
        task.report(number, len(z), passes, "sequential")

    return task.flow.invert_blocks(z, condition, task.taps, after)._replace(iterations=(passes,) * task.blocks)


@torch.no_grad()
def _windowed(task: _Task, z: Tensor, condition: Condition, method: str) -> InverseOutput:
    flow, count = task.flow, task.blocks
    tolerance, precision = task.decoding.tolerance_in(z.dtype), task.decoding.precision
    windows = task.decoding.windows(method, count, flow.config.tokens)
    tokens: dict[int, Tensor] = {count + 1: z}  # block -> the tokens on its image side
    iterations: dict[int, int] = {}
    for number in range(count, 0, -1):
        block, given, own = flow.block(number), tokens[number + 1], condition.of_block(number)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            window = windows[number - 1]
            tokens[number], iterations[number] = block(decode_windows, block, given, own, window, INNER_TOL_RATIO * tolerance)
            if window > 1 and not bool(tokens[number].isfinite().all()):
                # a guess that overflows spoils the tokens of its window: token by token there are no guesses
                tokens[number], more = block(decode_windows, block, given, own)
                iterations[number] += more
        _check_block(tokens[number], number)
        task.report(number, len(z), iterations[number], method)
    error = None
    if method == "jacobi" or precision == "bfloat16":
        # float32 answers of jacobi are held to the tolerance; the error of others is reported
        check = _refine(task, z, tokens, condition, tolerance if method == "jacobi" and precision == "float32" else None)
        tokens, error = tokens | check.tokens, check.error
    states = _states(task, tokens, condition)
    passes = tuple(iterations[number] for number in range(1, count + 1))
    return InverseOutput(flow.untokenize(tokens[1]), states, method, passes, error)


def _refine(task: _Task, z: Tensor, tokens: dict[int, Tensor], condition: Condition, tolerance: float | None) -> Residual:
    """The answer after as many more iterations as bring it below the tolerance, with its error; none without a tolerance."""
    check, left = residual(task.flow, z, tokens, condition), MAX_RESIDUAL_ITERATIONS
    while tolerance is not None and not check.error <= tolerance:
        if not left:
            raise ToleranceError(
                f"jacobi cannot meet the tolerance {tolerance:g} here: iterations still change numbers by {check.error:.2g} in "
                f"{str(z.dtype).removeprefix('torch.')}; choose a larger one, or method 'cached'"
            )
        left, tokens = left - 1, tokens | check.tokens
        check = residual(task.flow, z, tokens, condition)
    return Residual({number: tokens[number] for number in check.tokens}, check.error)


def _states(task: _Task, tokens: dict[int, Tensor], condition: Condition) -> dict[str, Tensor]:
    """The states that were requested, by one pass over the decoded tokens of each block that has some."""
    recorder = Recorder(task.taps)
    for number in range(task.blocks, 0, -1):
        recorder.tokens(number, "out", tokens[number + 1])
        layers = recorder.layers(number)
        if layers:
            block = task.flow.block(number)
            recorder.add(number, block(block.features, tokens[number], condition.of_block(number), layers))
        recorder.tokens(number, "in", tokens[number])
    return recorder.states


def _check_block(tokens: Tensor, number: int) -> None:
    """NotFiniteError, with rows and block, for tokens on the image side of a block that are not finite."""
    if not bool(tokens.detach().isfinite().all()):
        raise NotFiniteError("not finite", rows_not_finite(tokens), number)


def _overflow(flow: FlowModel, rows: list[int], block: int | None, count: int, guidance: Guidance) -> NotFiniteError:
    """The error for rows of a batch that stopped being finite while a block was decoded."""
    what = f"numbers stop being finite in block {block} while generating, in row {listed(rows)} of {count}"
    return NotFiniteError(f"{what}: {cause(flow, guidance)}", rows, block)


def _concatenate(parts: Sequence[InverseOutput]) -> InverseOutput:
    """The parts of a batch as one answer: errors and iterations are the largest of any part."""
    if len(parts) == 1:
        return parts[0]
    errors = [part.error for part in parts if part.error is not None]
    return InverseOutput(
        torch.cat([part.x for part in parts]),
        {name: torch.cat([part.states[name] for part in parts]) for name in parts[0].states},
        parts[0].method,
        tuple(map(max, *(part.iterations for part in parts))),
        max(errors) if errors else None,
    )
