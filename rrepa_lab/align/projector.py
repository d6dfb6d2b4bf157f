"""From the flow's hidden states to the encoder's feature space, and how near they come."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F


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


def similarity(projected: Tensor, target: Tensor) -> Tensor:
    """Mean cosine over patches of (B, n, E) features -> (B,); in float32 at least."""
    wide = projected if projected.dtype == target.dtype else projected.float()
    return F.cosine_similarity(wide, target.to(wide.dtype), dim=-1).mean(dim=1)


def alignment_loss(similarities: Mapping[str, Tensor]) -> Tensor:
    """Minus the similarity (B,) of each aligned tap, averaged over taps and images -> (); without lambda."""
    terms = [-value.mean() for value in similarities.values()]
    return sum(terms[1:], terms[0]) / len(terms)
