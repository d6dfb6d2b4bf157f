"""One autoregressive affine block: z_i = (x_i - mu(x_<i)) * exp(-alpha(x_<i)), and its inverse.

A block takes and gives tokens in image order; it works in image order or in reversed order.
"""

from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.flow.condition import Condition, Guidance
from rrepa_lab.flow.contract import Affine, BlockOutput
from rrepa_lab.flow.decode.incremental import IncrementalDecoder
from rrepa_lab.flow.tarflow.config import FlowConfig
from rrepa_lab.flow.tarflow.transformer import CausalTransformer, GrowingCache, TransformerOutput, axial_angles

P = ParamSpec("P")
R = TypeVar("R")


class AffineBlock(nn.Module):
    """A causal Transformer that predicts shift mu and log-scale alpha of each token from the tokens before it.

    Args:
        config: of the flow.
        reversed_order: whether the block works from the last token of the image to the first.
        layers: of its Transformer; by default those of a flow whose blocks are all alike.

    Example:
        >>> block = AffineBlock(FlowConfig(classes=10), reversed_order=False)
        >>> block(block.encode, torch.zeros(2, 16, 4), Condition(torch.eye(10)[:2])).z.shape
        torch.Size([2, 16, 4])
    """

    angles: Tensor | None  # of rotary positions

    def __init__(self, config: FlowConfig, reversed_order: bool, layers: int | None = None) -> None:
        super().__init__()
        c = config
        self.tokens, self.reversed_order, self.volume_preserving = c.tokens, reversed_order, c.volume_preserving
        self.proj_in = nn.Linear(c.token_size, c.width)
        self.pos_embed = nn.Parameter(torch.randn(c.tokens, c.width) * 1e-2) if c.positions == "learned" else None
        self.class_embed = nn.Parameter(torch.randn(c.classes, c.width) * 1e-2) if c.classes else None
        angles = axial_angles(c.side, c.head_width) if c.positions == "rotary" else None
        self.register_buffer("angles", angles, persistent=False)
        depth = c.layers_of(1) if layers is None else layers
        self.transformer = CausalTransformer(depth, c.width, c.head_width, c.mlp_ratio, c.mlp)
        self.proj_out = nn.Linear(c.width, c.token_size if c.volume_preserving else 2 * c.token_size)
        # both zero, so that a fresh block is the identity (the public code leaves the bias as it comes)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, operation: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """What an operation on this block returns; see `flow.contract.Block`."""
        return operation(*args, **kwargs)

    def encode(self, x: Tensor, condition: Condition, keep: Collection[int] = ()) -> BlockOutput:
        """Encode: (B, T, P) -> z (B, T, P), logdet (B,) in nats, outputs (B, T, D) of the layers in `keep`."""
        mu, alpha, states = self.affine(x, condition, keep)
        return BlockOutput((x - mu) * torch.exp(-alpha), -alpha.sum(dim=(1, 2)), states)

    def affine(self, x: Tensor, condition: Condition, keep: Collection[int] = ()) -> Affine:
        """mu and alpha of all tokens in one parallel pass, given all tokens (B, T, P).

        The guided mu and alpha of a token depend on the tokens before it alone, as the plain ones do: so the guided
        map, too, is inverted exactly and in parallel.
        """
        batch, tokens, _ = x.shape
        guidance, embedded = condition.guidance, self.embed_label(condition)
        given = guidance.repeat_for_cfg(self.to_block_order(x))
        out = self.run_transformer(given, 0, embedded, guidance.temperatures(x), keep=keep)
        # the prediction made at token i is for token i + 1; the first token passes unchanged
        shifted = (F.pad(p[:, :-1], (0, 0, 1, 0)) for p in self.predict(out.hidden, 0, tokens, guidance))
        mu, alpha = (self.to_block_order(p) for p in shifted)
        return Affine(mu, alpha, self._all_to_image_order({number: state[:batch] for number, state in out.states.items()}))

    def features(self, x: Tensor, condition: Condition, layers: Collection[int]) -> dict[int, Tensor]:
        """Outputs (B, T, D) of these layers, in image order; layers above the highest are not run."""
        embedded = self.embed_label(condition.without_guidance())
        out = self.run_transformer(self.to_block_order(x), 0, embedded, keep=layers, upto=max(layers))
        return self._all_to_image_order(out.states)

    def invert(self, z: Tensor, condition: Condition, keep: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Generate: (B, T, P) -> x (B, T, P) and layer outputs, token after token; plain and differentiable.

        This is the token loop of the public implementations: a cache that is concatenated anew for every token, and a pass
        of its own for each branch of the guidance. `flow.decode` has the fast methods.

        Args:
            keep: layers whose outputs are wanted, of the conditional branch.
        """
        z, guidance = self.to_block_order(z), condition.guidance
        tokens, branches = z.shape[1], guidance.branches
        of_label, divisor = self.embed_label(condition), guidance.temperatures(z)
        embedded = [None] * branches if of_label is None else of_label.chunk(branches)
        divisors = [None] * branches if divisor is None else divisor.chunk(branches)
        caches = [GrowingCache() for _ in range(branches)]
        xs = [z[:, :1]]
        states: dict[int, list[Tensor]] = {number: [] for number in keep}
        # the last token is processed only if its features are wanted: nothing is predicted from it
        for i in range(tokens if keep else tokens - 1):
            outs = [self.run_transformer(xs[-1], i, embedded[b], divisors[b], caches[b], keep) for b in range(branches)]
            for number, state in outs[0].states.items():
                states[number].append(state)
            if i + 1 < tokens:
                mu, alpha = self.predict(torch.cat([out.hidden for out in outs]), i, tokens, guidance)
                xs.append(mu + torch.exp(alpha) * z[:, i + 1 : i + 2])
        kept = self._all_to_image_order({number: torch.cat(parts, dim=1) for number, parts in states.items()})
        return self.to_block_order(torch.cat(xs, dim=1)), kept

    def decoder(self, rows: int, divisor: Tensor | None) -> IncrementalDecoder:
        """Processes a few tokens at a time, in this block's own order, from what `embed_tokens` gives."""
        angles = None if self.angles is None else self.to_block_order(self.angles, dim=0)
        return IncrementalDecoder(self.transformer, rows, self.tokens - 1, divisor, angles)

    def embed_tokens(self, x: Tensor, start: int, embedded: Tensor | None) -> Tensor:
        """Tokens (B, n, P) from a position on, in this block's own order -> the input of the first layer, (B, n, D)."""
        h = self.proj_in(x)
        if self.pos_embed is not None:
            h = h + self._rows_of(self.pos_embed, start, x.shape[1])
        return h if embedded is None else h + embedded

    def predict(self, hidden: Tensor, start: int, tokens: int, guidance: Guidance) -> tuple[Tensor, Tensor]:
        """mu and alpha (B, n, P) of the tokens that follow those at start..start+n-1, of `tokens` in all."""
        mu, alpha = self.project(hidden)
        weight = guidance.weight(start, tokens, mu)
        return guidance.combine(mu, weight), guidance.combine(alpha, weight)

    def embed_label(self, condition: Condition) -> Tensor | None:
        """The vector that the condition adds to every token, (branches * B, 1, D); None for a flow without classes."""
        if self.class_embed is None:
            return None
        weights = condition.branch_weights()
        assert weights is not None
        return (weights @ self.class_embed)[:, None]

    def run_transformer(
        self,
        x: Tensor,
        start: int,
        embedded: Tensor | None,
        temperature: Tensor | None = None,
        cache: GrowingCache | None = None,
        keep: Collection[int] = (),
        upto: int | None = None,
    ) -> TransformerOutput:
        """The Transformer on tokens (B, n, P) at positions start..start+n-1 in this block's own order."""
        h = self.embed_tokens(x, start, embedded)
        angles = None if self.angles is None else self._rows_of(self.angles, start, x.shape[1])
        return self.transformer(h, temperature, angles, cache, keep, upto)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states to (mu, alpha), in float32 at least, autocast or not."""
        with torch.autocast(hidden.device.type, enabled=False):
            out = self.proj_out(hidden.to(self.proj_out.weight.dtype))
        if self.volume_preserving:
            return out, torch.zeros_like(out)
        alpha, mu = out.chunk(2, dim=-1)
        return mu, alpha

    def to_block_order(self, x: Tensor, dim: int = 1) -> Tensor:
        """From image order to the block's order; the same from the block's order to image order."""
        return x.flip(dim) if self.reversed_order else x

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters: `in` (token projection, position and class tables), layer.<l>, `out`."""
        tables = [p for p in (self.pos_embed, self.class_embed) if p is not None]
        groups = {"in": [*self.proj_in.parameters(), *tables]}
        groups |= {f"layer.{number}": list(layer.parameters()) for number, layer in enumerate(self.transformer.layers, start=1)}
        return groups | {"out": list(self.proj_out.parameters())}

    def _rows_of(self, table: Tensor, start: int, count: int) -> Tensor:
        """Rows start..start+count-1, counted in the block's order, of a table (T, ...) in image order."""
        if not self.reversed_order:
            return table[start : start + count]
        return table[len(table) - start - count : len(table) - start].flip(0)

    def _all_to_image_order(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        return {number: self.to_block_order(state) for number, state in states.items()}
