"""What `train --dry-run` says a training takes: operations, memory, hours."""

import json
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rrepa_lab as rl
from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.projector import Projectors
from rrepa_lab.bench.estimate import estimate, teacher_work, time_steps
from rrepa_lab.bench.flops import step_work
from rrepa_lab.bench.footprint import footprint, layer_bytes
from rrepa_lab.bench.gpus import GPUS, gpus
from rrepa_lab.bench.timing import kept_bytes, operations
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.runs.config import complete
from rrepa_lab.training.objective import Objective

SMALL = {"image_size": 16, "channels": 3, "patch_size": 2, "width": 64, "head_width": 32}
FLOWS = {
    "deep-shallow": rl.FlowConfig(classes=10, blocks=3, layers=[3, 1, 2], **SMALL),
    "rotary-swiglu": rl.FlowConfig(blocks=2, layers=2, positions="rotary", mlp="swiglu", **SMALL),
    "volume-preserving": rl.FlowConfig(classes=4, blocks=2, layers=2, volume_preserving=True, **SMALL),
}
ALIGNED = [
    ("none", 0),
    ("forward", 0),
    ("detach", 0),
    ("reverse", 0),
    ("reverse", 2),
    ("reverse-exact", 0),
    ("reverse-cached", 0),
]
DIM, BATCH = 24, 2


def objective_of(flow_config, align, checkpointing=False, plain=False):
    flow = rl.TarFlow(flow_config)
    perturb(flow, 0)
    flow.configure_layers(checkpointing)
    return Objective(flow, Projectors(align.taps, flow_config.width, align.projector_width, DIM), align, plain=plain)


def inputs(config, align, batch=BATCH):
    x = torch.randn(batch, *config.image_shape)
    y = torch.arange(batch) % config.classes if config.classes else None
    return x, y, torch.randn(batch, config.tokens, DIM) if align.taps else None


def dims(align):
    return (DIM,) if align.taps else ()


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize(("strategy", "refinements"), ALIGNED)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("blocks", [[1, -1], [-1]])
def test_operations_of_a_step(name, strategy, refinements, checkpointing, blocks):
    config = FLOWS[name]
    if strategy == "reverse-exact":
        if checkpointing or name != "deep-shallow":
            pytest.skip("the token loop keeps no layers to run again")
        config = config.override({"image_size": 8})  # it is slow
    align = AlignConfig(strategy=strategy, refinements=refinements, blocks=blocks, layers=[1], projector_width=32)
    align = align.counted(config.blocks, config.layers)
    objective, given = objective_of(config, align, checkpointing), inputs(config, align)

    def step():
        objective(*given).total.backward()

    # FlopCounterMode follows modules, and cannot where gradients are taken within a backward pass: then the same counts
    # without modules. Both know the products of this kernel on a CPU.
    with sdpa_kernel(SDPBackend.MATH):
        if strategy in ("detach", "reverse", "reverse-cached") or checkpointing:
            counted = operations(step)
        else:
            with FlopCounterMode(display=False) as counter:
                step()
            counted = counter.get_total_flops()
    assert BATCH * step_work(config, align, dims(align), checkpointing).total == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(("strategy", "refinements"), ALIGNED[1:])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("blocks", [[1, -1], [-1]])
def test_operations_of_a_step_whose_features_drop_the_label(strategy, refinements, checkpointing, blocks):
    if strategy == "reverse-exact" and checkpointing:
        pytest.skip("the token loop keeps no layers to run again")
    config = FLOWS["deep-shallow"].override({"image_size": 8})
    align = AlignConfig(
        strategy=strategy, refinements=refinements, blocks=blocks, layers=[1], projector_width=32, labels="dropped"
    ).counted(config.blocks, config.layers)
    objective, given = objective_of(config, align, checkpointing), inputs(config, align)
    with sdpa_kernel(SDPBackend.MATH):
        counted = operations(lambda: objective(*given).total.backward())  # noqa: PLW0108 (the losses are a part of it)
    assert BATCH * step_work(config, align, dims(align), checkpointing).total == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("projector", ["linear", "conv3", "masked"])
def test_operations_of_the_projectors(projector):
    config = FLOWS["deep-shallow"]
    align = AlignConfig(strategy="forward", blocks=[1, 2], layers=[1], projector_width=64, projector=projector)
    flow = rl.TarFlow(config)
    objective = Objective(flow, Projectors.of(align, config, DIM), align)
    given = inputs(config, align)
    with sdpa_kernel(SDPBackend.MATH):
        counted = operations(lambda: objective(*given).total.backward())  # noqa: PLW0108 (the losses are a part of it)
    assert BATCH * step_work(config, align, dims(align)).total == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("strategy", ["detach", "reverse", "reverse-cached"])
@pytest.mark.parametrize("blocks", [[1, -1], [-1]])
def test_a_sharded_step_takes_the_plain_passes(strategy, blocks):
    config = FLOWS["deep-shallow"]
    align = AlignConfig(strategy=strategy, blocks=blocks, layers=[1], projector_width=32).counted(3, config.layers)
    objective, given = objective_of(config, align, plain=True), inputs(config, align)
    with sdpa_kernel(SDPBackend.MATH):
        counted = operations(lambda: objective(*given).total.backward())  # noqa: PLW0108 (the losses are a part of it)
    assert BATCH * step_work(config, align, dims(align), plain=True).total == pytest.approx(counted, rel=0.02)
    kept = kept_bytes(partial(objective, *given))
    found = footprint(config, align, BATCH, 0, teacher_dims=dims(align), plain=True)
    assert found.activations == pytest.approx(kept, rel=0.2)


def test_the_one_pass_form_costs_what_the_design_says():
    """8 blocks x 4 layers, width 256, 64 tokens, two aligned blocks at layer 3: 1.154 plain steps by operations."""
    config = rl.FlowConfig(image_size=16, channels=3, patch_size=2, width=256, blocks=8, layers=4, classes=10)
    plain = step_work(config, AlignConfig()).flow
    aligned = step_work(config, AlignConfig(strategy="reverse", blocks=[7, 8], layers=[3]), ()).flow
    assert aligned / plain == pytest.approx(1.154, abs=0.01)


@pytest.mark.parametrize("name", ["deep-shallow", "rotary-swiglu"])
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("strategy", ["none", "reverse"])
def test_memory_of_activations(name, bfloat16, strategy):
    config, batch = FLOWS[name], 16
    align = AlignConfig(strategy=strategy, blocks=[-1], layers=[-1], projector_width=32).counted(config.blocks, config.layers)
    objective, given = objective_of(config, align), inputs(config, align, batch)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            objective(*given)

    count = sum(p.numel() for p in objective.parameters())
    found = footprint(config, align, batch, count, teacher_dims=dims(align), bfloat16=bfloat16)
    copies = 2 * count if bfloat16 else 0  # which autograd keeps as well
    assert found.activations + copies == pytest.approx(kept_bytes(step), rel=0.15)
    assert found.weights + found.gradients + found.optimizer + found.average == 20 * count + copies


def test_checkpointing_keeps_one_layer():
    config = FLOWS["deep-shallow"]
    objective, given = objective_of(config, AlignConfig(), True), inputs(config, AlignConfig(), 16)
    found = footprint(config, AlignConfig(), 16, 0, checkpointing=True).activations
    one = 16 * config.tokens * layer_bytes(config, False)
    assert found - one == pytest.approx(kept_bytes(partial(objective, *given)), rel=0.2)
    assert found < footprint(config, AlignConfig(), 16, 0).activations / 2


def test_the_teacher_is_counted():
    found = teacher_work(rl.preset("digits-reverse"))
    config: Any = rl.preset("digits-reverse").encoder
    tokens, width, depth = 16, config.args["embed_dim"], config.args["depth"]
    layer = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    assert found.dims == (width,)
    assert found.operations == pytest.approx(depth * layer, rel=0.05)


def test_hours_on_gpus(capsys):
    found = estimate(rl.preset("imagenet64-none"))
    count, gpu = gpus("8xA100")
    hours = found.step_operations * 400_000 / (8 * 312e12 * 0.5) / 3600
    assert found.hours_on(gpu, count, 0.5) == pytest.approx(hours)
    assert 5e14 > found.step_operations > 3e14
    assert found.memory_on(8).activations == found.memory.activations / 8
    sharded = estimate(rl.preset("imagenet64-none").override({"train.parallel": "fsdp", "train.accumulate": 4}))
    assert sharded.memory_on(8).weights == sharded.memory.weights / 8
    assert sharded.memory.activations == found.memory.activations / 4
    words = ["train", "imagenet64-none", "--dry-run", "--gpu", "8xa100", "--utilization", "0.5"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "at an assumed 50% of 312 TFLOP/s (bf16 dense, NVIDIA A100 data sheet)" in text
    assert main([*words, "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main(["train", "imagenet64-none", "--dry-run", "--gpu", "h100"]) == 0
    assert "does NOT fit; set train.checkpointing=true or train.accumulate=2" in capsys.readouterr().out
    assert one["gpu"]["hours"] == pytest.approx(hours)
    assert one["gpu"]["fits"] is True
    assert one["flops_per_step"] == sum(value for key, value in one["flops_of"].items() if key != "strategy")
    assert one["memory"]["total"] == pytest.approx(sum(v for k, v in one["memory"].items() if k != "total"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "unknown GPU 'h1000'; did you mean 'h100'"),
        (["--gpu", "0xh100"], "--gpu 0xh100: at least one GPU is needed"),
        (["--utilization", "2"], "--utilization"),
        (["--time"], r"a step needs about \d+.\d GiB, and"),
        (["--set", "space.kind=small-vae", "--set", "space.weights=nowhere"], "nowhere holds no small-vae: train one with"),
    ],
)
def test_what_cannot_be_told_is_one_line(words, message, capsys):
    assert main(["train", "imagenet64-none", "--dry-run", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_every_gpu_has_a_source():
    for name, gpu in GPUS.items():
        assert gpu.source, name
        assert 50 < gpu.tflops < 5000
        assert gpus(f"2x{name}") == (2, gpu)


def test_steps_are_timed_here(tiny, capsys, tmp_path, monkeypatch):
    timing = time_steps(estimate(complete(tiny)), torch.device("cpu"), 3)
    assert timing.steps == 3
    assert 0 < timing.seconds < 5
    assert timing.hours(7200) == pytest.approx(2 * timing.seconds)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits-none", "--dry-run", "--json", "--no-time"]) == 0
    assert "here" not in json.loads(capsys.readouterr().out)
    assert main(["train", "digits-none", "--dry-run", "--set", "flow.blocks=1", "--set", "train.batch=8"]) == 0
    assert "s a step, the median of 10 on " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_one_line(tiny):
    found = estimate(complete(tiny.override({"train.batch": 10**9})))
    with pytest.raises(LabError, match="it is not timed"):
        time_steps(found, torch.device("cpu"))


def test_sizes_of_what_is_kept(capsys):
    assert main(["train", "digits-reverse", "--dry-run", "--json", "--no-time"]) == 0
    facts = json.loads(capsys.readouterr().out)
    # shifted images have no features that could be kept
    assert (facts["caches"], facts["teacher_runs_each_step"]) == ({"pictures": 1149 * 64.0}, True)
    assert facts["flops_of"]["teacher"] == 64 * facts["flops_per_teacher_image"]
    plain = ["train", "digits-reverse", "--dry-run", "--json", "--no-time", "--set", "data.shift=0"]
    assert main(plain) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["caches"]["features"] == 1149 * 16 * 64 * 4.0
    assert facts["flops_of"]["teacher"] == 0
    assert main([*plain, "--set", "train.feature_cache=disk"]) == 0
    assert json.loads(capsys.readouterr().out)["caches"]["features"] == 1149 * 16 * 64 * 2.0
    assert main([*plain, "--set", "train.steps=3"]) == 0
    assert json.loads(capsys.readouterr().out)["teacher_runs_each_step"], "so few images are seen once"
