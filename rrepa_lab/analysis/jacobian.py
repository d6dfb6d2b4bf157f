"""Extreme singular values of the Jacobian of each block at an image: how far the map stretches and shrinks near it.

A flow is exactly invertible whatever its condition number; in float32 or bfloat16 an error grows by up to it. The singular
values are found from products with the Jacobian J alone (Golub-Kahan-Lanczos, ARPACK), the smallest from products with its
inverse. J of a block is D less a strictly triangular matrix in the block's order, D = diag(exp(-alpha)), so that
v <- v + D^-1 (w - J v) solves J v = w in at most T iterations.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import reduce
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rrepa_lab.analysis.noise import NoiseSamples, image_noise
from rrepa_lab.checks import real_number
from rrepa_lab.errors import LabError
from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import Block, FlowModel
from rrepa_lab.flow.inputs import as_condition, gradients, leaf
from rrepa_lab.measurements.columns import about
from rrepa_lab.runs.inputs import encoded, for_flow
from rrepa_lab.runs.run import Run, flow_of

Product = Callable[[Tensor], Tensor]  # (T, P) -> (T, P)
SOLVED = 1e-10  # relative residual of a solved system


class _Map(NamedTuple):
    """Products with a Jacobian, its transpose, and the inverses of both."""

    times: Product
    transposed: Product
    solve: Product
    solve_transposed: Product


def jacobian(
    run: Run | FlowModel,
    x: Tensor,
    y: Any = None,
    blocks: Sequence[int] | None = None,
    *,
    noise: int | NoiseSamples | None = None,
    tolerance: float = 1e-3,
) -> pd.DataFrame:
    """Largest and smallest singular value of dz/dx of each block, and of the whole flow, at each image, in float64.

    Args:
        x: images (B, C, H, W) in [-1, 1]; x of the flow's own shape is taken as it is.
        y: labels, as in `trace`.
        blocks: numbers of blocks, 0 for the whole flow; all by default.
        noise: on the images, of which the first sample is taken, as in `classify`.
        tolerance: relative, of the singular values.

    Returns: one row for each image and block: run, strategy, data, space, encoder, train_seed (of a run), image, block (0 for
        the whole flow), sigma_max, sigma_min, condition (their ratio), logdet (nats, the sum of all logarithms), dims, n.

    Raises: LabError for a block that does not exist, no images, and as `trace`.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> table = rl.jacobian(run, run.data("test", 1).x, blocks=[4])
        >>> bool(table.sigma_min[0] < 1 < table.sigma_max[0])
        True
    """
    count = flow_of(run).config.blocks
    numbers = [0, *range(1, count + 1)] if blocks is None else list(blocks)
    if not numbers or not all(0 <= number <= count for number in numbers):
        raise LabError(f"blocks {numbers} must be some of 1..{count}, or 0 for the whole flow")
    real_number("tolerance", tolerance, above=True)
    given = encoded(run, x)
    if not len(given):
        raise LabError("there are no images to differentiate at")
    flow = cast(FlowModel, deepcopy(cast(nn.Module, flow_of(run))).double().requires_grad_(False))
    images = for_flow(flow, next(image_noise(run, noise).views(given)))
    condition = as_condition(flow, y, len(images), classes=run.classes if isinstance(run, Run) else None)
    columns, rows = about(run) if isinstance(run, Run) else {}, []
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        for image in range(len(images)):
            tokens, own = flow.tokenize(images[image : image + 1]), condition.rows(slice(image, image + 1))
            maps: list[_Map] = []
            logdets: list[float] = []
            for number in range(1, count + 1):
                block, of_block = flow.block(number), own.of_block(number)
                maps.append(_of_block(block, tokens, of_block))
                out = block(block.encode, tokens, of_block)
                tokens = out.z
                logdets.append(float(out.logdet))
            for number in numbers:
                part, logdet = (maps[number - 1], logdets[number - 1]) if number else (_composed(maps), sum(logdets))
                largest, smallest = _extremes(part, tokens, tolerance)
                row = {"image": image, "block": number, "sigma_max": largest, "sigma_min": smallest}
                rows.append({**columns, **row, "condition": largest / smallest, "logdet": logdet})
    return pd.DataFrame(rows).assign(dims=flow.config.dims, n=len(images))


def _of_block(block: Block, tokens: Tensor, condition: Condition) -> _Map:
    """Of a block at tokens (1, T, P)."""

    with gradients():
        at = leaf(tokens)
        z = block(block.encode, at, condition).z
        cotangent = torch.zeros_like(z).requires_grad_()
        (pulled,) = torch.autograd.grad(z, at, cotangent, create_graph=True)  # J^T cotangent: its derivative is J^T

    def times(v: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, cotangent, v[None], retain_graph=True)[0][0]

    def transposed(v: Tensor) -> Tensor:
        return torch.autograd.grad(z, at, v[None], retain_graph=True)[0][0]

    diagonal = torch.exp(-block(block.affine, tokens, condition).alpha[0])
    return _Map(times, transposed, _solver(times, diagonal), _solver(transposed, diagonal))


def _solver(times: Product, diagonal: Tensor) -> Product:
    """Products with the inverse of a triangular matrix with this diagonal (T, P), by Jacobi iteration."""

    def solve(w: Tensor) -> Tensor:
        v = w / diagonal
        for _ in range(len(w)):
            left = w - times(v)
            if left.norm() <= SOLVED * w.norm():
                break
            v = v + left / diagonal
        return v

    return solve


def _composed(maps: Sequence[_Map]) -> _Map:
    """One after the other, block 1 first."""

    def chain(products: list[Product]) -> Product:
        return lambda v: reduce(lambda value, product: product(value), products, v)

    return _Map(
        chain([one.times for one in maps]),
        chain([one.transposed for one in maps[::-1]]),
        chain([one.solve for one in maps[::-1]]),
        chain([one.solve_transposed for one in maps]),
    )


def _extremes(part: _Map, like: Tensor, tolerance: float) -> tuple[float, float]:
    """The largest and the smallest singular value of a map of tokens shaped like (1, T, P)."""
    return (
        _largest(part.times, part.transposed, like[0], tolerance),
        1 / _largest(part.solve, part.solve_transposed, like[0], tolerance),
    )


def _largest(times: Product, transposed: Product, like: Tensor, tolerance: float) -> float:
    size = like.numel()

    def on_arrays(product: Product) -> Callable[[np.ndarray], np.ndarray]:
        return lambda v: product(torch.from_numpy(v).to(like).view_as(like)).flatten().cpu().numpy()

    operator = LinearOperator((size, size), on_arrays(times), on_arrays(transposed), dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    return float(svds(operator, k=1, tol=tolerance, v0=start, return_singular_vectors=False)[0])
