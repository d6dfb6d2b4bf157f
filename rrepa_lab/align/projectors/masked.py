"""`masked`: a small Transformer of which a part of the tokens is hidden in training (PixelREPA, arXiv 2603.14366).

A projector that sees every token by itself lets a flow copy the teacher's feature into each state. Here the target of a hidden
token must be read from the others, so that a state is asked for what it shares with its surroundings. The sizes are ours: two
layers of `align.projector_width`, heads of 64 numbers, learned positions.
"""

import torch
from torch import Tensor, nn

from rrepa_lab.align.projector_kind import PROJECTORS, ProjectorKind, Sizes

LAYERS, HEAD = 2, 64
MLP_RATIO = 4


class Masked(nn.Module):
    """(B, T, D) -> (B, T, E); in place of a hidden token stands a learned vector."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, hidden, dim, side = sizes
        self.enter = nn.Linear(width, hidden)
        self.hidden_token = nn.Parameter(torch.empty(hidden).normal_(std=0.02))
        self.position = nn.Parameter(torch.empty(side**2, hidden).normal_(std=0.02))
        heads = hidden // HEAD if hidden % HEAD == 0 else 1
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(hidden, heads, MLP_RATIO * hidden, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(LAYERS)
            )
        )
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of all tokens.

        Args:
            mask: (B, T) bool, which tokens are hidden; none by default.
        """
        entered = self.enter(tokens)
        if mask is not None:
            entered = torch.where(mask[..., None], self.hidden_token.to(entered.dtype), entered)
        return self.out(self.norm(self.layers(entered + self.position)))


def _products(sizes: Sizes) -> int:
    layer = (4 + 2 * MLP_RATIO) * sizes.hidden**2 + 2 * sizes.side**2 * sizes.hidden
    return sizes.width * sizes.hidden + LAYERS * layer + sizes.hidden * sizes.dim


PROJECTORS.register("masked")(
    ProjectorKind(
        make=Masked,
        last="out.bias",
        products=_products,
        kept=lambda sizes: (LAYERS * (8 + 2 * MLP_RATIO) + 2) * sizes.hidden,
        masks=True,
        grid=True,
    )
)
