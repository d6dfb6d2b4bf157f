"""`conv3`: one 3x3 convolution on the grid of tokens, which keeps spatial relations (iREPA, arXiv 2512.10794, section 4)."""

from torch import Tensor, nn

from rrepa_lab.align.projector_kind import PROJECTORS, ProjectorKind, Sizes, as_map


class Conv3(nn.Module):
    """(B, T, D) -> (B, T, E); zeros beyond the edge."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.side = sizes.side
        self.conv = nn.Conv2d(sizes.width, sizes.dim, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Features of all tokens, in row-major order as they came."""
        return self.conv(as_map(tokens, self.side)).flatten(2).transpose(1, 2)


PROJECTORS.register("conv3")(
    ProjectorKind(
        make=Conv3, last="conv.bias", products=lambda sizes: 9 * sizes.width * sizes.dim, kept=lambda sizes: 0, grid=True
    )
)
