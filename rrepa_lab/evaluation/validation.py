"""What a training measures of its averaged weights: on the validation split, and on as many training images beside it."""

import torch
from torch import Tensor

from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.splits import read_split, validation_split
from rrepa_lab.data.subset import whole
from rrepa_lab.evaluation.correct import correct
from rrepa_lab.flow.likelihood import nats_per_dim
from rrepa_lab.processes import shared
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.run import Run

IMAGES = 512  # of each split, at most
PART = 256  # images in one pass


class Validation:
    """nats/dim under the training noise, and the accuracy of one gradient step, of a flow on fixed images.

    The step reads the images under the noise of the run's `config.read`: clean ones unless it says otherwise. Averaged weights
    may have diverged for a while: an image whose scores are not finite counts as wrong, and the training goes on.
    The images are drawn once (class-balanced, seed 0) and the noise is the same every time, so that the values of a
    training can be compared with one another. Several processes share them.
    """

    def __init__(self, config: RunConfig, train: ImageSet, device: torch.device) -> None:
        self.config, self.device = config, device
        held_out = read_split(config.data, validation_split(config.data), train.classes)
        self.batches = {"held_out": whole(held_out, IMAGES), "train": whole(train, IMAGES)}
        self.encoded: dict[str, Tensor] = {}  # what the flow takes of them, without noise

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """held_out_nats_per_dim, held_out_accuracy (of a flow with classes), and the same for train."""
        found: dict[str, float] = {}
        for number, (name, batch) in enumerate(self.batches.items()):
            if name not in self.encoded:  # once: the space does not learn
                self.encoded[name] = run.space.encode(batch.x.to(self.device))
            x, y = self.encoded[name], batch.y.to(self.device)
            found[f"{name}_nats_per_dim"] = self._nats(run, x, y, number)
            if self.config.flow.classes:
                given = batch.x.to(self.device) if run.config.space.is_pixels else x
                found[f"{name}_accuracy"] = float(correct(run, given, y, overflows=True).double().mean())
        return found

    def _nats(self, run: Run, x: Tensor, y: Tensor, number: int) -> float:
        flow, space = run.flow, run.space
        noised = space.add_noise(x, generator(0, 3, number))
        known = self.config.flow.classes > 0

        def of_rows(rows: Tensor) -> Tensor:
            parts = [flow.log_prob(noised[part], y[part] if known else None) for part in rows.split(PART)]
            return nats_per_dim(torch.cat(parts), flow.config.dims)

        return float(shared(of_rows, len(noised)).mean())
