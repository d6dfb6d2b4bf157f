"""One autoregressive affine block: z_i = (x_i - mu(x_<i)) * exp(-alpha(x_<i)), and its inverse.

A block takes and gives tokens in image order; the order it works in is its own affair.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rrepa_lab.flow.transformer import CausalTransformer, KVCache, Pass, axial_angles


class Guidance(NamedTuple):
    """Classifier-free guidance on mu and alpha (TARFlow, arXiv 2412.06329, section 3.4).

    At token i = 0..T-1: alpha <- alpha_c + w * (alpha_c - alpha_u), mu likewise, with w = `scale`, or
    `scale` * i / (T - 1) when `annealed`. `temperature` divides the attention logits of the unconditional
    branch only; other values than 1 weaken that branch on purpose.
    """

    scale: float = 0.0
    annealed: bool = False
    temperature: float = 1.0

    @property
    def branches(self) -> int:
        """Copies of the batch that are read: 2, the conditional one first, or 1 without guidance."""
        return 2 if self.scale else 1

    def weight(self, token: int, tokens: int) -> float:
        """w at this token (from 0)."""
        return self.scale * token / (tokens - 1) if self.annealed else self.scale

    def copies(self, x: Tensor) -> Tensor:
        """A batch (B, ...) once for each branch."""
        return x if self.branches == 1 else torch.cat([x, x])

    def mix(self, value: Tensor, weight: float | Tensor) -> Tensor:
        """mu or alpha of all branches -> (B, n, P)."""
        if self.branches == 1:
            return value
        conditional, unconditional = value.chunk(2)
        return conditional + weight * (conditional - unconditional)

    def temperatures(self, x: Tensor) -> Tensor | None:
        """Divisor (2B, 1, 1, 1) of the attention logits for a batch (B, ...), None where it is 1 everywhere."""
        if self.branches == 1 or self.temperature == 1.0:
            return None
        divisor = x.new_ones(2 * len(x), 1, 1, 1)
        divisor[len(x) :] = self.temperature
        return divisor


UNGUIDED = Guidance()


class Affine(NamedTuple):
    """mu and alpha of every token, (B, T, P) in image order, and the layer outputs asked for, (B, T, D)."""

    mu: Tensor
    alpha: Tensor
    states: dict[int, Tensor]


class AffineBlock(nn.Module):
    """A causal Transformer that predicts shift mu and log-scale alpha of each token from the tokens before it."""

    angles: Tensor | None  # of rotary positions

    def __init__(
        self,
        *,
        side: int,
        token_size: int,
        width: int,
        layers: int,
        classes: int,
        head_width: int,
        mlp_ratio: float,
        mlp: str,
        positions: str,
        volume_preserving: bool,
        reversed_order: bool,
    ) -> None:
        super().__init__()
        tokens = side * side
        self.reversed_order, self.volume_preserving = reversed_order, volume_preserving
        self.proj_in = nn.Linear(token_size, width)
        self.pos_embed = nn.Parameter(torch.randn(tokens, width) * 1e-2) if positions == "learned" else None
        self.class_embed = nn.Parameter(torch.randn(classes, width) * 1e-2) if classes else None
        angles = axial_angles(side, head_width) if positions == "rotary" else None
        self.register_buffer("angles", angles, persistent=False)
        self.transformer = CausalTransformer(layers, width, head_width, mlp_ratio, mlp)
        self.proj_out = nn.Linear(width, token_size if volume_preserving else 2 * token_size)
        # both zero, so that a fresh block is the identity (the public code leaves the bias as it comes)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self, x: Tensor, label: Tensor | None, keep: Collection[int] = (), guidance: Guidance = UNGUIDED
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Encode: (B, T, P) -> z (B, T, P), logdet (B,) in nats, states; arguments as in `inverse`."""
        mu, alpha, states = self.affine(x, label, keep, guidance)
        return (x - mu) * torch.exp(-alpha), -alpha.sum(dim=(1, 2)), states

    def affine(self, x: Tensor, label: Tensor | None, keep: Collection[int] = (), guidance: Guidance = UNGUIDED) -> Affine:
        """mu and alpha of all tokens in one parallel pass, given all tokens (B, T, P).

        The guided mu and alpha of a token depend on the tokens before it alone, as the plain ones do: so the guided
        map, too, is inverted exactly and in parallel.
        """
        batch, tokens, _ = x.shape
        read = self._read(guidance.copies(self._turn(x)), 0, label, guidance.temperatures(x), keep=keep)
        # the prediction made at token i is for token i + 1; the first token passes unchanged
        shifted = (torch.cat([torch.zeros_like(p[:, :1]), p[:, :-1]], dim=1) for p in self._project(read.hidden))
        weight = x.new_tensor([guidance.weight(i, tokens) for i in range(tokens)])[:, None] if guidance.scale else 0.0
        mu, alpha = (self._turn(guidance.mix(p, weight)) for p in shifted)
        return Affine(mu, alpha, self._turn_all({number: state[:batch] for number, state in read.states.items()}))

    def features(self, x: Tensor, label: Tensor | None, layers: Collection[int]) -> dict[int, Tensor]:
        """Outputs (B, T, D) of the layers asked for, in image order; layers above the highest are not run."""
        return self._turn_all(self._read(self._turn(x), 0, label, keep=layers, upto=max(layers)).states)

    def inverse(
        self, z: Tensor, label: Tensor | None, guidance: Guidance, *, cached: bool, keep: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Generate: (B, T, P) -> x (B, T, P) and states, token after token; differentiable.

        Args:
            label: (B, K), or (2B, K) under guidance: conditional half first.
            cached: carry a KV cache along, or read the whole prefix again for every token.
            keep: layers whose outputs are wanted, of the conditional branch.
        """
        z = self._turn(z)
        batch, tokens, _ = z.shape
        temperature = guidance.temperatures(z)
        xs = [z[:, :1]]
        reads: list[Pass] = []
        cache: KVCache | None = None
        # the last token is read only if its features are wanted: nothing is predicted from it
        for i in range(tokens if keep else tokens - 1):
            if cached:
                read = self._read(guidance.copies(xs[-1]), i, label, temperature, cache, keep)
                cache = read.cache
            else:
                read = self._read(guidance.copies(torch.cat(xs, dim=1)), 0, label, temperature, None, keep)
            reads.append(read)
            if i + 1 < tokens:
                weight = guidance.weight(i + 1, tokens)
                mu, alpha = (guidance.mix(p, weight) for p in self._project(read.hidden[:, -1:]))
                xs.append(mu + torch.exp(alpha) * z[:, i + 1 : i + 2])
        states = {n: torch.cat([read.states[n][:batch, -1:] for read in reads], dim=1) for n in keep}
        return self._turn(torch.cat(xs, dim=1)), self._turn_all(states)

    def _read(
        self,
        x: Tensor,
        start: int,
        label: Tensor | None,
        temperature: Tensor | None = None,
        cache: KVCache | None = None,
        keep: Collection[int] = (),
        upto: int | None = None,
    ) -> Pass:
        """Run the Transformer on tokens (B, n, P) that stand at start..start+n in this block's own order."""
        stop = start + x.shape[1]
        h = self.proj_in(x)
        if self.pos_embed is not None:
            h = h + self._turn(self.pos_embed, dim=0)[start:stop]
        if self.class_embed is not None:
            assert label is not None
            h = h + (label @ self.class_embed)[:, None]
        angles = None if self.angles is None else self._turn(self.angles, dim=0)[start:stop]
        return self.transformer(h, temperature, angles, cache, keep, upto)

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states to (mu, alpha), in float32 at least, autocast or not."""
        with torch.autocast(hidden.device.type, enabled=False):
            out = self.proj_out(hidden.to(self.proj_out.weight.dtype))
        if self.volume_preserving:
            return out, torch.zeros_like(out)
        alpha, mu = out.chunk(2, dim=-1)
        return mu, alpha

    def _turn(self, x: Tensor, dim: int = 1) -> Tensor:
        """From image order to the block's order, and back."""
        return x.flip(dim) if self.reversed_order else x

    def _turn_all(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        return {number: self._turn(state) for number, state in states.items()}
