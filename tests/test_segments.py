"""The fast training path against the passes it stands for: gradients to 1e-10 in float64."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, features, make_flow
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.align.aligner import Aligner
from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.projector import Projectors
from rrepa_lab.align.strategy import Strategy
from rrepa_lab.flow.likelihood import flow_loss
from rrepa_lab.flow.taps import Tap
from rrepa_lab.training.objective import Objective

plain_features = partial(features, plain=True)
DEEP = rl.FlowConfig(classes=10, width=32, head_width=16, blocks=4, layers=3)
PLACES = {
    "the last two": [(3, 2), (4, 2)],
    "the last": [(4, 3)],
    "the first": [(1, 1)],
    "one in the middle, two layers": [(2, 1), (2, 3)],
    "every second": [(2, 2), (4, 1)],
    "all": [(t, 2) for t in (1, 2, 3, 4)],
}


def gradients(plain, flow, strategy, taps, weight, watch_x=False):
    """All gradients of a training loss, projectors included, and the loss itself."""
    x = torch.randn(3, *flow.config.image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_(watch_x)
    y = torch.tensor([1, -1, 0]) if flow.config.classes else None
    target = torch.randn(3, flow.config.tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    names = [tap.name for tap in taps]
    projectors = Projectors(names, flow.config.width, 16, 8).double()
    aligner = Aligner(AlignConfig(strategy=strategy), projectors)
    encoded, alignment, near = aligner(flow, x, y, target, names, plain)
    # unequal weights on images, so that a gradient that mixes them shows
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    loss = flow_loss(encoded.z * scale[:, None, None], encoded.logdet * scale, flow.prior_var)
    loss = loss + weight * alignment if near else loss
    named = {**dict(flow.named_parameters()), **{f"projector.{n}": p for n, p in projectors.named_parameters()}}
    if watch_x:
        named["x"] = x
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), dict(zip(named, found, strict=True))


def same(left, right):
    assert_close(left[0], right[0], atol=1e-12, rtol=0)
    for name in (name for name, gradient in right[1].items() if gradient is None):
        assert left[1][name] is None or not left[1][name].any(), name
    expected = {name: gradient for name, gradient in right[1].items() if gradient is not None}
    assert_close({name: left[1][name] for name in expected}, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("strategy", ["detach", "reverse"])
@pytest.mark.parametrize("place", PLACES)
def test_gradients_are_those_of_the_plain_passes(strategy, place):
    flow, taps = make_flow(DEEP), [Tap(*pair) for pair in PLACES[place]]
    plain = gradients(True, flow, strategy, taps, 0.5, watch_x=True)
    alone = gradients(True, flow, strategy, taps, 0.0, watch_x=True)
    moved = max(float((plain[1][name] - alone[1][name]).abs().max()) for name in alone[1] if alone[1][name] is not None)
    assert moved > 1e-4, "the alignment does nothing: this test would prove nothing"
    same(gradients(False, flow, strategy, taps, 0.5, watch_x=True), plain)
    same(gradients(False, flow, strategy, taps, 0.5), (plain[0], {n: g for n, g in plain[1].items() if n != "x"}))


@pytest.mark.parametrize("strategy", ["detach", "reverse"])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_kind_of_flow(strategy, config):
    flow = make_flow(CONFIGS[config])
    taps = [Tap(flow.config.blocks, 1), Tap(flow.config.blocks - 1, flow.config.layers_of(flow.config.blocks - 1))]
    same(gradients(False, flow, strategy, taps, 0.5), gradients(True, flow, strategy, taps, 0.5))


@pytest.mark.parametrize("strategy", ["detach", "reverse"])
def test_frozen_parameters_stay_out(strategy):
    flow = make_flow(DEEP)
    flow.block(4).requires_grad_(False)
    flow.block(2).proj_in.requires_grad_(False)
    taps = [Tap(2, 2), Tap(4, 2)]
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)

    def run(way):
        flow.zero_grad()
        encoded, aligned = way(flow, x, None, strategy, taps)
        (encoded.z.square().sum() + sum(state.sin().sum() for state in aligned.values())).backward()
        return {name: p.grad for name, p in flow.named_parameters()}

    fast, plain = run(features), run(plain_features)
    assert {n for n, g in fast.items() if g is None} == {n for n, g in plain.items() if g is None} != set()
    for name, gradient in plain.items():
        if gradient is not None:
            assert_close(fast[name], gradient, atol=1e-10, rtol=0)


def test_one_forward_pass_and_one_set_of_activations():
    """What the step is for, counted and not clocked: no block is read twice, and the graph keeps next to nothing more."""
    from rrepa_lab.bench.timing import kept_bytes

    flow, taps = make_flow(DEEP), [Tap(3, 2), Tap(4, 2)]
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    reads = []
    for number in range(1, DEEP.blocks + 1):
        flow.block(number).transformer.register_forward_hook(lambda *_: reads.append(1))

    def step(way, strategy):
        reads.clear()
        kept = kept_bytes(lambda: way(flow, x, None, strategy, taps))
        return len(reads), kept

    count, none = step(plain_features, "none")
    assert count == 4
    for strategy in ("detach", "reverse"):
        count, kept = step(features, strategy)
        assert count == 4
        assert kept < 1.05 * none
    count, kept = step(plain_features, "reverse")
    assert count == 8
    assert kept > 1.2 * none


def test_a_second_backward_is_refused():
    flow = make_flow(DEEP)
    encoded, _ = features(flow, torch.randn(2, 1, 8, 8, dtype=torch.float64), None, "reverse", [Tap(3, 1)])
    loss = encoded.z.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run once"):
        loss.backward()


def test_soft_labels_keep_their_gradient():
    flow, taps = make_flow(DEEP), [Tap(3, 1)]
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    y = torch.full((2, 10), 0.1, dtype=torch.float64, requires_grad=True)
    encoded, aligned = features(flow, x, y, "reverse", taps)
    (encoded.z.square().sum() + aligned[taps[0].name].sum()).backward()
    assert y.grad is not None
    assert (y.grad != 0).any()


# --- beside other ways to run a step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["none", "detach", "reverse"])
def test_recomputed_layers_give_the_same_gradients_and_keep_less(strategy):
    from rrepa_lab.bench.timing import kept_bytes

    flow = make_flow(DEEP)
    taps = [] if strategy == "none" else [Tap(2, 2), Tap(4, 1)]
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)

    def step():
        return gradients(False, flow, strategy, taps, 0.5), kept_bytes(lambda: features(flow, x, None, strategy, taps))

    usual, usual_kept = step()
    for number in range(1, DEEP.blocks + 1):
        flow.block(number).transformer.checkpointing = True
    again, again_kept = step()
    same(again, usual)
    assert again_kept < usual_kept / 3


def small_objective(strategy, dtype=torch.float64):
    """A flow with projectors in training, images with labels, and targets; the same in every process."""
    align = AlignConfig(strategy=strategy, blocks=[2, 4], layers=[2], weight=0.5)
    flow = make_flow(DEEP).to(dtype)
    torch.manual_seed(0)
    whole = Objective(flow, Projectors(align.taps, DEEP.width, 16, 8).to(dtype), align)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(8, *DEEP.image_shape, dtype=torch.float64, generator=draw).to(dtype)
    target = torch.randn(8, DEEP.tokens, 8, dtype=torch.float64, generator=draw).to(dtype)
    return whole, (x, torch.tensor([1, -1, 0, 9, 3, 3, -1, 5]), target)


def one_of_two(rank, folder):
    """What each process of the next test does: gradients of its half of the batch, averaged with the other's."""
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for strategy in ("detach", "reverse"):
        whole, batch = small_objective(strategy)
        wrapped = torch.nn.parallel.DistributedDataParallel(whole)
        wrapped(*(part[rank::2] for part in batch)).total.backward()
        torch.save({name: p.grad for name, p in whole.named_parameters()}, f"{folder}/{strategy}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_the_gradients_of_the_whole_batch(tmp_path, monkeypatch):
    where, env = Path(__file__).parent, {**os.environ, "OMP_NUM_THREADS": "1"}
    code = "import sys, test_segments; test_segments.one_of_two(int(sys.argv[1]), sys.argv[2])"
    words = [sys.executable, "-c", code]
    pair = [subprocess.Popen([*words, str(rank), str(tmp_path)], cwd=where, env=env) for rank in (0, 1)]
    try:
        assert [process.wait(90) for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()
    monkeypatch.setattr(Strategy, "features", lambda strategy, *given: strategy.passes(*given[:5]))
    for strategy in ("detach", "reverse"):
        whole, batch = small_objective(strategy)
        whole(*batch).total.backward()
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{strategy}-{rank}.pt", weights_only=True)
            assert_close(found, {name: p.grad for name, p in whole.named_parameters()}, atol=1e-10, rtol=0)


def test_a_step_in_bfloat16_goes_the_same_way():
    whole, batch = small_objective("reverse", torch.float32)

    def step(narrow):
        whole.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            losses = whole(*batch)
        losses.total.backward()
        return losses, {name: p.grad.clone() for name, p in whole.named_parameters()}

    (wide, expected), (narrow, found) = step(False), step(True)
    assert narrow.total.item() != wide.total.item(), "nothing ran in bfloat16"
    for mine, theirs in ((narrow.total, wide.total), (narrow.flow, wide.flow)):
        assert mine.item() == pytest.approx(theirs.item(), rel=0.02)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    for part in ("flow.blocks.0", "flow.blocks.1", "flow.blocks.2", "flow.blocks.3", "projectors"):
        a, b = (torch.cat([g[n].flatten() for n in g if n.startswith(part)]) for g in (found, expected))
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98, part
