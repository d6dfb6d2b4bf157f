"""What separates curvature from overfitting in the accuracy of one gradient step, on cases whose answer is known."""

import pytest
import torch
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.analysis import step_gap as gaps
from rrepa_lab.analysis.step_gap import step_gap
from rrepa_lab.errors import LabError

CLASSES = 5


def part(count, margin, curvature, seed):
    """Gains whose true class leads by `margin` on average, and curvatures of this size, centred over classes."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    gain = torch.randn(count, CLASSES, generator=draw, dtype=torch.float64)
    gain[torch.arange(count), y] += margin
    curved = curvature * torch.randn(count, CLASSES, generator=draw, dtype=torch.float64)
    gain, curved = (scores - scores.mean(dim=1, keepdim=True) for scores in (gain, curved))
    return gaps._Part(gain, curved, y)


@pytest.mark.parametrize(
    ("test_margin", "test_curvature", "guilty"), [(2.0, 1.5, "gain"), (4.0, 4.0, "curvature"), (4.0, 1.5, None)]
)
def test_the_cause_is_found(monkeypatch, test_margin, test_curvature, guilty):
    parts = {"train": part(1500, 4.0, 1.5, 0), "test": part(500, test_margin, test_curvature, 1)}
    monkeypatch.setattr(gaps, "_part", lambda run, images, noise: parts[images.split])
    run = rl.load("digits-none")
    found = step_gap(run)
    effects = found.effects.set_index("effect")
    for name in ("gain", "curvature"):
        row = effects.loc[f"{name} of the second split"]
        assert row["low"] <= row["value"] <= row["high"]
        if name == guilty:
            assert row["high"] < -0.03
        else:
            assert row["low"] - 0.02 < 0 < row["high"] + 0.02
            assert abs(row["value"]) < 0.03
    own = found.table[found.table["curvature_of"] == "the same image"].set_index(["gain_of", "metric"])["value"]
    assert_close(own["test", "curvature"], float(gaps._against(parts["test"].curvature, parts["test"].y).pow(2).mean() ** 0.5))
    mixed = found.table[found.table["curvature_of"] != "the same image"]
    assert len(mixed) == 4
    assert mixed["value"].between(0, 1).all()


def test_gain_less_curvature_is_the_gradient_score():
    run = rl.load("digits-reverse")
    made = gaps._part(run, rl.Images("test", limit=40), rl.NoiseSamples())
    x, y = run.data("test", 40)
    step = rl.classify(run, x, "gradient").scores.double() * len(run.classes)
    bayes = rl.classify(run, x, "bayes").scores.double()
    assert_close(made.gain - made.curvature, step)
    assert_close(made.gain, bayes - bayes.mean(dim=1, keepdim=True))
    assert torch.equal(made.y, y)


def test_an_image_is_never_its_own_partner():
    y = torch.arange(40) % 2
    # only image 0 has a curvature, and it turns whatever it is added to wrong: all others of its class may meet it
    wrong = torch.zeros(40, 2, dtype=torch.float64)
    wrong[0] = torch.tensor([5.0, -5.0])
    gain = torch.stack([1.0 - y, y.double()], dim=1).double()
    other = gaps._Part(gain, wrong, y)
    draw = torch.Generator().manual_seed(0)
    hits = torch.stack([gaps._exchanged(other, other, True, draw) for _ in range(400)])
    assert hits[:, 0].all(), "image 0 keeps a gain that is right, and never meets itself"
    assert not hits[:, 2::2].all()
    assert hits[:, 1::2].all(), "partners are of the same class"


def test_errors(monkeypatch):
    run = rl.load("digits-none")
    with pytest.raises(LabError, match="compares two splits, not 1"):
        step_gap(run, ["test"])
    with pytest.raises(LabError, match=r"single image in the \w+ split"):
        step_gap(run, limit=10)
    with pytest.raises(LabError, match="partners"):
        step_gap(run, partners=0)
