"""`mlp`: three linear layers with SiLU between, as in REPA and R-REPA (arXiv 2511.22345, section 4)."""

from torch import nn

from rrepa_lab.align.projector_kind import PROJECTORS, ProjectorKind, Sizes


class Mlp(nn.Sequential):
    """Three linear layers, (B, T, D) -> (B, T, E)."""

    def __init__(self, sizes: Sizes) -> None:
        width, hidden, dim, _ = sizes
        super().__init__(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim))


PROJECTORS.register("mlp")(
    ProjectorKind(
        make=Mlp,
        last="4.bias",
        products=lambda sizes: sizes.width * sizes.hidden + sizes.hidden**2 + sizes.hidden * sizes.dim,
        kept=lambda sizes: 4 * sizes.hidden,
    )
)
