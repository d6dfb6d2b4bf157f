"""What things cost on this machine: ratios of work run in alternation in one process, medians of repeats.

Times of one machine at one moment mean little, so every row has the ratio to its own reference beside the seconds.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.align.projector import Projectors
from rrepa_lab.align.routing import perturb
from rrepa_lab.analysis.classify import classify
from rrepa_lab.analysis.features import in_turn
from rrepa_lab.analysis.tables import about
from rrepa_lab.data.loaders import generator, seeded
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.decoding import METHODS
from rrepa_lab.flow.tarflow import FlowConfig, TarFlow
from rrepa_lab.presets import preset
from rrepa_lab.runs import Run, RunConfig, load
from rrepa_lab.sampling.sample import noise
from rrepa_lab.training.objective import Objective

CLASSES = (10, 100, 1000)
DECODERS = tuple(method for method in METHODS if method != "auto")  # "auto" is one of the others


def bench(which: str = "classify", repeats: int = 7, threads: int = 2, device: str = "cpu") -> pd.DataFrame:
    """Run a benchmark.

    Args:
        which: "classify": one gradient step and Bayes' rule for 10, 100 and 1,000 classes. "decode": the ways to invert
            a flow, on the bundled digits-reverse; see `decoding`, whose columns seconds_per_image and error it has too.
            "strategies": a training step under every alignment strategy; see `step_costs`, whose column kept_mib it has.
            "page": from the start of the page to its first picture, and from a key to the repaint, in a headless Chromium
            (a row's ratio is then empty).
        repeats: rounds; each round runs every case once, in turn.
        threads: of torch, on a CPU.

    Returns: one row a case: bench, case, classes, seconds (median, for all images), fastest, slowest, ratio (median over
        rounds of the time to that of the reference case in the same round), reference, and what was run: images, flow,
        repeats, threads, device, torch.

    Raises: LabError for an unknown benchmark.
    """
    if which not in BENCHES:
        raise unknown("benchmark", which, BENCHES)
    with _threads(threads):
        return BENCHES[which](repeats, device).assign(
            repeats=repeats, threads=threads, device=_machine(device), torch=torch.__version__
        )


def _classify(repeats: int, device: str) -> pd.DataFrame:
    """Time against the number of classes, digits geometry, random weights (the time does not depend on them)."""
    images = 16
    x = torch.randn(images, 1, 8, 8, generator=generator(0)).to(device)
    cases, reference = dict[tuple[str, int], Callable[[], Any]](), dict[tuple[str, int], tuple[str, int]]()
    for count in CLASSES:
        with seeded(0):
            flow = TarFlow(FlowConfig(classes=count))
        perturb(flow, 0)
        flow.eval().requires_grad_(False).to(device)
        for method in ("gradient", "bayes"):
            cases[method, count] = partial(classify, flow, x, method)
            reference[method, count] = method, CLASSES[0]
    times = alternate(cases, repeats, device)
    rows = []
    for case, seconds in times.items():
        base = reference[case]
        row = {"bench": "classify", "case": case[0], "classes": case[1]} | _summary(seconds, times[base])
        rows.append(row | {"reference": f"{base[0]}, {base[1]} classes"})
    table = pd.DataFrame(rows).sort_values(["case", "classes"], ascending=[False, True], ignore_index=True)
    return table.assign(images=images, flow="digits: 4 blocks x 4 layers, width 64, 16 tokens")


def _decode(repeats: int, device: str) -> pd.DataFrame:
    """Time and error of the ways to decode, with trained weights: how soon an iteration ends depends on them."""
    run = load("digits-reverse", device)
    table = decoding(run, 16, repeats).rename(columns={"method": "case", "n": "images"})
    table = table.drop(columns=["run", "strategy", "train_seed"])
    flow = f"{run.name}: 4 blocks x 4 layers, width 64, 16 tokens"
    return table.assign(bench="decode", classes=run.flow.config.classes, reference="sequential", flow=flow)


def _strategies(repeats: int, device: str) -> pd.DataFrame:
    """Time and memory of a training step of digits under every strategy."""
    config = preset("digits-reverse")
    table = step_costs(config, repeats=repeats, device=device)
    pairs = zip(table["strategy"].astype(str), table["refinements"], strict=True)
    case = pd.Series([f"{strategy}, k = {count}" if strategy == "reverse" else strategy for strategy, count in pairs])
    return table.assign(
        bench="strategies", case=case, reference="none", classes=config.flow.classes,
        flow="digits: 4 blocks x 4 layers, width 64, 16 tokens, aligned blocks 3 and 4 at layer 2",
    ).drop(columns=["strategy", "refinements"])  # fmt: skip


def _page(repeats: int, device: str) -> pd.DataFrame:
    """Seconds until the page answers, in a headless Chromium."""
    from rrepa_lab.bench.page import page_times

    return page_times(repeats, torch.get_num_threads(), device).assign(ratio=float("nan"), reference="", images=1)


BENCHES: dict[str, Callable[[int, str], pd.DataFrame]] = {
    "classify": _classify, "decode": _decode, "strategies": _strategies, "page": _page,
}  # fmt: skip


@torch.no_grad()
def decoding(
    run: Run,
    images: int = 16,
    repeats: int = 7,
    *,
    guidance: float = 0.0,
    seed: int = 0,
    methods: Sequence[str] = DECODERS,
) -> pd.DataFrame:
    """Send the same noise through the flow by every decoding method, in alternation.

    Args:
        images: decoded at once; labels in turn, image i from the noise of seed `seed` + i, not denoised.
        repeats: rounds, see `alternate`.
        guidance: classifier-free guidance weight.
        methods: see `TarFlow.inverse`; held against "sequential", which is run in any case.

    Returns: one row a method: run, strategy, train_seed, method, seconds (median over rounds, for all images), fastest,
        slowest, ratio (median over rounds of the time to that of "sequential" in the same round), seconds_per_image, error
        (largest difference of a pixel from "sequential", images being in [-1, 1]), n (images), guidance, seed.

    Raises: LabError for no images, an unknown method, or a negative guidance.
    """
    if images < 1:
        raise LabError(f"images must be at least 1, not {images}")
    flow = run.flow
    z = noise(flow, range(seed, seed + images)).to(next(flow.parameters()))
    y = in_turn(run, images).to(run.device) if flow.config.classes else None
    made: dict[str, Tensor] = {}

    def decode(method: str) -> None:
        made[method] = flow.inverse(z, y, guidance, method=method).x

    wanted = list(dict.fromkeys(["sequential", *methods]))
    times = alternate({method: partial(decode, method) for method in wanted}, repeats, str(run.device))
    rows = []
    for method in wanted:
        error = float((made[method] - made["sequential"]).abs().max())
        rows.append(about(run) | {"method": method} | _summary(times[method], times["sequential"]) | {"error": error})
    table = pd.DataFrame(rows)
    return table.assign(seconds_per_image=table["seconds"] / images, n=images, guidance=guidance, seed=seed)


def step_costs(
    config: RunConfig, refinements: Sequence[int] = (0, 1, 4), images: int = 64, repeats: int = 5, device: str = "cpu"
) -> pd.DataFrame:
    """Time and memory of one training step (losses and their gradient, without the encoder) under every strategy.

    Args:
        config: sizes of the flow, aligned blocks and layers; the weights are random, the time does not depend on them.
        refinements: of `reverse`, a case each.
        images: of a step.

    Returns: columns strategy, refinements, seconds (median), fastest, slowest, ratio (to `none` in the same round,
        median), kept_mib (what the graph keeps for the backward pass, MiB, parameters not counted), images, repeats.
    """
    align = config.align
    cases: dict[tuple[str, int], Callable[[], Any]] = {}
    shape, width = (images, *config.flow.image_shape), 64
    x = torch.randn(shape, generator=generator(0)).to(device)
    y = (torch.arange(images) % config.flow.classes).to(device) if config.flow.classes else None
    target = torch.randn(images, config.flow.tokens, width, generator=generator(1)).to(device)
    asked = [(name, 0) for name in ("none", "forward", "detach")] + [("reverse", count) for count in refinements]
    for name, count in [*asked, ("reverse-exact", 0)]:
        chosen = align.model_copy(update={"strategy": name, "refinements": count})
        with seeded(0):
            flow = TarFlow(config.flow)
            projectors = Projectors(chosen.taps, config.flow.width, chosen.projector_width, width)
        perturb(flow, 0)
        cases[name, count] = partial(_step, Objective(flow, projectors, chosen).to(device), x, y, target)
    kept = {case: _kept_bytes(call) for case, call in cases.items()}
    times = alternate(cases, repeats, device)
    rows = []
    for (name, count), seconds in times.items():
        row = {"strategy": name, "refinements": count} | _summary(seconds, times["none", 0])
        rows.append(row | {"kept_mib": kept[name, count] / 2**20, "images": images, "repeats": repeats})
    return pd.DataFrame(rows)


def _step(objective: Objective, x: Tensor, y: Tensor | None, target: Tensor) -> None:
    objective.zero_grad()
    objective(x, y, target).total.backward()


def _kept_bytes(call: Callable[[], Any]) -> int:
    """Bytes of the tensors that autograd keeps during a call, each storage counted once."""
    sizes: dict[int, int] = {}
    alive = []  # a storage must not be freed and its address used again while we count

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(sizes.values())


def _summary(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Seconds of a case in each round, against those of its reference in the same rounds."""
    ratios = [mine / theirs for mine, theirs in zip(seconds, reference, strict=True)]
    return {
        "seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds),
        "ratio": statistics.median(ratios),
    }  # fmt: skip


def alternate(cases: Mapping[Any, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[Any, list[float]]:
    """Seconds of each case in each round; a first round warms up and is not counted."""
    times: dict[Any, list[float]] = {name: [] for name in cases}
    for round_ in range(repeats + 1):
        for name, call in cases.items():
            began = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_:
                times[name].append(time.perf_counter() - began)
    return times


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine(device: str) -> str:
    """The machine in words that name no host."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    model = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            model = next((line.split(":")[1].strip() for line in stream if line.startswith("model name")), "")
    except OSError:
        pass
    return model or platform.processor() or platform.machine()
