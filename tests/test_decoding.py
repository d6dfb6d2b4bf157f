"""Decoding: every method gives the plain loop's images, whatever the guidance, the batch, the window or the split."""

import json
from typing import Any

import pytest
import torch
from conftest import CONFIGS, make_flow
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.errors import LabError
from rrepa_lab.flow import memory
from rrepa_lab.flow.decode import incremental
from rrepa_lab.flow.decode.engine import image_bytes
from rrepa_lab.flow.decode.jacobi import residual
from rrepa_lab.flow.decode.plan import BlockReport, DecodePlan
from rrepa_lab.flow.taps import Tap
from rrepa_lab.sampling.sample import noise

FAST = ["cached", "jacobi"]
RULES: list[dict[str, Any]] = [
    {},
    {"guidance": 1.5},
    {"guidance": 1.5, "annealed": True},
    {"guidance": 0.7, "temperature": 0.6},
]


def start(flow, images=3, dtype=torch.float64):
    """Noise of the prior and labels: an ordinary, a dropped and the last one."""
    z = noise(flow, range(images)).to(dtype)
    y = torch.tensor([1, -1, flow.config.classes - 1] * images)[:images] if flow.config.classes else None
    return z, y


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("method", FAST)
def test_methods_agree_with_the_plain_loop(flow, method, rule):
    z, y = start(flow)
    plain = flow.inverse(z, y, **rule, method="sequential", taps="*")
    fast = flow.inverse(z, y, **rule, method=method, taps="*")
    assert (plain.x - flow.untokenize(z)).abs().max() > 0.1, "the flow does nothing: this test would prove nothing"
    assert_close(fast.x, plain.x, atol=1e-8, rtol=0)
    assert list(fast.states) == list(plain.states)
    for tap, state in plain.states.items():
        assert_close(fast.states[tap], state, atol=1e-8, rtol=0)
    assert fast.method == method


@pytest.mark.parametrize(
    "images", [1, 2, 5, 9]
)  # 9 are more than MAX_ROWS_CONTIGUOUS, 40 guided ones more than MAX_ROWS_TRANSPOSED
@pytest.mark.parametrize("method", FAST)
def test_odd_batches_in_float32(method, images):
    flow = make_flow(CONFIGS["plain"]).float()
    z, y = start(flow, images, torch.float32)
    for rule in RULES:
        plain = flow.inverse(z, y, **rule, method="sequential").x
        assert_close(flow.inverse(z, y, **rule, method=method).x, plain, atol=1e-4, rtol=0)


def test_many_rows(flow):
    z, y = start(flow, 40)
    rule: dict[str, Any] = {"guidance": 1.5, "temperature": 0.8}
    assert_close(
        flow.inverse(z, y, **rule, method="cached").x, flow.inverse(z, y, **rule, method="sequential").x, atol=1e-8, rtol=0
    )


@pytest.mark.parametrize("transposed", [0, 10**6])
@pytest.mark.parametrize("contiguous", [0, 10**6])
@pytest.mark.parametrize("unfused", [0, 10**6])
def test_layouts_and_kernels_give_the_same(flow, monkeypatch, transposed, contiguous, unfused):
    """Which products are transposed, copied or fused depends on sizes: here each form is used whatever the size."""
    monkeypatch.setattr(incremental, "MAX_ROWS_TRANSPOSED", transposed)
    monkeypatch.setattr(incremental, "MAX_ROWS_CONTIGUOUS", contiguous)
    monkeypatch.setattr(incremental, "MAX_LOGITS_UNFUSED", unfused)
    z, y = start(flow)
    rule: dict[str, Any] = {"guidance": 1.5, "temperature": 0.8}
    plain = flow.inverse(z, y, **rule, method="sequential").x
    for method in FAST:
        assert_close(flow.inverse(z, y, **rule, method=method).x, plain, atol=1e-8, rtol=0)


@pytest.mark.parametrize("window", [1, 2, 5, 16])
def test_every_window_gives_the_same(window):
    flow = make_flow(CONFIGS["plain"])
    z, y = start(flow)
    plain = flow.inverse(z, y, 1.5, method="sequential").x.detach()
    plan = DecodePlan(windows=[window, 3, window])
    out = flow.inverse(z, y, 1.5, method=rl.Decoding("jacobi", plan=plan))
    assert_close(out.x, plain, atol=1e-8, rtol=0)
    if window == 1:
        assert out.iterations[0] == out.iterations[2] == 15, "a window of one token is the token loop"
    assert max(out.iterations) <= 15, "T - 1 iterations are exact"


def test_jacobi_measures_its_error():
    flow = make_flow(CONFIGS["plain"])
    z, y = start(flow)
    plain = flow.inverse(z, y, 1.5, method="sequential").x.detach()
    loose, tight = (flow.inverse(z, y, 1.5, method=rl.Decoding("jacobi", tolerance=value)) for value in (1e-1, 1e-9))
    assert sum(loose.iterations) < sum(tight.iterations)
    for out, tolerance in ((loose, 1e-1), (tight, 1e-9)):
        assert out.error is not None
        assert out.error <= tolerance
        true = float((out.x - plain).abs().max())
        assert true <= 10 * out.error + 1e-12, "the measured error says how far the answer is"
        assert true <= 2 * tolerance
    assert float((loose.x - plain).abs().max()) > 1e-6, "otherwise there was nothing to measure"


def test_a_wrong_answer_shows_in_the_residual():
    flow = make_flow(CONFIGS["plain"])
    z, y = start(flow)
    condition = flow.condition(y, 3, 1.5)
    names = [f"block.{t}.in" for t in (1, 2, 3)]
    right = flow.inverse(z, y, 1.5, method="sequential", taps=names).states
    tokens = {t: right[f"block.{t}.in"] for t in (1, 2, 3)}
    assert residual(flow, z, tokens, condition).error < 1e-12
    tokens[2] = tokens[2] + 1e-3
    assert residual(flow, z, tokens, condition).error > 1e-5


def test_a_tolerance_that_cannot_be_met():
    flow = make_flow(CONFIGS["plain"]).float()
    z, y = start(flow, dtype=torch.float32)
    with pytest.raises(LabError, match=r"jacobi cannot meet the tolerance 1e-12 here: .* in float32; .*'cached'"):
        flow.inverse(z, y, method=rl.Decoding("jacobi", tolerance=1e-12))
    with pytest.raises(LabError, match="tolerance must be > 0"):
        flow.inverse(z, y, method=rl.Decoding("jacobi", tolerance=0.0))
    with pytest.raises(LabError, match="unknown precision 'float16'"):
        flow.inverse(z, y, method=rl.Decoding("jacobi", precision="float16"))  # type: ignore[arg-type]
    with pytest.raises(LabError, match="batch must be at least 1, not 0"):
        flow.inverse(z, y, method=rl.Decoding(batch=0))
    flow.requires_grad_(False)
    auto = rl.Decoding(tolerance=1e-12, plan=DecodePlan(windows=[4, 4, 4], upto=100))
    assert auto.choose("cpu", 3) == "jacobi"
    assert flow.inverse(z, y, method=auto).method == "cached", "auto has another method"


def test_auto_goes_by_gradient_and_plan():
    flow = make_flow(CONFIGS["plain"])
    z, y = start(flow)
    out = flow.inverse(z, y)
    assert (out.method, out.x.requires_grad) == ("sequential", True)
    flow.requires_grad_(False)
    assert flow.inverse(z, y).method == "cached"
    auto = rl.Decoding(plan=DecodePlan(windows=[4, 4, 4], upto=5))
    assert flow.inverse(z, y, method=auto).method == "jacobi"
    assert flow.inverse(z, y, 1.5, method=auto).method == "cached", "two branches are six rows"
    assert flow.inverse(z.clone().requires_grad_(), y, method=auto).method == "sequential"
    other = rl.Decoding(plan=DecodePlan(device="cuda", windows=[4, 4, 4], upto=5))
    assert flow.inverse(z, y, method=other).method == "cached", "the plan of another device says nothing"


def test_only_the_plain_loop_has_a_graph():
    flow = make_flow(CONFIGS["plain"])
    z, y = start(flow)
    for method in FAST:
        assert not flow.inverse(z, y, method=method).x.requires_grad
    assert flow.inverse(z, y, method="sequential").x.requires_grad


@pytest.mark.parametrize("method", ["sequential", "cached", "jacobi"])
def test_parts_of_a_batch_give_the_whole(method):
    flow = make_flow(CONFIGS["plain"])
    z, y = start(flow, 5)
    reports: list[BlockReport] = []
    whole = flow.inverse(z, y, 1.5, method=method, taps="block.2.layer.1")
    by_two = rl.Decoding(method, batch=2)
    parts = flow.inverse(z, y, 1.5, method=by_two, taps="block.2.layer.1", progress=reports.append)
    assert_close(parts.x, whole.x, atol=1e-9, rtol=0)
    assert_close(parts.states["block.2.layer.1"], whole.states["block.2.layer.1"], atol=1e-9, rtol=0)
    assert [(report.block, report.images) for report in reports] == [(t, n) for n in (2, 2, 1) for t in (3, 2, 1)]
    assert {report.method for report in reports} == {method}


def test_memory_decides_the_split(monkeypatch):
    flow = make_flow(CONFIGS["plain"])
    z, y = start(flow, 5)
    each = image_bytes(flow.config, 2, 8)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(2.5 * each / memory.SHARE))
    reports: list[BlockReport] = []
    flow.inverse(z, y, 1.5, method="cached", progress=reports.append)
    assert [report.images for report in reports] == [2] * 6 + [1] * 3
    monkeypatch.setattr(memory, "free_bytes", lambda device: each // 2)
    with pytest.raises(LabError, match=r"decoding one image needs .* GiB, but .* GiB are free on cpu: it does not fit"):
        flow.inverse(z, y, 1.5, method="cached")


def test_free_memory_is_that_of_this_machine():
    import psutil

    assert 0 < memory.free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def test_bfloat16_tells_its_error():
    flow = make_flow(CONFIGS["plain"]).float()
    z, y = start(flow, dtype=torch.float32)
    plain = flow.inverse(z, y, 1.5, method="sequential").x.detach()
    for method in FAST:
        out = flow.inverse(z, y, 1.5, method=rl.Decoding(method, precision="bfloat16"))
        true = float((out.x - plain).abs().max())
        assert out.x.dtype == torch.float32
        assert 1e-4 < true < 1
        assert out.error is not None
        assert true / 10 < out.error < 10 * true
    assert flow.inverse(z, y, method="cached").error is None


def test_the_incremental_decoder_keeps_every_option(flow):
    """State after state, against the parallel pass of the same block."""
    z, y = start(flow)
    condition = flow.condition(y, 3, 1.5, temperature=0.7).of_block(2)
    block, guidance = flow.block(2), condition.guidance
    decoder, embedded = block.decoder(6, guidance.temperatures(z)), block.embed_label(condition)
    given = guidance.repeat_for_cfg(block.to_block_order(z))
    whole = block.run_transformer(given, 0, embedded, guidance.temperatures(z)).hidden
    with torch.no_grad():
        for place in range(flow.config.tokens - 1):
            one = decoder(block.embed_tokens(given[:, place : place + 1], place, embedded), place)
            assert_close(one, whole[:, place : place + 1], atol=1e-10, rtol=0)
        # and several at once, over those that were processed before
        some = slice(1, flow.config.tokens - 1)
        assert_close(decoder(block.embed_tokens(given[:, some], 1, embedded), 1), whole[:, some], atol=1e-10, rtol=0)


def test_a_plan_is_measured_kept_and_read(tmp_path):
    run = rl.load("digits-reverse")
    assert run.plan is not None, "bundled runs come with one"
    with pytest.raises(LabError, match="can only be kept with a saved run"):
        rl.calibrate(run.flow, save=True)
    run.save(tmp_path / "mine")
    mine = rl.load(tmp_path / "mine")
    assert mine.plan is None
    plan = rl.calibrate(mine, repeats=1, save=True)
    assert len(plan.windows) == 4
    assert set(plan.windows) <= {8, 15}
    assert rl.load(tmp_path / "mine").plan == mine.plan == plan
    mine.plan = plan.model_copy(update={"upto": 3})
    mine.flow.requires_grad_(False)
    made = {images: rl.sample(mine, range(images), 3).method for images in (3, 4)}
    assert made == {3: "jacobi", 4: "cached"}, "sampling goes by the plan of the run"
    path = tmp_path / "mine" / "decoding.json"
    path.write_text("{")
    with pytest.raises(LabError, match=r"decoding\.json is not JSON: .*delete"):
        rl.load(tmp_path / "mine")
    path.write_text(json.dumps({"window": [1]}))
    with pytest.raises(LabError, match=r"unknown setting 'window'.*delete the file"):
        rl.load(tmp_path / "mine")


def test_samples_do_not_depend_on_the_method(digits):
    run = rl.load("digits-reverse")
    made = [rl.sample(run, range(6), 3, guidance=2.0, method=method).images for method in ("sequential", "cached", "jacobi")]
    for images in made[1:]:
        assert_close(images, made[0], atol=1e-4, rtol=0)
    x = digits[0][:4]
    traced = rl.trace(run, x, direction="reverse", taps=Tap(4, 2).name, method="jacobi")
    assert float(traced.error.max()) < 1e-4
