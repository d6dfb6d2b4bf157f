"""A block's Transformer on a few tokens at a time with a KV cache, without a graph: the inner loop of fast decoding.

The numbers are those of `AffineBlock.run_transformer`. With few tokens most time goes to the operations around the matrix
products, so parameters are looked up once, the KV cache is allocated once, views are taken by `narrow` rather than an index,
and few rows are multiplied as weight @ x^T (a transposed GEMM), which takes 0.6 to 0.8 of the time of x @ weight^T on a CPU
(MKL, two threads).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.flow.tarflow.transformer import CausalTransformer, Layer, rotate

MAX_ROWS_TRANSPOSED = 64  # up to so many rows the GEMM is transposed
MAX_ROWS_CONTIGUOUS = 8  # up to so many, a transposed GEMM is much faster on contiguous rows, though they are copied for it
MAX_LOGITS_UNFUSED = 4096  # up to so many, on a CPU, attention is two plain products


class IncrementalDecoder:
    """Processes tokens of sequences after those before them; tokens at a position that was processed replace the old ones.

    Args:
        rows: sequences.
        tokens: positions, at most.
        divisor: (rows, 1, 1, 1) of the attention logits, or None for 1.
        angles: (tokens, d / 2) rotary angles in the block's order, or None.
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
        self.cache = [torch.empty(shape, device=weight.device, dtype=dtype) for _ in self.layers]  # keys and values
        self.divisor = None if divisor is None else divisor.to(dtype)
        self.angles = angles
        self.no_mask = weight.new_empty((), dtype=dtype)  # the mask of one query
        self.autocast = dtype != weight.dtype  # under autocast, which does not cover transposed GEMMs
        self.weights = [self._parameters(layer) for layer in self.layers]

    def _parameters(self, layer: Layer) -> tuple[Tensor, ...]:
        attention, mlp = layer.attention, layer.mlp
        parts = (attention.norm, attention.qkv, attention.proj, mlp.norm, mlp.up, mlp.down)
        return tuple(value for part in parts for value in (part.weight, part.bias))

    def __call__(self, h: Tensor, start: int) -> Tensor:
        """The states after the last layer (rows, n, D), for inputs (rows, n, D) at positions start..start+n-1."""
        rows, count, width = h.shape
        heads, size, stop = self.heads, self.head_width, start + count
        total = rows * count
        transposed = self.device == "cpu" and not self.autocast and total <= MAX_ROWS_TRANSPOSED
        mask = self.no_mask
        if count > 1:
            mask = mask.new_full((count, stop), -torch.inf).triu(start + 1)
        h = h.reshape(total, width)
        for layer, weights, cache in zip(self.layers, self.weights, self.cache, strict=True):
            scale1, shift1, qkv_w, qkv_b, proj_w, proj_b, scale2, shift2, up_w, up_b, down_w, down_b = weights
            x = torch.layer_norm(h, (width,), scale1, shift1)
            qkv = _linear(x, qkv_w, qkv_b, transposed).view(rows, count, 3, heads, size).permute(2, 0, 3, 1, 4)
            q, new = qkv.select(0, 0), cache.narrow(3, start, count)
            if self.angles is not None:
                angles = self.angles[start:stop]
                q = rotate(q, angles)
                new[0], new[1] = rotate(qkv[1], angles), qkv[2]
            else:
                new.copy_(qkv.narrow(0, 1, 2))
            if self.divisor is not None:
                q = q / self.divisor
            attended = self._attend(q, cache.narrow(3, 0, stop), mask)
            h = h + _linear(attended, proj_w, proj_b, transposed)
            x = torch.layer_norm(h, (width,), scale2, shift2)
            hidden = layer.mlp.activate(_linear(x, up_w, up_b, transposed))
            if total <= MAX_ROWS_CONTIGUOUS:
                hidden = hidden.contiguous()
            h = h + _linear(hidden, down_w, down_b, transposed)
        return h.view(rows, count, width)

    def _attend(self, q: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
        """Queries (rows, H, n, d) on keys and values (2, rows, H, m, d), with a mask to add if n > 1 -> (rows * n, D)."""
        rows, heads, count, size = q.shape
        if self.device != "cpu" or (count > 1 and rows * heads * count * cache.shape[3] > MAX_LOGITS_UNFUSED):
            keys, values = cache.unbind(0)
            first = count > 1 and cache.shape[3] == count  # there are no tokens before
            mask_or_none = None if first or count == 1 else mask
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask_or_none, is_causal=first)
        else:  # on a CPU the fused kernel is slow to start, and works in blocks of queries
            keys, values = cache.flatten(1, 2).unbind(0)
            flat = q.reshape(rows * heads, count, size)
            logits = torch.baddbmm(mask, flat, keys.transpose(1, 2), beta=int(count > 1), alpha=size**-0.5)
            out = torch.bmm(logits.softmax(dim=2).to(values.dtype), values).view(rows, heads, count, size)
        return out.transpose(1, 2).reshape(rows * count, self.width)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, transposed: bool) -> Tensor:
    """x @ weight^T + bias; transposed, the result is contiguous in its columns instead of its rows."""
    return torch.addmm(bias.unsqueeze(1), weight, x.t()).t() if transposed else F.linear(x, weight, bias)
