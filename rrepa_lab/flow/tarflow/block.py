"""One autoregressive affine block: z_i = (x_i - mu(x_<i)) * exp(-alpha(x_<i)), and its inverse.

A block takes and gives tokens in image order; the order it works in is its own affair.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.flow.condition import UNGUIDED, Guidance
from rrepa_lab.flow.decode.incremental import Reader
from rrepa_lab.flow.tarflow.transformer import CausalTransformer, GrowingCache, Pass, axial_angles


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
        self.tokens = side * side
        self.reversed_order, self.volume_preserving = reversed_order, volume_preserving
        self.proj_in = nn.Linear(token_size, width)
        self.pos_embed = nn.Parameter(torch.randn(self.tokens, width) * 1e-2) if positions == "learned" else None
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
        read = self.read(guidance.copies(self.turn(x)), 0, self.embed(label), guidance.temperatures(x), keep=keep)
        # the prediction made at token i is for token i + 1; the first token passes unchanged
        shifted = (F.pad(p[:, :-1], (0, 0, 1, 0)) for p in self.predict(read.hidden, 0, tokens, guidance))
        mu, alpha = (self.turn(p) for p in shifted)
        return Affine(mu, alpha, self._turn_all({number: state[:batch] for number, state in read.states.items()}))

    def features(self, x: Tensor, label: Tensor | None, layers: Collection[int]) -> dict[int, Tensor]:
        """Outputs (B, T, D) of the layers asked for, in image order; layers above the highest are not run."""
        return self._turn_all(self.read(self.turn(x), 0, self.embed(label), keep=layers, upto=max(layers)).states)

    def sequential(
        self, z: Tensor, label: Tensor | None, guidance: Guidance, keep: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Generate: (B, T, P) -> x (B, T, P) and states, token after token; plain and differentiable.

        This is the token loop of the public implementations: a cache that is joined anew for every token, and a pass of
        its own for each branch of the guidance. `flow.decode` has the fast ones.

        Args:
            label: (B, K), or (2B, K) under guidance: conditional half first.
            keep: layers whose outputs are wanted, of the conditional branch.
        """
        z = self.turn(z)
        tokens, branches = z.shape[1], guidance.branches
        seen = self.embed(label)
        embedded = [None] * branches if seen is None else seen.chunk(branches)
        divisor = guidance.temperatures(z)
        divisors = [None] * branches if divisor is None else divisor.chunk(branches)
        caches = [GrowingCache() for _ in range(branches)]
        xs = [z[:, :1]]
        states: dict[int, list[Tensor]] = {number: [] for number in keep}
        # the last token is read only if its features are wanted: nothing is predicted from it
        for i in range(tokens if keep else tokens - 1):
            reads = [self.read(xs[-1], i, embedded[b], divisors[b], caches[b], keep) for b in range(branches)]
            for number, state in reads[0].states.items():
                states[number].append(state)
            if i + 1 < tokens:
                mu, alpha = self.predict(torch.cat([read.hidden for read in reads]), i, tokens, guidance)
                xs.append(mu + torch.exp(alpha) * z[:, i + 1 : i + 2])
        return self.turn(torch.cat(xs, dim=1)), self._turn_all({n: torch.cat(parts, dim=1) for n, parts in states.items()})

    def reader(self, rows: int, divisor: Tensor | None) -> Reader:
        """What reads a few tokens at a time, in this block's own order, from what `enter` gives."""
        angles = None if self.angles is None else self.turn(self.angles, dim=0)
        return Reader(self.transformer, rows, self.tokens - 1, divisor, angles)

    def enter(self, x: Tensor, place: int, embedded: Tensor | None) -> Tensor:
        """Tokens (B, n, P) from a place on, in this block's own order -> what the first layer reads, (B, n, D)."""
        h = self.proj_in(x)
        if self.pos_embed is not None:
            h = h + self._places(self.pos_embed, place, x.shape[1])
        return h if embedded is None else h + embedded

    def predict(self, hidden: Tensor, start: int, tokens: int, guidance: Guidance) -> tuple[Tensor, Tensor]:
        """mu and alpha (B, n, P) of the tokens that follow those read at start..start+n-1, of `tokens` in all."""
        mu, alpha = self.project(hidden)
        weight: float | Tensor = guidance.scale
        if guidance.annealed:
            places = torch.arange(start + 1, start + 1 + hidden.shape[1], dtype=mu.dtype, device=mu.device)
            weight = guidance.scale * places[:, None] / (tokens - 1)
        return guidance.mix(mu, weight), guidance.mix(alpha, weight)

    def embed(self, label: Tensor | None) -> Tensor | None:
        """Class weights (B, K) -> what every token is given of the label, (B, 1, D); None for a flow without classes."""
        if self.class_embed is None:
            return None
        assert label is not None
        return (label @ self.class_embed)[:, None]

    def read(
        self,
        x: Tensor,
        start: int,
        embedded: Tensor | None,
        temperature: Tensor | None = None,
        cache: GrowingCache | None = None,
        keep: Collection[int] = (),
        upto: int | None = None,
    ) -> Pass:
        """Run the Transformer on tokens (B, n, P) that stand at start..start+n-1 in this block's own order."""
        h = self.enter(x, start, embedded)
        angles = None if self.angles is None else self._places(self.angles, start, x.shape[1])
        return self.transformer(h, temperature, angles, cache, keep, upto)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states to (mu, alpha), in float32 at least, autocast or not."""
        with torch.autocast(hidden.device.type, enabled=False):
            out = self.proj_out(hidden.to(self.proj_out.weight.dtype))
        if self.volume_preserving:
            return out, torch.zeros_like(out)
        alpha, mu = out.chunk(2, dim=-1)
        return mu, alpha

    def turn(self, x: Tensor, dim: int = 1) -> Tensor:
        """From image order to the block's order, and back."""
        return x.flip(dim) if self.reversed_order else x

    def _places(self, table: Tensor, start: int, count: int) -> Tensor:
        """Rows start..start+count-1 of a table (T, ...) that lies in image order, counted in the block's order."""
        if not self.reversed_order:
            return table[start : start + count]
        return table[len(table) - start - count : len(table) - start].flip(0)

    def _turn_all(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        return {number: self.turn(state) for number, state in states.items()}
