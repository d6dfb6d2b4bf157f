"""From the flow's hidden states to the teacher's feature space."""

from torch import Tensor, nn


class Projector(nn.Sequential):
    """Three linear layers with SiLU between, (B, T, D) -> (B, T, E); one for each aligned tap (arXiv 2511.22345)."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim))


class Projectors(nn.ModuleDict):
    """Projectors by tap name ("block.4.layer.2")."""

    def __init__(self, taps: list[str], width: int, hidden: int, dim: int) -> None:
        # a module's name may not contain a dot
        super().__init__({tap.replace(".", "_"): Projector(width, hidden, dim) for tap in taps})

    def project(self, tap: str, features: Tensor) -> Tensor:
        """Features (B, T, D) of a tap -> (B, T, E)."""
        return self[tap.replace(".", "_")](features)

    @property
    def taps(self) -> list[str]:
        """The taps that have a projector."""
        return [name.replace("_", ".") for name in self]
