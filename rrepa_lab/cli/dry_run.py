"""`rrepa-lab train --dry-run`: the configuration, the data, and what the training takes."""

import argparse
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.printing import hint, print_facts

if TYPE_CHECKING:
    from rrepa_lab.bench.estimate import Estimate
    from rrepa_lab.bench.footprint import Footprint
    from rrepa_lab.runs.config import RunConfig
    from rrepa_lab.space.config import SpaceConfig


def print_plan(args: argparse.Namespace, config: "RunConfig") -> None:
    """Print what is known before a training; nothing is written, trained or downloaded.

    Raises: LabError for what would end the training at its start, and for an unknown GPU.
    """
    from rrepa_lab.bench.estimate import estimate
    from rrepa_lab.bench.gpus import gpus
    from rrepa_lab.checks import real_number
    from rrepa_lab.data.facts import describe_data
    from rrepa_lab.data.splits import available_splits
    from rrepa_lab.runs.config import complete
    from rrepa_lab.runs.describe import describe_config

    gpu = gpus(args.gpu) if args.gpu else None
    utilization = real_number("--utilization", args.utilization, 0.01, 1)
    known = config.data.path is not None or bool(available_splits(config.data))
    counted = config.align.counted(config.flow.blocks, config.flow.layers)
    config = complete(config) if known else config.model_copy(update={"align": counted})
    _check_space(config.space)
    if args.init:
        _check_init(args.init, config)
    facts: dict[str, Any] = describe_config(config)
    images = None
    if known:
        facts |= describe_data(config.data)
        images = _train_images(config)
    found = estimate(config, images=images)
    costs = _costs(found)
    if gpu is not None:
        costs["gpu"] = _on_gpus(found, *gpu, utilization)
    if (timing := _timing(args, found)) is not None:
        costs["here"] = timing
    if args.json:
        print_facts({**facts, **costs, "config": config.to_dict()}, True)
        return
    print_facts(facts | _words(costs), False)
    if gpu is None:
        hint(args, "hours on GPUs: add --gpu h100, or --gpu 8xa100")


def _check_space(space: "SpaceConfig") -> None:
    from rrepa_lab.space.autoencoder import TRAINED_HERE, folder_of, read_autoencoder

    if space.kind in TRAINED_HERE and space.weights is not None:
        read_autoencoder(folder_of(space), space.kind)


def _check_init(name: str, config: "RunConfig") -> None:
    from rrepa_lab.runs.init import check_geometry
    from rrepa_lab.runs.store import load

    check_geometry(config, load(name))


def _train_images(config: "RunConfig") -> int:
    from rrepa_lab.data.splits import load_split

    return len(load_split(config.data, "train"))


def _costs(found: "Estimate") -> dict[str, Any]:
    """Numbers for programs: operations, bytes."""
    from rrepa_lab.bench.estimate import cache_bytes

    batch, teacher = found.config.train.batch, found.teacher
    passes = None if teacher is None else teacher.operations
    return {
        "projector_parameters": found.parameters[1],
        "flops_per_step": found.step_operations,
        "flops_of": {
            "flow": batch * found.work.flow,
            "projectors": batch * found.work.projectors,
            "teacher": batch * passes if passes is not None and found.teacher_runs else 0.0,
            "strategy": found.work.strategy,
        },
        "flops_per_teacher_image": passes,
        "teacher_runs_each_step": found.teacher_runs,
        "flops": found.step_operations * found.config.train.steps,
        "memory": {**found.memory._asdict(), "total": found.memory.total},
        "caches": cache_bytes(found),
    }


def _on_gpus(found: "Estimate", count: int, gpu: Any, utilization: float) -> dict[str, Any]:
    memory = found.memory_on(count)
    return {
        "gpu": gpu.title, "count": count, "hours": found.hours_on(gpu, count, utilization), "utilization": utilization,
        "peak_tflops": gpu.tflops, "source": gpu.source, "memory_per_gpu": memory.total, "memory_of_gpu": gpu.memory * 1e9,
        "fits": memory.total <= 0.95 * gpu.memory * 1e9, "advice": _advice(found, memory),
    }  # fmt: skip


def _advice(found: "Estimate", memory: "Footprint") -> str:
    """What takes less memory, by what most of it is for."""
    t = found.config.train
    if memory.activations > memory.total / 2:
        ways = [] if t.checkpointing else ["train.checkpointing=true"]
        return f"; set {' or '.join([*ways, f'train.accumulate={2 * t.accumulate}'])}"
    return "" if t.parallel == "fsdp" else "; set train.parallel=fsdp, with several GPUs"


def _timing(args: argparse.Namespace, found: "Estimate") -> dict[str, Any] | None:
    """Hours here, if they are asked for, or a step is short."""
    from rrepa_lab.bench.estimate import QUICK, time_steps
    from rrepa_lab.runs.store import pick_device

    device = pick_device(args.device)
    if args.time is False or (args.time is None and found.step_operations >= QUICK):
        return None
    timing = time_steps(found, device)
    return {
        "hours": timing.hours(found.config.train.steps), "seconds_per_step": timing.seconds, "timed_steps": timing.steps,
        "precision": timing.precision, "device": timing.device,
    }  # fmt: skip


# --- words ----------------------------------------------------------------------------------------------------------------


def _words(costs: dict[str, Any]) -> dict[str, str]:
    """The costs for people."""
    parts = costs["flops_of"]
    lines = {
        "operations": f"{_flop(costs['flops_per_step'])} a step: flow {_flop(parts['flow'])} ({parts['strategy']})"
        + (f", projectors {_flop(parts['projectors'])}" if parts["projectors"] else "")
        + (f", teacher {_flop(parts['teacher'])}" if parts["teacher"] else "")
        + f"; {_flop(costs['flops'])} in all",
        "memory": _memory(costs["memory"]),
    }
    if costs["flops_per_teacher_image"] is not None and not costs["teacher_runs_each_step"]:
        lines["teacher"] = f"{_flop(costs['flops_per_teacher_image'])} for each view of an image, once: its features are kept"
    for name, size in costs.get("caches", {}).items():
        lines[f"{name} of the training images"] = f"{_bytes(size)}"
    if (one := costs.get("gpu")) is not None:
        fits = "fits" if one["fits"] else f"does NOT fit{one['advice']}"
        lines[f"on {one['count']} x {one['gpu']}"] = (
            f"{_hours(one['hours'])} at an assumed {one['utilization']:.0%} of {one['peak_tflops']:g} TFLOP/s (bf16 dense, "
            f"{one['source']}); {_bytes(one['memory_per_gpu'])} of {_bytes(one['memory_of_gpu'])} each: {fits}"
        )
    if (here := costs.get("here")) is not None:
        lines["on this machine"] = (
            f"{_hours(here['hours'])}: {here['seconds_per_step']:.3g} s a step, the median of {here['timed_steps']} on "
            f"{here['device']} in {here['precision']}, without teacher, data and validation"
        )
    return lines


def _memory(parts: dict[str, float]) -> str:
    named = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items() if name != "total")
    return f"{_bytes(parts['total'])} in one process: {named}"


def _flop(value: float) -> str:
    for unit, size in (("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e6:.3g} MFLOP"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _hours(value: float) -> str:
    if value < 1:
        return f"{value * 60:.0f} minutes" if value * 60 >= 1.5 else f"{value * 3600:.0f} seconds"
    return f"{value:.1f} hours" if value < 72 else f"{value / 24:.0f} days"
