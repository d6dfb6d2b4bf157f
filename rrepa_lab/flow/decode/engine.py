"""Fast ways to generate, all to the same answer: one engine, with windows of one token or of several.

Generating a block is a triangular system: a token needs those before it. `cached` reads one token at a time, keys and
values of the tokens before it kept in memory. `jacobi` reads a window of tokens at once, starting from a guess, again and
again; the first token of the window is exact after each sweep, and so are those behind it that have stopped moving, so the
window moves on. With a window of one token the two are the same. At most T - 1 sweeps are needed, and an answer is
checked before it is given: see `residual`.

Source: Jacobi and Gauss-Seidel-Jacobi decoding of TARFlow, arXiv 2505.12849; there the windows are segments that wait for
the slowest of their tokens.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rrepa_lab.errors import LabError
from rrepa_lab.flow.condition import Guidance
from rrepa_lab.flow.decode.plan import DecodePlan
from rrepa_lab.flow.tarflow.block import AffineBlock

METHODS = ("auto", "sequential", "cached", "jacobi")
POLISH = 8  # sweeps over all blocks at most, to bring an answer below its tolerance
INNER = 0.5  # a token of a window has stopped when it moves less than this part of the tolerance


class ToleranceError(LabError):
    """Jacobi stopped above the tolerance asked for."""


class BlockReport(NamedTuple):
    """What a progress callback is told after each block."""

    block: int  # the block just done, from N down to 1
    blocks: int
    images: int  # decoded at once
    sweeps: int  # reads of the Transformer
    method: str


Progress = Callable[[BlockReport], object]


class Decoded(NamedTuple):
    """The tokens on the image side of a block, (B, T, P) in image order, and the reads of the Transformer it took."""

    tokens: Tensor
    sweeps: int


@torch.no_grad()
def decode_block(
    block: AffineBlock, z: Tensor, label: Tensor | None, guidance: Guidance, window: int = 1, still: float = 0.0
) -> Decoded:
    """Generate one block: (B, T, P) -> (B, T, P), both in image order; no graph.

    Args:
        label: (B, K), or (2B, K) under guidance: conditional half first.
        window: tokens read at once; 1 is the plain cached loop.
        still: a token of the window has stopped when none of its numbers moves more than this in a sweep.
    """
    z = block.turn(z)
    x = z.clone()  # the first token passes unchanged; the others start from the noise itself
    count, embedded = z.shape[1], block.embed(label)
    reader = block.reader(guidance.branches * len(z), guidance.temperatures(z))
    known, sweeps = 1, 0  # tokens that are final
    while known < count:
        stop = min(known + window, count)
        seen = guidance.copies(x[:, known - 1 : stop - 1])
        hidden = reader(block.enter(seen, known - 1, embedded), known - 1)
        mu, alpha = block.predict(hidden, known - 1, count, guidance)
        new = mu + torch.exp(alpha) * z[:, known:stop]
        sweeps += 1
        # the first token was read off final ones; each further one too if all before it in the window have stopped
        moved = 1 + (_leading(new[:, :-1], x[:, known : stop - 1], still) if stop - known > 1 else 0)
        x[:, known:stop] = new
        known += moved
    return Decoded(block.turn(x), sweeps)


def _leading(new: Tensor, old: Tensor, still: float) -> int:
    """How many tokens (B, n, P) from the first on have stopped in all images; nan never stops."""
    stopped = ((new - old).abs() <= still).all(dim=2).all(dim=0)
    return int(stopped.long().cumprod(dim=0).sum())


class Residual(NamedTuple):
    """How far an answer is from solving the system: after one more sweep of all tokens of all blocks."""

    tokens: dict[int, Tensor]  # block -> the tokens on its image side after that sweep, (B, T, P)
    error: float  # largest change of a number on the image side


@torch.no_grad()
def residual(
    blocks: Sequence[AffineBlock], z: Tensor, tokens: dict[int, Tensor], labels: Sequence[Tensor | None], guidance: Guidance
) -> Residual:
    """One sweep over all blocks, from the noise to the image, every token read in parallel at the answer given.

    The exact answer does not change. The change of another measures its distance from the exact one, but does not bound it:
    what is wrong early in a block can have grown by its end; tests hold the distance to ten times the change. One pass.

    Args:
        blocks: block 1 first.
        tokens: the answer, block -> the tokens on its image side.
        labels: of each block, block 1 first.
    """
    rebuilt: dict[int, Tensor] = {}
    coming = z
    for number in range(len(blocks), 0, -1):
        mu, alpha, _ = blocks[number - 1].affine(tokens[number], labels[number - 1], guidance=guidance)
        coming = rebuilt[number] = mu + torch.exp(alpha) * coming
    change = (rebuilt[1] - tokens[1]).abs().max()
    return Residual(rebuilt, float(change) if bool(change.isfinite()) else float("inf"))


def default_tolerance(dtype: torch.dtype) -> float:
    """What `jacobi` promises in this precision: the largest error of a number of the image, images being in [-1, 1]."""
    return 1e-10 if dtype == torch.float64 else 1e-5


def automatic(plan: DecodePlan | None, device: str, rows: int) -> str:
    """The faster of cached and jacobi for so many images times branches: by the plan, without one of this device cached."""
    return "jacobi" if plan is not None and plan.device == device and rows <= plan.upto else "cached"


def windows_of(plan: DecodePlan | None, blocks: int, tokens: int) -> list[int]:
    """Tokens read at once in each block, block 1 first; without a plan an eighth of them everywhere."""
    if plan is not None and len(plan.windows) == blocks:
        return [min(window, tokens) for window in plan.windows]
    return [max(8, tokens // 8)] * blocks


def keep_states(
    block: AffineBlock, tokens: Tensor, label: Tensor | None, guidance: Guidance, keep: Collection[int]
) -> dict[int, Tensor]:
    """Outputs (B, T, D) of these layers for the tokens a block has generated, of the conditional branch: one pass."""
    if not keep:
        return {}
    return block.features(tokens, label if label is None else label[: len(tokens)], keep)
