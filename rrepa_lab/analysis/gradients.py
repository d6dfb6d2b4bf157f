"""Gradients of the losses of one batch by parameter group, in float64: what `routing` and `gradient_ratio` measure with."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from rrepa_lab.align.aligner import Aligner, layer_taps
from rrepa_lab.align.projector import Projectors
from rrepa_lab.data.loaders import seeded
from rrepa_lab.data.splits import class_names
from rrepa_lab.data.subset import whole
from rrepa_lab.flow.contract import ParameterGroup
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.flow.taps import Tap, Taps
from rrepa_lab.runs.config import RunConfig, complete
from rrepa_lab.runs.run import Run, build


def double_copy(source: Run | RunConfig, seed: int) -> Run:
    """A float64 run with gradients switched on; a loaded one is copied, a fresh one perturbed."""
    if isinstance(source, Run):
        run = build(source.config.override({"align.strategy": "none"}), source.classes)
        run.flow.load_state_dict(source.flow.state_dict())
        run.flow.double()
        return Run(run.flow, source.config, source.classes, run.projectors)
    classes = class_names(source.data)
    source = complete(source, classes)
    fresh = build(source.override({"align.strategy": "none", "train.seed": seed}), classes)
    fresh.flow.double()
    perturb(fresh.flow, seed)
    return Run(fresh.flow, source, fresh.classes, fresh.projectors)


@dataclass(frozen=True)
class AlignedBatch:
    """A float64 run with test images, their labels and targets, and the layers whose alignment is measured."""

    run: Run
    taps: list[Tap]
    x: Tensor  # (B, C, H, W)
    y: Tensor | None  # (B,)
    target: Tensor  # (B, T, E), of several teachers side by side
    dims: tuple[int, ...]  # E of each teacher
    seed: int

    @classmethod
    def of(cls, source: Run | RunConfig, taps: Taps | None, images: int, seed: int) -> Self:
        """Of a run, or of a configuration with perturbed fresh weights; the taps as in `routing`."""
        run = double_copy(source, seed)
        wanted = layer_taps(run.flow.resolve(taps or run.config.align.taps or "block.*.layer.1"))
        x, y = run.data("test", images)
        shown = x if run.config.data.teacher_size is None else whole(run.teacher_images("test", run.images("test")), images).x
        aligner = run.aligner()
        assert aligner.targets is not None
        target = aligner.target(shown.to(x.device).double()).double()
        x = run.space.encode(x).double()
        return cls(run, wanted, x, y if run.flow.config.classes else None, target, aligner.targets.dims, seed)

    def projectors(self, tap: Tap) -> Projectors:
        """Fresh ones for one tap, drawn from the seed."""
        with seeded(self.seed):
            return Projectors.of(self.run.config.align, self.run.config.flow, self.dims, [tap.name]).double()

    def gradients(
        self, strategy: str, tap: Tap, projectors: Projectors, groups: list[ParameterGroup], refinements: int = 0
    ) -> list[Tensor]:
        """Gradient of the alignment loss at one tap: a flat vector for each group, zero where the graph does not reach."""
        align = self.run.config.align.model_copy(update={"strategy": strategy, "refinements": refinements})
        aligner = Aligner(align, projectors)
        out = aligner(self.run.flow, self.x, self.y, self.target, [] if strategy == "none" else [tap.name])
        return group_gradients(out.loss, groups) if out.similarity else [
            torch.zeros(sum(p.numel() for p in group.parameters), dtype=self.x.dtype, device=self.x.device) for group in groups
        ]  # fmt: skip


def group_gradients(loss: Tensor, groups: list[ParameterGroup], keep: bool = False) -> list[Tensor]:
    """Gradient of a loss: a flat vector for each group, which may overlap; zero where the graph does not reach.

    Args:
        keep: keep the graph for another gradient.
    """
    parameters = list(dict.fromkeys(parameter for group in groups for parameter in group.parameters))
    found = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True, materialize_grads=True)
    by_parameter: dict[nn.Parameter, Tensor] = dict(zip(parameters, found, strict=True))
    return [torch.cat([by_parameter[parameter].flatten() for parameter in group.parameters]) for group in groups]
