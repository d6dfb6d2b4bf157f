"""`linear`: one linear layer; the flow itself must hold what the teacher knows."""

from torch import nn

from rrepa_lab.align.projector_kind import PROJECTORS, ProjectorKind, Sizes


class Linear(nn.Linear):
    """(B, T, D) -> (B, T, E)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.width, sizes.dim)


PROJECTORS.register("linear")(
    ProjectorKind(make=Linear, last="bias", products=lambda sizes: sizes.width * sizes.dim, kept=lambda sizes: 0)
)
