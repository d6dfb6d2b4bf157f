"""The weights of a training with their optimizer and their average: in one process, copied in several, or sharded over them.

Sharding is FSDP2 (`torch.distributed.fsdp.fully_shard`): each process keeps its part of the parameters, gradients, moments and
average, and a block's parameters are whole within a call of the block. The one-pass form of a strategy (`align.segments`)
takes vector-Jacobian products with respect to parameters outside of such calls, so sharded trainings take the strategies' plain
passes, whose gradients are the same.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel

from rrepa_lab.align.projector import Projectors
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.runs.run import Run, modules
from rrepa_lab.training.objective import Objective
from rrepa_lab.training.schedule import ema_update
from rrepa_lab.training.state import Checkpoint


class Weights:
    """The objective of a training, its optimizer and its average.

    Args:
        run: a fresh one, whose weights they begin with where there is no `state`.
        accelerator: of accelerate; its processes are those of the training.
        state: to go on from, whole in every process, whatever number of processes wrote it.

    Attributes: objective (flow and projectors), optimizer.
    """

    def __init__(self, run: Run, accelerator: Any, state: Checkpoint | None) -> None:
        self.run, self.accelerator = run, accelerator
        t = run.config.train
        self.sharded = t.parallel == "fsdp" and accelerator.num_processes > 1
        self.objective = Objective(run.flow, run.projectors, run.config.align, plain=self.sharded)
        self.average = AveragedModel(self.objective, multi_avg_fn=partial(ema_update, limit=t.ema_decay))
        if state:
            self.objective.load_state_dict(state.objective)
            self.average.load_state_dict(state.average)
        self.average.to(accelerator.device)
        run.flow.configure_layers(t.checkpointing, t.compile)  # after the copy for the average was made
        if self.sharded:
            self.objective.to(accelerator.device)
            _shard(self.objective, accelerator.device)
            _shard(cast(Objective, self.average.module), accelerator.device)
        optimizer = torch.optim.AdamW(
            self.objective.parameters(), lr=t.lr, betas=t.betas, weight_decay=t.weight_decay, fused=True
        )
        if state:
            optimizer.load_state_dict(_like(state.optimizer, list(self.objective.parameters())))
        if self.sharded:
            self.wrapped, self.optimizer = self.objective, optimizer
        else:
            self.wrapped, self.optimizer = accelerator.prepare(self.objective, optimizer)

    def exchange(self, on: bool) -> AbstractContextManager[Any]:
        """Within it, a backward pass adds to the gradients; they are averaged over the processes where `on` is set."""
        if self.sharded:
            cast(Any, self.objective).set_requires_gradient_sync(on)
            return nullcontext()
        return nullcontext() if on else cast(AbstractContextManager[Any], self.accelerator.no_sync(self.wrapped))

    def clip(self, most: float) -> Tensor:
        """Scale the gradients to a norm of at most `most`; returns the norm before, ()."""
        if not self.sharded:
            return cast(Tensor, self.accelerator.clip_grad_norm_(self.objective.parameters(), most))
        norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), most)
        return cast(DTensor, norm).full_tensor()

    @property
    def averaged_flow(self) -> TarFlow:
        """The flow with the averaged weights, which each step changes."""
        return cast(Objective, self.average.module).flow

    def averaged(self) -> Run:
        """The averaged weights as a run; whole ones in every process, which all must call this where they are sharded."""
        average, run = cast(Objective, self.average.module), self.run
        if not self.sharded:
            return replace(run, flow=average.flow, projectors=average.projectors)
        values = gathered(modules(average.flow, average.projectors).state_dict())
        whole = replace(run, flow=TarFlow(run.config.flow), projectors=_projectors_like(run))
        modules(whole.flow, whole.projectors).load_state_dict(values)
        return whole.to(self.accelerator.device)

    def state_dicts(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint holds of them, whole; all processes must call this where they are sharded."""
        values = {
            "objective": self.objective.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return cast(dict[str, dict[str, Any]], gathered(values)) if self.sharded else values

    def bytes(self) -> dict[str, int]:
        """Bytes that this process keeps of parameters, gradients, optimizer and average."""
        own = list(self.objective.parameters())
        moments = [value for values in self.optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
        return {
            "parameters": _bytes(own),
            "gradients": _bytes([p.grad for p in own if p.grad is not None]),
            "optimizer": _bytes(moments),
            "average": _bytes(list(self.average.parameters())),
        }


def gathered(values: Any) -> Any:
    """Nested dictionaries and lists with every sharded tensor whole, on the CPU; all processes must call it."""
    if isinstance(values, DTensor):
        return values.full_tensor().cpu()
    if isinstance(values, dict):
        return {key: gathered(value) for key, value in values.items()}
    return [gathered(value) for value in values] if isinstance(values, list) else values


def _shard(objective: Objective, device: torch.device) -> None:
    """Shard the parameters over all processes: each block by itself, the projectors together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in objective.flow.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def _like(state: dict[str, Any], parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
    """The state of an optimizer with each moment sharded as its parameter is."""
    values = {
        number: {
            name: distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
            if isinstance(p := parameters[number], DTensor) and value.shape == p.shape
            else value
            for name, value in moments.items()
        }
        for number, moments in state["state"].items()
    }
    return state | {"state": values}


def _projectors_like(run: Run) -> Projectors:
    """Projectors of the sizes of a run's, with other weights."""
    return Projectors.of(run.config.align, run.config.flow, run.projectors.dims)


def _bytes(tensors: list[Any]) -> int:
    whole = [value.to_local() if isinstance(value, DTensor) else value for value in tensors]
    return sum(value.numel() * value.element_size() for value in whole)
