"""How near projected features are to the teacher's, and the losses made of it; `align.similarity` names one."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.align.floors import teacher_cosine
from rrepa_lab.errors import unknown

TEMPERATURE = 0.1  # of `nt-xent`


def patch_cosine(projected: Tensor, target: Tensor, dims: Sequence[int] = ()) -> Tensor:
    """Mean cosine over patches of (B, n, E) features -> (B,); in float32 at least.

    Args:
        dims: E of each of several teachers whose features stand side by side: the mean of their cosines.

    Example:
        >>> patch_cosine(torch.ones(2, 4, 8), -torch.ones(2, 4, 8)).allclose(-torch.ones(2))
        True
    """
    projected, target = _wide(projected, target)
    return teacher_cosine(projected, target, dims).mean(dim=1)


def cosine_loss(projected: Tensor, target: Tensor, dims: Sequence[int] = ()) -> Tensor:
    """Minus the mean cosine over patches, (B,): the loss of REPA and R-REPA."""
    return -patch_cosine(projected, target, dims)


def nt_xent_loss(projected: Tensor, target: Tensor, dims: Sequence[int] = ()) -> Tensor:
    """Cross entropy of finding a token's own target among those of all tokens of its image, (B,), nats.

    The logits are cosines over a temperature of 0.1: NT-Xent (arXiv 2002.05709) with the other tokens as negatives, the second
    loss of REPA (arXiv 2410.06940). The mean over several teachers.
    """
    projected, target = _wide(projected, target)
    sizes = list(dims) or [target.shape[-1]]
    losses = []
    for own, other in zip(projected.split(sizes, dim=-1), target.split(sizes, dim=-1), strict=True):
        logits = F.normalize(own, dim=-1) @ F.normalize(other, dim=-1).transpose(1, 2) / TEMPERATURE  # (B, n, n)
        losses.append(-logits.log_softmax(dim=-1).diagonal(dim1=1, dim2=2).mean(dim=1))
    return torch.stack(losses).mean(dim=0)


# projected (B, n, E), target (B, n, E), E of each teacher -> loss of each image (B,)
LOSSES: Mapping[str, Callable[[Tensor, Tensor, Sequence[int]], Tensor]] = {"cosine": cosine_loss, "nt-xent": nt_xent_loss}


def check_loss(name: str) -> str:
    """The name itself; LabError for one that is not in `LOSSES`."""
    if name not in LOSSES:
        raise unknown("similarity", name, LOSSES)
    return name


def _wide(projected: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type, float32 at least."""
    wide = projected if projected.dtype == target.dtype and projected.dtype.itemsize >= 4 else projected.float()
    return wide, target.to(wide.dtype)
