"""A causal Transformer over tokens, whole sequences at once or one token at a time.

Axes: B images, n tokens of this call, D width, H heads of width d. Positions are given from outside as image
positions, because a block may read the image in reversed order.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KVCache(NamedTuple):
    """Keys and values of the tokens already read, one (B, H, n, d) tensor a layer; never written to."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Pass(NamedTuple):
    """What one call of the Transformer gives back."""

    hidden: Tensor  # (B, n, D) after the last layer that was run
    states: dict[int, Tensor]  # layer (from 1) -> (B, n, D), filled for the layers asked for
    cache: KVCache


class Attention(nn.Module):
    """Multi-head causal self-attention; logits are q.k / (sqrt(d) * temperature)."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, temperature: Tensor | None, angles: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, n, D) -> (B, n, D), and the keys and values (B, H, n, d) of past and present."""
        batch, count, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if temperature is not None:
            q = q / temperature.to(q.dtype)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        # with a past there is one query, the newest token, which may look at everything
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.proj(attended.transpose(1, 2).reshape(batch, count, width)), (k, v)


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

    def forward(
        self, x: Tensor, temperature: Tensor | None, angles: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, n, D) -> (B, n, D), and the keys and values of past and present."""
        attended, present = self.attention(x, temperature, angles, past)
        x = x + attended
        return x + self.mlp(x), present


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
        cache: KVCache | None = None,
        keep: Collection[int] = (),
        upto: int | None = None,
    ) -> Pass:
        """Read tokens that follow those in `cache`.

        Args:
            x: (B, n, D); n is 1 when a cache is given.
            temperature: (B, 1, 1, 1) divisor of the attention logits, or None for 1.
            angles: (n, d / 2) rotary angles of these tokens, or None.
            cache: what an earlier call handed back.
            keep: layers (from 1) whose outputs are wanted.
            upto: stop after this layer (from 1).
        """
        states: dict[int, Tensor] = {}
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for number, layer in enumerate(self.layers, start=1):
            past = None if cache is None else (cache.keys[number - 1], cache.values[number - 1])
            x, (k, v) = layer(x, temperature, angles, past)
            keys.append(k)
            values.append(v)
            if number in keep:
                states[number] = x
            if number == upto:
                break
        return Pass(x, states, KVCache(tuple(keys), tuple(values)))


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
