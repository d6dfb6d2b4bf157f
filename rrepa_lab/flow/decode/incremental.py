"""A block's Transformer unrolled for a few tokens at a time, without a graph: what fast decoding is made of.

The numbers are those of `AffineBlock.read`. Reading few tokens is bound by what surrounds the products, so parameters are
looked up once, the memory for keys and values is taken once, views are taken the cheap way (`narrow` rather than an index),
and few rows are multiplied as weight @ x^T, which takes 0.6 to 0.8 of the time of x @ weight^T on a CPU (MKL, two threads).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.flow.tarflow.transformer import CausalTransformer, Layer, rotate

FEW_ROWS = 64  # up to so many rows products are turned
HANDFUL = 8  # up to so many a turned product is much faster of rows that lie together, though they are copied for it
FEW_LOGITS = 4096  # up to so many, on a CPU, attention is two plain products


class Reader:
    """Reads tokens of sequences, those at one place after those before it; tokens read again replace what they were.

    Args:
        rows: sequences.
        tokens: places that will be read, at most.
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
        self.device = weight.device.type
        dtype = torch.get_autocast_dtype(self.device) if torch.is_autocast_enabled(self.device) else weight.dtype
        shape = 2, rows, self.heads, tokens, self.head_width
        self.memory = [torch.empty(shape, device=weight.device, dtype=dtype) for _ in self.layers]  # keys and values
        self.divisor = None if divisor is None else divisor.to(dtype)
        self.angles = angles
        self.unused = weight.new_empty((), dtype=dtype)  # the mask of one query
        self.plain = dtype != weight.dtype  # under autocast, which does not know turned products
        self.weights = [self._of(layer) for layer in self.layers]

    def _of(self, layer: Layer) -> tuple[Tensor, ...]:
        attention, mlp = layer.attention, layer.mlp
        parts = (attention.norm, attention.qkv, attention.proj, mlp.norm, mlp.up, mlp.down)
        return tuple(value for part in parts for value in (part.weight, part.bias))

    def __call__(self, h: Tensor, place: int) -> Tensor:
        """The states after the last layer (rows, n, D), for those before the first of the tokens at place..place+n-1."""
        rows, count, width = h.shape
        heads, size, stop = self.heads, self.head_width, place + count
        total = rows * count
        turned = self.device == "cpu" and not self.plain and total <= FEW_ROWS
        mask = self.unused
        if count > 1:
            mask = mask.new_full((count, stop), -torch.inf).triu(place + 1)
        h = h.reshape(total, width)
        for layer, weights, memory in zip(self.layers, self.weights, self.memory, strict=True):
            scale1, shift1, qkv_w, qkv_b, proj_w, proj_b, scale2, shift2, up_w, up_b, down_w, down_b = weights
            x = torch.layer_norm(h, (width,), scale1, shift1)
            qkv = _product(x, qkv_w, qkv_b, turned).view(rows, count, 3, heads, size).permute(2, 0, 3, 1, 4)
            q, new = qkv.select(0, 0), memory.narrow(3, place, count)
            if self.angles is not None:
                turns = self.angles[place:stop]
                q = rotate(q, turns)
                new[0], new[1] = rotate(qkv[1], turns), qkv[2]
            else:
                new.copy_(qkv.narrow(0, 1, 2))
            if self.divisor is not None:
                q = q / self.divisor
            seen = self._attend(q, memory.narrow(3, 0, stop), mask)
            h = h + _product(seen, proj_w, proj_b, turned)
            x = torch.layer_norm(h, (width,), scale2, shift2)
            hidden = layer.mlp.activate(_product(x, up_w, up_b, turned))
            if total <= HANDFUL:
                hidden = hidden.contiguous()
            h = h + _product(hidden, down_w, down_b, turned)
        return h.view(rows, count, width)

    def _attend(self, q: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Queries (rows, H, n, d) on keys and values (2, rows, H, m, d), with a mask to add if n > 1 -> (rows * n, D)."""
        rows, heads, count, size = q.shape
        if self.device != "cpu" or (count > 1 and rows * heads * count * memory.shape[3] > FEW_LOGITS):
            keys, values = memory.unbind(0)
            first = count > 1 and memory.shape[3] == count  # nothing was read before
            added = None if first or count == 1 else mask
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=added, is_causal=first)
        else:  # on a CPU the fused kernel is dear to start, and works in blocks of queries
            keys, values = memory.flatten(1, 2).unbind(0)
            flat = q.reshape(rows * heads, count, size)
            logits = torch.baddbmm(mask, flat, keys.transpose(1, 2), beta=int(count > 1), alpha=size**-0.5)
            out = torch.bmm(logits.softmax(dim=2).to(values.dtype), values).view(rows, heads, count, size)
        return out.transpose(1, 2).reshape(rows * count, self.width)


def _product(x: Tensor, weight: Tensor, bias: Tensor, turned: bool) -> Tensor:
    """x @ weight^T + bias; turned, its columns lie together in memory instead of its rows."""
    return torch.addmm(bias.unsqueeze(1), weight, x.t()).t() if turned else F.linear(x, weight, bias)
