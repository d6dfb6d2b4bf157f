"""The figures this kit is held to, each a ratio of two things run in alternation in one process.

Sizes, unless a row says otherwise: 8 blocks x 4 layers, width 256, 64 tokens, random weights, float32.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.projector import Projectors
from rrepa_lab.analysis.classify import classify
from rrepa_lab.bench.timing import STRICT_MALLOC, alternate, ceiling, operations, peak_bytes
from rrepa_lab.bench.train import step
from rrepa_lab.data.loaders import generator, seeded
from rrepa_lab.errors import LabError
from rrepa_lab.flow.decode.plan import DecodePlan, Decoding
from rrepa_lab.flow.tarflow.config import FlowConfig
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.runs.store import load
from rrepa_lab.sampling.calibrate import calibrate
from rrepa_lab.sampling.sample import noise
from rrepa_lab.training.objective import Objective

WIDE = FlowConfig(image_size=16, channels=3, patch_size=2, width=256, blocks=8, layers=4, classes=10)  # 64 tokens
LONG = FlowConfig(image_size=32, channels=3, patch_size=2, width=256, blocks=2, layers=4, classes=10)  # 256 tokens
GUIDANCE = 1.5
DIM = 192  # of the encoder's features, as small as the projectors (hidden width 256), so that the flow is what is timed


class Row(NamedTuple):
    """A figure: how many times faster (`faster`) or dearer (`cost`) `what` is than `against`."""

    what: str
    against: str
    kind: str  # faster | cost | error
    required: float
    aim: float
    values: list[float]  # ratio of each round; for an error the one number
    seconds: float = float("nan")
    against_seconds: float = float("nan")
    gflops: float = float("nan")  # achieved by `what`, 1e9 operations a second


def speed_table(repeats: int, device: str) -> pd.DataFrame:
    """The whole table.

    Returns: columns what, against, kind, ratio (median over rounds; an error as it is), low, high (over rounds), required,
        aim, met, seconds, against_seconds, gflops, part_of_ceiling (of the largest product of matrices).
    """
    top = ceiling(device)
    rows = []
    for part in (_sampling, _one_image, _reverse_gradient, _training, _classification):
        for row in part(repeats, device):
            middle = statistics.median(row.values)
            met = middle >= row.required if row.kind == "faster" else middle <= row.required
            rows.append({
                "what": row.what, "against": row.against, "kind": row.kind, "ratio": middle, "low": min(row.values),
                "high": max(row.values), "required": row.required, "aim": row.aim, "met": met, "seconds": row.seconds,
                "against_seconds": row.against_seconds, "gflops": row.gflops, "part_of_ceiling": 1e9 * row.gflops / top,
            })  # fmt: skip
    return pd.DataFrame(rows).assign(ceiling_gflops=top / 1e9)


def random_flow(config: FlowConfig, device: str = "cpu") -> TarFlow:
    """Random weights whose blocks do something and stay finite under guidance."""
    with seeded(0):
        flow = TarFlow(config)
        for number in range(1, config.blocks + 1):
            torch.nn.init.normal_(flow.block(number).proj_out.weight, std=0.01)
    return flow.to(device)


def _pair(times: dict[Any, list[float]], what: str, against: str, kind: str) -> tuple[list[float], float, float]:
    """Ratios by round and both medians."""
    mine, other = times[what], times[against]
    over, under = (other, mine) if kind == "faster" else (mine, other)
    middles = [statistics.median(times[name]) for name in (what, against)]
    return [a / b for a, b in zip(over, under, strict=True)], middles[0], middles[1]


@torch.no_grad()
def _sampling(repeats: int, device: str, images: int = 16) -> Iterator[Row]:
    flow = random_flow(WIDE, device).requires_grad_(False)
    z, y = noise(flow, range(images)).to(device), torch.arange(images, device=device) % 10
    x = flow.inverse(z, y).x
    for title, guidance, passes, loop, cost in (
        ("guided sampling, 16 images", GUIDANCE, 2, (1.8, 2.3), (1.6, 1.25)),
        ("unguided sampling, 16 images", 0.0, 1, (1.3, 1.7), (1.6, 1.25)),
    ):
        cases: dict[str, Callable[[], Any]] = {
            method: partial(flow.inverse, z, y, guidance, method=method) for method in ("sequential", "cached")
        }
        cases["encode"] = partial(_repeat, passes, flow, x, y)
        times = alternate(cases, 2 * repeats // passes, device)  # the shorter, the more often
        done = operations(cases["cached"])
        for against, words, kind, (required, aim) in (
            ("sequential", "plain token loop", "faster", loop),
            ("encode", f"{passes} encoding pass{'es' if passes > 1 else ''}", "cost", cost),
        ):
            ratios, mine, other = _pair(times, "cached", against, kind)
            yield Row(title, words, kind, required, aim, ratios, mine, other, done / mine / 1e9)


def _repeat(count: int, call: Callable[..., Any], *given: Any) -> None:
    for _ in range(count):
        call(*given)


@torch.no_grad()
def _one_image(repeats: int, device: str) -> Iterator[Row]:
    worst = 0.0
    trained = load("digits-reverse", device).flow
    for title, flow in (
        ("guided sampling, 1 image", random_flow(WIDE, device).requires_grad_(False)),
        ("guided sampling, 1 image, trained run (digits-reverse, 4 x 4 layers, width 64, 16 tokens)", trained),
    ):
        plan = calibrate(flow, GUIDANCE)
        z, y = noise(flow, [0]).to(device), torch.tensor([3], device=device)
        made: dict[str, Tensor] = {}

        def decode(
            method: str,
            flow: TarFlow = flow,
            z: Tensor = z,
            y: Tensor = y,
            made: dict[str, Tensor] = made,
            plan: DecodePlan = plan,
        ) -> None:
            made[method] = flow.inverse(z, y, GUIDANCE, method=Decoding(method, plan=plan)).x

        times = alternate({m: partial(decode, m) for m in ("sequential", "cached", "jacobi")}, 2 * repeats, device)
        for method in ("cached", "jacobi"):
            ratios, mine, other = _pair(times, method, "sequential", "faster")
            done = operations(partial(decode, method))
            yield Row(f"{title}: {method}", "plain token loop", "faster", 2, 4, ratios, mine, other, done / mine / 1e9)
            worst = max(worst, float((made[method] - made["sequential"]).abs().max()))
    yield Row("largest difference of two methods", "plain token loop", "error", 1e-4, 1e-5, [worst])


def _objective(config: FlowConfig, strategy: str, blocks: Sequence[int], device: str) -> Objective:
    align = AlignConfig.from_dict({"strategy": strategy, "blocks": list(blocks), "layers": [3], "projector_width": 256})
    flow = random_flow(config)
    with seeded(1):
        projectors = Projectors.of(align, config, DIM)
    return Objective(flow, projectors, align).to(device)


def training_step(case: str, device: str, images: int = 16) -> Callable[[], Any]:
    """A step by name: "none", "reverse", "bfloat16" of WIDE; "long reverse", "long reverse-exact" of LONG, 2 images at once.

    On a GPU the long ones take 64 images.
    """
    length, _, strategy = case.rpartition(" ")
    config, blocks = (LONG, (1, 2)) if length else (WIDE, (7, 8))
    if length:
        images = 2 if device == "cpu" else 64
    half = strategy == "bfloat16"
    objective = _objective(config, "none" if half else strategy, blocks, device)
    x = torch.randn(images, *config.image_shape, generator=generator(0)).to(device)
    y = (torch.arange(images) % config.classes).to(device)
    target = torch.randn(images, config.tokens, DIM, generator=generator(1)).to(device)

    def run() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            step(objective, x, y, target)

    return run


def memory(case: str, device: str) -> float:
    """Peak memory that a training step adds, in bytes; on a CPU in a process of its own."""
    if device != "cpu":
        return float(peak_bytes(training_step(case, device), device))
    code = (
        "import torch; from rrepa_lab.bench.speed import training_step; from rrepa_lab.bench.timing import peak_bytes; "
        f"torch.set_num_threads({torch.get_num_threads()}); print(peak_bytes(training_step({case!r}, 'cpu'), 'cpu'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | STRICT_MALLOC, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LabError(f"measuring memory failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return float(done.stdout)


def _reverse_gradient(repeats: int, device: str) -> Iterator[Row]:
    names = "long reverse", "long reverse-exact"
    cases = {name: training_step(name, device) for name in names}
    times = alternate(cases, max(1, repeats // 2), device)
    ratios, mine, other = _pair(times, *names, "faster")
    what, against = "a step with the accelerated reverse, 256 tokens, 2 blocks", "differentiating the token loop"
    required, aim = (15, 30) if device == "cpu" else (50, 100)
    yield Row(what, against, "faster", required, aim, ratios, mine, other, operations(cases[names[0]]) / mine / 1e9)
    part = memory(names[0], device) / memory(names[1], device)
    yield Row(f"{what}: peak memory", against, "cost", 0.25 if device == "cpu" else 0.5, 0.1, [part])


def _training(repeats: int, device: str) -> Iterator[Row]:
    cases = {name: training_step(name, device) for name in ("none", "reverse")}
    times = alternate(cases, 2 * repeats, device)
    ratios, mine, other = _pair(times, "reverse", "none", "cost")
    what, against = "training step, reverse on blocks 7 and 8 at layer 3", "plain likelihood step"
    done = {name: operations(call) for name, call in cases.items()}
    yield Row(what, against, "cost", 1.3, 1.2, ratios, mine, other, done["reverse"] / mine / 1e9)
    yield Row(f"{what}: operations", against, "cost", 1.3, 1.15, [done["reverse"] / done["none"]])
    yield Row(f"{what}: peak memory", against, "cost", 1.15, 1.05, [memory("reverse", device) / memory("none", device)])
    # without units for it bfloat16 is emulated, tens of times slower: a small step shows that as well
    quick = device != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    images = 16 if quick else 2
    cases = {name: training_step(name, device, images) for name in ("none", "bfloat16")}
    ratios, mine, other = _pair(alternate(cases, repeats if quick else 1, device), "bfloat16", "none", "faster")
    title = "bfloat16 training step" if quick else "bfloat16 training step (emulated: this CPU has no units for it), 2 images"
    yield Row(title, "float32 step", "faster", 2, 2.2, ratios, mine, other, done["none"] * images / 16 / mine / 1e9)


def _classification(repeats: int, device: str) -> Iterator[Row]:
    x = torch.randn(16, *WIDE.image_shape, generator=generator(0)).to(device)
    cases = {
        count: partial(classify, random_flow(WIDE.model_copy(update={"classes": count}), device).requires_grad_(False), x)
        for count in (10, 1000)
    }
    ratios, mine, other = _pair(alternate(cases, repeats, device), 1000, 10, "cost")  # type: ignore[arg-type]
    yield Row("classification by one gradient step, 1,000 classes", "10 classes", "cost", 1.5, 1.2, ratios, mine, other)
