"""Jacobi decoding of a block, with windows of one token (the cached loop) or of several.

Generating a block is a triangular system: a token needs those before it. A window of tokens is computed at once from a guess,
again and again; the first token of the window is exact after each iteration, and so are those behind it that have converged,
so the window moves on. With a window of one token this is the loop over tokens, keys and values of the tokens before it kept
in memory. At most T - 1 iterations are needed, and an answer is checked before it is returned: see `residual`.

Source: Jacobi and Gauss-Seidel-Jacobi decoding of TARFlow, arXiv 2505.12849; there the windows are segments that wait for
the slowest of their tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.tarflow.block import AffineBlock


class Decoded(NamedTuple):
    """The tokens on the image side of a block, (B, T, P) in image order, and the passes of the Transformer it took."""

    tokens: Tensor
    iterations: int


@torch.no_grad()
def decode_windows(block: AffineBlock, z: Tensor, condition: Condition, window: int = 1, atol: float = 0.0) -> Decoded:
    """Generate one block: (B, T, P) -> (B, T, P), both in image order; no graph. To be run within a call of the block.

    Args:
        condition: of this block.
        window: tokens computed at once; 1 is the plain cached loop.
        atol: a token of the window has converged when none of its numbers changes by more than this in an iteration.
    """
    guidance = condition.guidance
    z = block.to_block_order(z)
    x = z.clone()  # the first token passes unchanged; the others start from the noise itself
    count, embedded = z.shape[1], block.embed_label(condition)
    decoder = block.decoder(guidance.branches * len(z), guidance.temperatures(z))
    n_decoded, iterations = 1, 0
    while n_decoded < count:
        stop = min(n_decoded + window, count)
        given = guidance.repeat_for_cfg(x[:, n_decoded - 1 : stop - 1])
        hidden = decoder(block.embed_tokens(given, n_decoded - 1, embedded), n_decoded - 1)
        mu, alpha = block.predict(hidden, n_decoded - 1, count, guidance)
        new = mu + torch.exp(alpha) * z[:, n_decoded:stop]
        iterations += 1
        # the first token comes from final ones; each further one is final if all before it in the window have converged
        n_accepted = 1 + (_n_converged(new[:, :-1], x[:, n_decoded : stop - 1], atol) if stop - n_decoded > 1 else 0)
        x[:, n_decoded:stop] = new
        n_decoded += n_accepted
    return Decoded(block.to_block_order(x), iterations)


def _n_converged(new: Tensor, old: Tensor, atol: float) -> int:
    """How many tokens (B, n, P) from the first on have converged in all images; nan never does."""
    converged = ((new - old).abs() <= atol).all(dim=2).all(dim=0)
    return int(converged.long().cumprod(dim=0).sum())


class Residual(NamedTuple):
    """How far an answer is from solving the system: the result of one more iteration on all tokens of all blocks."""

    tokens: dict[int, Tensor]  # block -> the tokens on its image side after that iteration, (B, T, P)
    error: float  # largest change of a number on the image side


@torch.no_grad()
def residual(flow: FlowModel, z: Tensor, tokens: dict[int, Tensor], condition: Condition) -> Residual:
    """One Jacobi iteration over all blocks, from the noise to the image, every token computed in parallel at the answer given.

    The exact answer does not change. The change of another measures its distance from the exact one, but does not bound it:
    an error early in a block can have grown by its end; tests hold the distance to ten times the change. One pass.

    Args:
        tokens: the answer, block -> the tokens on its image side.
    """
    rebuilt: dict[int, Tensor] = {}
    above = z
    for number in range(flow.config.blocks, 0, -1):
        block = flow.block(number)
        mu, alpha, _ = block(block.affine, tokens[number], condition.of_block(number))
        above = rebuilt[number] = mu + torch.exp(alpha) * above
    change = (rebuilt[1] - tokens[1]).abs().max()
    return Residual(rebuilt, float(change) if bool(change.isfinite()) else float("inf"))
