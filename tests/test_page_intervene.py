"""The tab "Intervene": what it shows is what the library answers."""

import re
from types import SimpleNamespace

import pytest
import torch

import rrepa_lab as rl
from rrepa_lab.errors import LabError

gr = pytest.importorskip("gradio")
from tabs.intervene import tab as intervene  # noqa: E402
from tabs.intervene.computed import HEAD, InterveneView, answer_of, part_choices, token_numbers  # noqa: E402

VIEWS = {
    "a layer": {},
    "some tokens": {"part": "tokens before the block", "tokens": "0..7,9"},
    "half of a head": {"part": f"{HEAD}1", "strength": 0.5},
    "removed": {"action": "remove", "part": "attention", "keep": "the image"},
    "class mean": {"action": "steer", "towards": "3", "strength": 2.0},
    "component": {"action": "steer", "towards": "component 2", "part": "tokens before the block"},
    "photographs": {"action": "steer", "towards": "dog"},
    "generated": {"images": "generated images", "seed": 4},
}


@pytest.mark.parametrize(
    ("name", "run"), [(name, "cifar10-reverse" if name == "photographs" else "digits-reverse") for name in VIEWS]
)
def test_the_code_of_a_view_gives_its_numbers(name, run):
    view = InterveneView(run=run, other="", **VIEWS[name])
    _, pictures, figure, lines = intervene.draw(view)
    got: dict = {}
    exec(intervene.code(view).python, got)
    answer = answer_of(view.run, view).found
    assert torch.allclose(got["found"].images, answer.images, atol=1e-5)
    nats = float(answer.delta_log_prob[0])
    assert float(got["found"].delta_log_prob[0]) == pytest.approx(nats, abs=1e-3)
    assert f"changes by **{round(nats, 2) + 0.0:+,.2f} nats**" in lines
    assert sum(figure.data[0].y) == pytest.approx(nats, abs=1e-3)
    assert pictures.count("<img") == (4 if view.action == "patch" else 3)


def test_a_patch_is_that_of_the_library():
    run = rl.load("digits-reverse")
    x = run.data("test").x[[5, 8]]
    expected = rl.patch(run, x[1:], x[:1], "block.2.layer.3", tokens=[4, 5])
    shown = answer_of("digits-reverse", InterveneView(target=5, source=8, block=2, layer=3, tokens="4..5")).found
    assert torch.equal(shown.images, expected.images)
    assert torch.equal(shown.delta_by_block, expected.delta_by_block)


def test_photographs_without_their_data_are_samples():
    view = InterveneView(run="cifar10-reverse", other="cifar10-none", source=3)
    brush, pictures, figure, lines = intervene.draw(view)
    assert brush.count('class="token"') == 64
    assert [one.name.split(",")[0] for one in figure.data] == ["cifar10-reverse", "cifar10-none"]
    names = rl.load("cifar10-reverse").classes
    assert re.search(f"target, sample 1, {names[1]}", pictures), "classes have names"
    assert "**cifar10-none**: log p of the picture changes by" in lines


def test_a_smaller_flow_has_its_nearest_part():
    run = rl.load("digits-none")
    fitted = intervene.fit(run, InterveneView(block=9, layer=9, part=f"{HEAD}99", target=5000, towards="frog"))
    assert (fitted["block"].value, fitted["part"].value, fitted["towards"].value) == (4, "layer", run.classes[0])
    assert fitted["tokens"] == ""
    for tokens, kept in (("0..7", "0..7"), ("0..40", ""), ("x", ""), ("", "")):
        assert intervene.fit(run, InterveneView(tokens=tokens))["tokens"] == kept, "a link keeps its tokens"
    assert fitted["target"].value == len(run.data("test").x) - 1
    assert part_choices(run)[-1] == f"{HEAD}{run.flow.config.width // run.flow.config.head_width}"


def test_tokens_are_numbers_and_ranges():
    assert token_numbers("") is None
    assert token_numbers("0..3, 7") == (0, 1, 2, 3, 7)
    with pytest.raises(LabError, match="numbers and ranges"):
        token_numbers("a..b")
    with pytest.raises(LabError, match="must be some of 0..15"):
        intervene.draw(InterveneView(tokens="99"))
    assert intervene.brushed(SimpleNamespace(index=[0, 1, 2, 7, 9, 10])) == "0..2,7,9..10"
    assert intervene.brushed(SimpleNamespace(index=[])) == ""


def test_a_vector_has_a_layer_or_tokens():
    with pytest.raises(LabError, match="choose one"):
        intervene.draw(InterveneView(action="steer", part="attention"))
