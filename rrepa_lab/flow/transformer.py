"""A causal Transformer over tokens, whole sequences at once or one token at a time.

Axes: B images, n tokens of this call, D width, H heads of width d. Positions are given from outside as image
positions, because a block may read the image in reversed order.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Pass(NamedTuple):
    """What one call of the Transformer gives back."""

    hidden: Tensor  # (B, n, D) after the last layer that was run
    states: dict[int, Tensor]  # layer (from 1) -> (B, n, D), filled for the layers asked for


class GrowingCache:
    """Keys and values of the tokens already read, joined anew for every token: plain, and differentiable."""

    def __init__(self) -> None:
        self._past: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in keys and values (B, H, n, d) of new tokens; returns those of all tokens, (B, H, m, d)."""
        if layer in self._past:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(self._past[layer], (k, v), strict=True))
        self._past[layer] = k, v
        return k, v


class Buffers:
    """Keys and values in memory taken once, of tokens that may be read again; it has no gradient."""

    def __init__(
        self, layers: int, rows: int, heads: int, tokens: int, head_width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = layers, rows, heads, tokens, head_width
        self._keys, self._values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.start = 0  # where the tokens stand that come next

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As for `GrowingCache`, with the tokens before `start` as the past."""
        stop = self.start + k.shape[2]
        keys, values = self._keys[layer - 1], self._values[layer - 1]
        keys[:, :, self.start : stop] = k
        values[:, :, self.start : stop] = v
        return keys[:, :, :stop], values[:, :, :stop]


Cache = GrowingCache | Buffers


class Attention(nn.Module):
    """Multi-head causal self-attention; logits are q.k / (sqrt(d) * temperature)."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = width // head_width, head_width
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, temperature: Tensor | None, angles: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        """(B, n, D) -> (B, n, D); with a cache the tokens see those before them too."""
        batch, count, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if temperature is not None:
            q = q / temperature.to(q.dtype)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(batch, count, width))


class MLP(nn.Module):
    """Two-layer perceptron with exact GELU, or its SwiGLU relative of about the same size."""

    def __init__(self, width: int, ratio: float, kind: str) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        hidden = 8 * round(ratio * width * 2 / 3 / 8) if self.gated else round(ratio * width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        h = self.up(self.norm(x))
        if self.gated:
            gate, h = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * h)
        return self.down(F.gelu(h))


class Layer(nn.Module):
    """Pre-norm attention and perceptron with residual connections."""

    def __init__(self, width: int, head_width: int, mlp_ratio: float, mlp: str) -> None:
        super().__init__()
        self.attention = Attention(width, head_width)
        self.mlp = MLP(width, mlp_ratio, mlp)

    def forward(self, x: Tensor, temperature: Tensor | None, angles: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        x = x + self.attention(x, temperature, angles, cache, layer)
        return x + self.mlp(x)


class CausalTransformer(nn.Module):
    """A stack of layers; token i sees tokens 0..i."""

    def __init__(self, layers: int, width: int, head_width: int, mlp_ratio: float, mlp: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, head_width, mlp_ratio, mlp) for _ in range(layers))

    def forward(
        self,
        x: Tensor,
        temperature: Tensor | None = None,
        angles: Tensor | None = None,
        cache: Cache | None = None,
        keep: Collection[int] = (),
        upto: int | None = None,
    ) -> Pass:
        """Read tokens, all of a sequence or those that follow what a cache holds.

        Args:
            x: (B, n, D).
            temperature: (B, 1, 1, 1) divisor of the attention logits, or None for 1.
            angles: (n, d / 2) rotary angles of these tokens, or None.
            cache: of the tokens before; it takes these in.
            keep: layers (from 1) whose outputs are wanted.
            upto: stop after this layer (from 1).
        """
        states: dict[int, Tensor] = {}
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, temperature, angles, cache, number)
            if number in keep:
                states[number] = x
            if number == upto:
                break
        return Pass(x, states)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last n of m tokens: (B, H, n, d) with (B, H, m, d) -> (B, H, n, d)."""
    count, seen = q.shape[2], k.shape[2]
    if count == seen:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if count > 1:
        mask = torch.ones(count, seen, dtype=torch.bool, device=q.device).tril(seen - count)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.scaled_dot_product_attention(q, k, v)


def axial_angles(side: int, head_width: int, base: float = 100.0) -> Tensor:
    """Rotary angles of a square grid: half of each head turns with the row, half with the column.

    Returns: (side * side, head_width / 2) radians, float64, row-major. Source: RoPE, arXiv 2104.09864; axial, 2403.13298.
    """
    quarter = head_width // 4
    speed = base ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    turn = torch.arange(side, dtype=torch.float64)[:, None] * speed
    return torch.cat([turn.repeat_interleave(side, dim=0), turn.repeat(side, 1)], dim=1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs of numbers of (B, H, n, d) by (n, d / 2) angles; the dtype stays."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
