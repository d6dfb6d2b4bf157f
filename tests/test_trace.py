"""Following images through a flow: both directions, every kind of label, guidance, batches."""

import pytest
import torch
from conftest import CONFIGS, make_flow
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.errors import LabError
from rrepa_lab.runs.run import build

LABELS = {
    "none": None,
    "one class": 3,
    "ids": torch.tensor([3, -1, 7, 0, 9]),
    "weights": torch.rand(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(1),
}


def shut(a, b, atol):
    assert_close(a, b, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def plain():
    return make_flow(CONFIGS["plain"]), torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def double_run():
    """A whole run in float64, away from its zero start."""
    config = rl.RunConfig.from_dict({"flow": CONFIGS["plain"].to_dict()})
    run = build(config, [str(k) for k in range(10)])
    run.flow = make_flow(CONFIGS["plain"])
    return run


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("label", LABELS)
def test_own_noise_leads_back_through_the_same_states(plain, label, guidance):
    flow, x = plain
    there = rl.trace(flow, x, LABELS[label], "forward", "*", guidance=guidance)
    back = rl.trace(flow, x, LABELS[label], "reverse", "*", guidance=guidance)
    assert list(there.states) == list(back.states) == [tap.name for tap in flow.resolve("*")]
    for tap, state in there.states.items():
        shut(back.states[tap], state, 1e-9 * float(state.std()))
    assert list(there.images) == list(back.images)[::-1]
    for name, image in there.images.items():
        shut(back.images[name], image, 1e-9)
    assert there.error.shape == back.error.shape == (5,)
    assert max(there.error.max(), back.error.max()) < 1e-9


@pytest.mark.parametrize("name", ["digits-none", "digits-reverse"])
def test_agreement_of_the_bundled_runs(name, digits):
    """In float32, relative to the spread of each tap (`pytest -s` shows the numbers)."""
    x, y = digits[0][:128], digits[1][:128]
    for label in (None, y):
        table = rl.agreement(rl.load(name), x, label)
        print(f"\n{name}: largest relative gap {table.relative_gap.max():.1e} at {table.tap.iloc[table.relative_gap.argmax()]}")
        assert len(table) == 4 * 6
        assert table.relative_gap.max() < 1e-4
        assert table.round_trip_error.max() < 1e-4
        assert (table.spread > 0.1).all()


def test_agreement_in_float64(double_run, plain):
    table = rl.agreement(double_run, plain[1], guidance=1.0)
    assert (table["dtype"] == "float64").all()
    assert table.relative_gap.max() < 1e-9


def test_states_and_images_are_those_of_the_flow(plain):
    flow, x = plain
    y = LABELS["ids"]
    out = flow(x, y, ["block.2.layer.1", "block.2.out"])
    result = rl.trace(flow, x, y, "forward", "block.2.layer.1")
    assert list(result.states) == ["block.2.layer.1"], "only what was asked for is kept"
    shut(result.states["block.2.layer.1"], out.states["block.2.layer.1"].detach(), 1e-12)
    shut(result.images["block.2.out"], flow.untokenize(out.states["block.2.out"]).detach(), 1e-12)
    shut(result.images["block.1.in"], x, 0)
    shut(flow.tokenize(result.images["block.3.out"]), out.z.detach(), 1e-12)


def test_fresh_noise(plain):
    flow, _ = plain
    z = torch.randn(5, 16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for guidance in (0.0, 2.0):
        result = rl.trace(flow, z, LABELS["ids"], "reverse", "block.*.layer.2", guidance=guidance)
        made = flow.inverse(z, LABELS["ids"], guidance, taps="block.*.layer.2")
        shut(result.images["block.1.in"], made.x.detach(), 1e-12)
        for tap, state in made.states.items():
            shut(result.states[tap], state.detach(), 1e-12)
        assert result.error.max() < 1e-9, "encoding what was made gives the noise back"


def test_batches_change_nothing_and_the_round_trip_can_be_left_out(plain):
    flow, x = plain
    whole = rl.trace(flow, x, LABELS["ids"], "reverse", "block.*.layer.1")
    parts = rl.trace(flow, x, LABELS["ids"], "reverse", "block.*.layer.1", method=rl.Decoding(batch=2), check=False, path=False)
    for tap, state in whole.states.items():
        shut(parts.states[tap], state, 1e-11)
    assert parts.images == {}
    assert parts.error.isnan().all()


def test_only_what_is_asked_for_is_held(plain, monkeypatch):
    """Each batch asks the flow for the wanted taps alone, and its states are on the CPU before the next batch is read."""
    flow, x = plain
    asked = []
    forward = type(flow).forward

    def watch(self, images, y=None, taps=(), *rest):
        asked.append((len(images), list(taps)))
        return forward(self, images, y, taps, *rest)

    monkeypatch.setattr(type(flow), "forward", watch)
    rl.trace(flow, x, None, "forward", "block.3.layer.*", path=False, check=False, method=rl.Decoding(batch=2))
    assert asked == [(2, ["block.3.layer.1", "block.3.layer.2"])] * 2 + [(1, ["block.3.layer.1", "block.3.layer.2"])]


def test_a_run_and_its_flow_are_traced_alike(digits):
    run = rl.load("digits-none")
    a, b = (rl.trace(source, digits[0][:2], 1, "forward", "block.1.layer.1", check=False) for source in (run, run.flow))
    assert torch.equal(a.states["block.1.layer.1"], b.states["block.1.layer.1"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: rl.trace(f, x, direction="backward"), "unknown direction 'backward'; known: forward, reverse"),
        (lambda f, x: rl.trace(f, torch.zeros(1, 16, 4), direction="forward"), "noise cannot be encoded"),
        (lambda f, x: rl.trace(f, x[:0]), "the source is empty"),
        (lambda f, x: rl.trace(f, x, taps="block.4.layer.1"), "did you mean 'block.3.layer.1' or 'block.2.layer.1'"),
        (lambda f, x: rl.trace(f, x, 10), "label 10 is out of range"),
        (lambda f, x: rl.trace(f, torch.zeros(2, 3, 8, 8)), "images must be"),
        (lambda f, x: rl.trace(f, torch.zeros(2, 4, 4)), "noise must be"),
        (lambda f, x: rl.trace(f, x, method="fast"), "unknown decoding method 'fast'"),
    ],
)
def test_mistakes(plain, call, message):
    with pytest.raises(LabError, match=message):
        call(*plain)
