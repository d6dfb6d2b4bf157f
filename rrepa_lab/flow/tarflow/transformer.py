"""A causal Transformer over tokens, full sequences at once or one token at a time.

Axes: B images, n tokens of this call, D width, H heads of width d. Positions are passed in as image
positions, because a block may process the image in reversed order.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class TransformerOutput(NamedTuple):
    """What one call of the Transformer returns."""

    hidden: Tensor  # (B, n, D) after the last layer that was run
    states: dict[int, Tensor]  # layer (from 1) -> (B, n, D), filled for the layers in `keep`


class GrowingCache:
    """Keys and values of the tokens so far, concatenated anew for every token: plain, and differentiable."""

    def __init__(self) -> None:
        self._past: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, n, d) of new tokens; returns those of all tokens, (B, H, m, d)."""
        if layer in self._past:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(self._past[layer], (k, v), strict=True))
        self._past[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Multi-head causal self-attention; logits are q.k / (sqrt(d) * temperature)."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = width // head_width, head_width
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, temperature: Tensor | None, angles: Tensor | None, cache: GrowingCache | None, layer: int
    ) -> Tensor:
        """(B, n, D) -> (B, n, D); with a cache n is 1, and the token attends to those before it too."""
        batch, count, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if temperature is not None:
            q = q / temperature.to(q.dtype)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        # one token after those of a cache may attend to everything
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=count > 1)
        return self.proj(attended.transpose(1, 2).reshape(batch, count, width))


def mlp_width(width: int, ratio: float, gated: bool) -> int:
    """Numbers in the hidden layer of a perceptron; a gated one is narrower, so that both have about as many parameters."""
    return 8 * round(ratio * width * 2 / 3 / 8) if gated else round(ratio * width)


class MLP(nn.Module):
    """Two-layer perceptron with exact GELU, or its SwiGLU relative of about the same size."""

    def __init__(self, width: int, ratio: float, kind: str) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        hidden = mlp_width(width, ratio, self.gated)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        return self.down(self.activate(self.up(self.norm(x))))

    def activate(self, h: Tensor) -> Tensor:
        """The output of `up`, (..., 2 * hidden) if gated -> the input of `down`, (..., hidden)."""
        if not self.gated:
            return F.gelu(h)
        gate, h = h.chunk(2, dim=-1)
        return F.silu(gate) * h


class Layer(nn.Module):
    """Pre-norm attention and perceptron with residual connections."""

    def __init__(self, width: int, head_width: int, mlp_ratio: float, mlp: str) -> None:
        super().__init__()
        self.attention = Attention(width, head_width)
        self.mlp = MLP(width, mlp_ratio, mlp)

    def forward(
        self, x: Tensor, temperature: Tensor | None, angles: Tensor | None, cache: GrowingCache | None, layer: int
    ) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        x = x + self.attention(x, temperature, angles, cache, layer)
        return x + self.mlp(x)


class CausalTransformer(nn.Module):
    """A stack of layers; token i attends to tokens 0..i.

    Attributes: checkpointing, whether a graph keeps the input of each layer alone and recomputes the rest in its backward
        pass.
    """

    def __init__(self, layers: int, width: int, head_width: int, mlp_ratio: float, mlp: str) -> None:
        super().__init__()
        self.checkpointing = False
        self.layers = nn.ModuleList(Layer(width, head_width, mlp_ratio, mlp) for _ in range(layers))

    def forward(
        self,
        x: Tensor,
        temperature: Tensor | None = None,
        angles: Tensor | None = None,
        cache: GrowingCache | None = None,
        keep: Collection[int] = (),
        upto: int | None = None,
    ) -> TransformerOutput:
        """Process tokens, all of a sequence or the one that follows those of a cache.

        Args:
            x: (B, n, D); n is 1 with a cache.
            temperature: (B, 1, 1, 1) divisor of the attention logits, or None for 1.
            angles: (n, d / 2) rotary angles of these tokens, or None.
            cache: of the tokens before; these are added to it.
            keep: layers (from 1) whose outputs are wanted.
            upto: stop after this layer (from 1).
        """
        states: dict[int, Tensor] = {}
        recompute = self.checkpointing and cache is None and torch.is_grad_enabled()
        for number, layer in enumerate(self.layers, start=1):
            inputs = x, temperature, angles, cache, number
            # nothing in a layer is random
            x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False) if recompute else layer(*inputs)
            if number in keep:
                states[number] = x
            if number == upto:
                break
        return TransformerOutput(x, states)


def axial_angles(side: int, head_width: int, base: float = 100.0) -> Tensor:
    """Rotary angles of a square grid: half of each head is rotated by the row, half by the column.

    Returns: (side * side, head_width / 2) radians, float64, row-major. Source: RoPE, arXiv 2104.09864; axial, 2403.13298.
    """
    quarter = head_width // 4
    frequency = base ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    position = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    return torch.cat([position.repeat_interleave(side, dim=0), position.repeat(side, 1)], dim=1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs of numbers of (B, H, n, d) by (n, d / 2) angles; the dtype stays."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
