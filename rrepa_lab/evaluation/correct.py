"""At which place a run puts the label of an image, found by all processes together."""

import torch
from torch import Tensor

from rrepa_lab.analysis.classify import classify
from rrepa_lab.analysis.noise import NoiseSamples, image_noise
from rrepa_lab.flow.finite import NotFiniteError
from rrepa_lab.processes import shared
from rrepa_lab.runs.run import Run


def label_ranks(run: Run, x: Tensor, y: Tensor, method: str = "gradient", seed: int = 0, overflows: bool = False) -> Tensor:
    """How many classes score above the label of each image (B,), int64: 0 where it is classified as its label.

    Args:
        x: (B, C, H, W), as `rl.classify` takes them.
        y: (B,) labels.
        method: of `rl.classify`.
        seed: of the noise that the run's `config.read` sets.
        overflows: an image whose scores are not finite has its label behind all classes; else NotFiniteError.
    """

    def of_rows(rows: Tensor) -> Tensor:
        try:
            found = classify(run, x[rows], method, noise=NoiseSamples(seed=seed))
        except NotFiniteError as error:
            if not overflows:
                raise
            fine = torch.ones(len(rows), dtype=torch.bool)
            fine[error.rows or slice(None)] = False
            ranks = torch.full((len(rows),), run.flow.config.classes, device=y.device)
            if bool(fine.any()):
                ranks[fine.to(y.device)] = of_rows(rows[fine])
            return ranks
        own = found.scores.gather(1, y[rows][:, None])
        ranks = (found.scores > own).sum(dim=1)
        return torch.where(found.label == y[rows], 0, ranks.clamp(min=1))  # of equal scores the first class wins

    # the noise on an image depends on its place among those that are classified together
    return shared(of_rows, len(x)) if image_noise(run).n == 0 else of_rows(torch.arange(len(x)))


def correct(run: Run, x: Tensor, y: Tensor, method: str = "gradient", seed: int = 0, overflows: bool = False) -> Tensor:
    """Whether each image is classified as its label (B,), bool; the arguments are those of `label_ranks`."""
    return label_ranks(run, x, y, method, seed, overflows) == 0
