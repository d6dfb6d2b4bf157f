"""Memory of each process of a training in two processes: weights copied (ddp), or sharded over them (fsdp)."""

import gc
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rrepa_lab.bench.timing import STRICT_MALLOC
from rrepa_lab.errors import LabError
from rrepa_lab.runs.config import RunConfig, complete
from rrepa_lab.runs.presets import preset
from rrepa_lab.runs.run import build
from rrepa_lab.training.processes import accelerator_on
from rrepa_lab.training.weights import Weights

PROCESSES = 2
CASES = ("ddp", "fsdp")
WIDTH, BLOCKS, LAYERS = 384, 4, 4
IMAGES = 4  # of a process and step: few, so that the weights are most of the memory
STEPS = 3


def memory_by_process(repeats: int = 1, device: str = "cpu") -> pd.DataFrame:
    """Bytes that each of two processes keeps after a few steps of a flow without alignment, random weights and images.

    Args:
        repeats: takes none: bytes do not vary, except the resident memory, by little.
        device: cpu, or cuda with a GPU for each process.

    Returns: columns case (ddp, fsdp), parameters_mib, gradients_mib, optimizer_mib, average_mib, kept_mib (their sum), rss_mib
        (resident memory that the process gained until the last step), peak_mib (the most it gained, which sharding reaches
        while it begins: weights are drawn whole), ratio (of kept_mib to ddp), images (of a process), parameters (of the flow,
        in all). Each is the most of all processes; on a GPU resident memory is that of the device.

    Raises: LabError where the processes end with an error.
    """
    rows = [{"case": case} | _measured(case, device) for case in CASES]
    table = pd.DataFrame(rows)
    ratio = table["kept_mib"] / table["kept_mib"].iloc[0]
    flow = f"{BLOCKS} blocks x {LAYERS} layers, width {WIDTH}, 16 tokens"
    return table.assign(ratio=ratio, reference=CASES[0], images=IMAGES, steps=STEPS, flow=flow)


def _measured(case: str, device: str) -> dict[str, float]:
    """The most of all processes; starts them."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES), "-m"]
        env = os.environ | STRICT_MALLOC | {"OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", *launch, "rrepa_lab.bench.processes", case, device, folder]
        done = subprocess.run(words, check=False, capture_output=True, text=True, env=env)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if re.match(r"(\[rank\d+\]: ?)?[\w.]*Error: ", line)]
            raise LabError(f"{PROCESSES} processes could not be measured: {said[0] if said else 'no message'}")
        parts = [json.loads(path.read_text("utf-8")) for path in Path(folder).glob("*.json")]
    return {name: max(part[name] for part in parts) for name in parts[0]}


def _settings(case: str) -> RunConfig:
    sizes = {"flow.width": WIDTH, "flow.blocks": BLOCKS, "flow.layers": LAYERS}
    return complete(preset("digits-none").override({**sizes, "train.parallel": case, "train.batch": IMAGES * PROCESSES}))


def main(case: str, device: str, folder: str) -> None:
    """In each process: train a few steps, and write what is kept to a file of this process."""
    config = _settings(case)
    accelerator = accelerator_on(torch.device(device))
    importlib.import_module("torch.distributed.fsdp")  # code that a sharded training loads is no memory of its weights
    before, peak = _resident()
    weights = Weights(build(config, [str(label) for label in range(config.flow.classes)]), accelerator, None)
    for number in range(STEPS):
        draw = torch.Generator().manual_seed(number)
        x = torch.randn(IMAGES, *config.flow.image_shape, generator=draw).to(accelerator.device)
        y = torch.arange(IMAGES, device=accelerator.device) % config.flow.classes
        with weights.exchange(True):
            accelerator.backward(weights.wrapped(x, y, None).total)
        weights.clip(config.train.grad_clip_norm)
        weights.optimizer.step()
        weights.average.update_parameters(weights.objective)
        kept = weights.bytes()
        weights.optimizer.zero_grad()
    found: dict[str, Any] = {f"{name}_mib": size / 2**20 for name, size in kept.items()}
    found |= {"kept_mib": sum(kept.values()) / 2**20}
    now, most = _resident()
    found |= {"rss_mib": (now - before) / 2**20, "peak_mib": (most - peak) / 2**20}
    found["parameters"] = sum(p.numel() for p in weights.objective.parameters())
    (Path(folder) / f"{accelerator.process_index}.json").write_text(json.dumps(found), "utf-8")
    torch.distributed.destroy_process_group()


def _resident() -> tuple[int, int]:
    """Bytes of device memory on a GPU, else of resident memory: now, and the most so far."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    import resource

    import psutil

    gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return psutil.Process().memory_info().rss, peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
