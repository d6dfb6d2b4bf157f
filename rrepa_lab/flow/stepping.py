"""A block's Transformer unrolled for one token at a time, without a graph: what the token loop of `cached` is made of.

The numbers are those of `AffineBlock.read` with a cache. Reading single tokens is bound by what surrounds the products, so
parameters are looked up once, the memory for keys and values is taken once, and for few rows a product is formed as
weight @ x^T, which takes 0.6 to 0.8 of the time of x @ weight^T on a CPU (MKL; `rrepa-lab bench products`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.flow.transformer import CausalTransformer, Layer, rotate

HANDFUL, FEW_ROWS = 8, 64  # up to so many rows all products are turned, or those of the perceptron, which need no turning back


class TokenReader:
    """Reads token after token of `rows` sequences that are `tokens` long.

    Args:
        divisor: (rows, 1, 1, 1) of the attention logits, or None for 1.
        angles: (tokens, d / 2) rotary angles in reading order, or None.
    """

    def __init__(
        self, transformer: CausalTransformer, rows: int, tokens: int, divisor: Tensor | None, angles: Tensor | None
    ) -> None:
        self.layers: list[Layer] = list(transformer.layers)  # type: ignore[arg-type]
        first = self.layers[0].attention
        self.heads, self.head_width, self.width = first.heads, first.head_width, first.heads * first.head_width
        weight = first.qkv.weight
        self.memory = weight.new_empty(len(self.layers), 2, rows, self.heads, tokens, self.head_width)
        self.divisor = None if divisor is None else divisor[:, :, 0].to(weight.dtype)
        self.angles = angles
        self.unused = weight.new_empty(())
        self.rows, self.scale = rows, self.head_width**-0.5
        few = weight.device.type == "cpu"
        self.turned, self.turned_mlp = few and rows <= HANDFUL, few and rows <= FEW_ROWS
        self.weights = [self._of(layer) for layer in self.layers]

    def _of(self, layer: Layer) -> tuple[Tensor, ...]:
        attention, mlp = layer.attention, layer.mlp
        parts = (attention.norm, attention.qkv, attention.proj, mlp.norm, mlp.up, mlp.down)
        return tuple(value for part in parts for value in (part.weight, part.bias))

    def __call__(self, h: Tensor, place: int) -> Tensor:
        """The hidden state (rows, D) after the last layer, for the one before the first at this place, 0, 1, ... in turn."""
        rows, heads, size, shape = self.rows, self.heads, self.head_width, (self.width,)
        for number, (layer, weights) in enumerate(zip(self.layers, self.weights, strict=True)):
            scale1, shift1, qkv_w, qkv_b, proj_w, proj_b, scale2, shift2, up_w, up_b, down_w, down_b = weights
            qkv = self._product(F.layer_norm(h, shape, scale1, shift1), qkv_w, qkv_b).view(rows, 3, heads, size)
            q = qkv[:, 0]
            if self.angles is not None:
                turns = self.angles[place : place + 1]
                q, k = rotate(q, turns), rotate(qkv[:, 1], turns)
                self.memory[number, 0, :, :, place], self.memory[number, 1, :, :, place] = k, qkv[:, 2]
            else:
                self.memory[number, :, :, :, place] = qkv[:, 1:].transpose(0, 1)
            if self.divisor is not None:
                q = q / self.divisor
            keys, values = self.memory[number, :, :, :, : place + 1].flatten(1, 2)
            # baddbmm for its alpha: nothing is added
            logits = torch.baddbmm(
                self.unused, q.reshape(rows * heads, 1, size), keys.transpose(1, 2), beta=0, alpha=self.scale
            )
            seen = torch.bmm(logits.softmax(dim=2), values).view(rows, self.width)
            h = h + self._product(seen, proj_w, proj_b)
            h = h + self._perceptron(F.layer_norm(h, shape, scale2, shift2), layer.mlp.gated, up_w, up_b, down_w, down_b)
        return h

    def _perceptron(self, x: Tensor, gated: bool, up_w: Tensor, up_b: Tensor, down_w: Tensor, down_b: Tensor) -> Tensor:
        if not self.turned_mlp:
            hidden = F.linear(x, up_w, up_b)
            return F.linear(_activate(hidden, gated, dim=1), down_w, down_b)
        hidden = _activate(torch.addmm(up_b[:, None], up_w, x.t()), gated, dim=0)
        # a handful of columns is multiplied much faster when it lies row by row
        hidden = hidden.t().contiguous().t() if self.turned else hidden
        return torch.addmm(down_b[:, None], down_w, hidden).t()

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias[:, None], weight, x.t()).t() if self.turned else F.linear(x, weight, bias)


def _activate(hidden: Tensor, gated: bool, dim: int) -> Tensor:
    if not gated:
        return F.gelu(hidden)
    gate, value = hidden.chunk(2, dim=dim)
    return F.silu(gate) * value
