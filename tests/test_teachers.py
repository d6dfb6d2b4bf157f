"""Teachers: models of every kind that timm has, random weights by seed, and no wait for weights that cannot be fetched."""

import time

import pytest
import torch
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.align import hub as hubs
from rrepa_lab.align.encoder import Encoder, make_teacher, out_of_memory
from rrepa_lab.align.target import grid_hint
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.errors import LabError, LabWarning

gr = pytest.importorskip("gradio")

SMALL = EncoderConfig(model="test_vit", weights="random", image_size=32)
HUB = EncoderConfig(model="vit_small_patch14_dinov2.lvd142m", image_size=28)


@pytest.mark.parametrize(
    "model", ["efficientvit_b0", "fastvit_t8", "tiny_vit_5m_224", "hiera_tiny_224", "test_vit", "test_resnet"]
)
def test_a_model_reads_the_size_that_is_set_or_names_its_own(model):
    # some models with "vit" in their name take an image size, others read any, and it is not the name that tells
    encoder = Encoder(EncoderConfig(model=model, weights="random", image_size=224 if model.startswith("hiera") else 64))
    assert encoder(torch.zeros(1, 3, 8, 8)).shape == (1, encoder.grid[0] * encoder.grid[1], encoder.dim)


@pytest.mark.parametrize(("model", "own"), [("crossvit_9_240", 240), ("efficientformer_l1", 224)])
def test_a_model_of_one_size_is_given_its_own_with_a_note(model, own):
    with pytest.warns(LabWarning, match=rf"encoder {model} does not read images of 64x64: its own size, {own}, is used"):
        encoder = Encoder(EncoderConfig(model=model, weights="random", image_size=64))
    assert encoder.config.image_size == own
    assert encoder.prepare(torch.zeros(1, 3, 8, 8)).shape == (1, 3, own, own)
    assert encoder(torch.zeros(1, 3, 8, 8)).shape == (1, encoder.grid[0] * encoder.grid[1], encoder.dim)


@pytest.mark.parametrize("args", [{"depht": 1}, {"embed_dim": "wide"}, {"img_size": "x"}])
def test_arguments_that_the_model_does_not_take_are_one_line(args):
    with pytest.raises(LabError, match=r"timm cannot make test_vit with encoder.args .*Error: "):
        Encoder(SMALL.override({"args": args}))


def test_random_weights_are_those_of_their_seed():
    x = torch.rand(2, 3, 32, 32)
    state = torch.random.get_rng_state()
    first, other = Encoder(SMALL), Encoder(SMALL.override({"weights": "random:1"}))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(first(x), Encoder(SMALL)(x))
    assert torch.equal(first(x), Encoder(SMALL.override({"weights": "random:0"}))(x))
    assert not torch.allclose(first(x), other(x))


@pytest.mark.parametrize("weights", ["random:", "random:-1", "random:x", "random:99999999999999999999", "Random"])
def test_other_spellings_of_random_are_one_line(weights):
    with pytest.raises(LabError, match=r"encoder\.weights"):
        Encoder(SMALL.override({"weights": weights}))


def test_out_of_memory_and_bugs_are_not_called_missing_weights(monkeypatch, tmp_path):
    import timm

    path = tmp_path / "w.pth"
    torch.save(Encoder(SMALL).model.state_dict(), path)
    real = timm.create_model

    def fails(error):
        def create(name, pretrained=False, **rest):
            if pretrained:
                raise error
            return real(name, pretrained=False, **rest)

        return create

    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert out_of_memory(error)
        monkeypatch.setattr(timm, "create_model", fails(error))
        for config in (SMALL.override({"weights": str(path)}), HUB):
            with pytest.raises(type(error), match="memory"):
                Encoder(config)
    monkeypatch.setattr(timm, "create_model", fails(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        Encoder(HUB)


def test_timm_without_weights_of_a_model_is_one_line():
    with pytest.raises(LabError, match=f"timm has no weights of {untrained()}: give a local file"):
        Encoder(EncoderConfig(model=untrained()))


def untrained():
    """A model that timm has no weights of."""
    import timm

    known = {name.split(".")[0] for name in timm.list_models("vit_*", pretrained=True)}
    return sorted(set(timm.list_models("vit_*")) - known)[0]


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache and a network in which every connection waits and then fails; the requests that were tried."""
    from huggingface_hub import constants

    tried = []

    class Session:
        def head(self, url, timeout):
            tried.append((url, timeout))
            raise ConnectionError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(hubs._State, "last_failure", -float("inf"))
    return tried


def test_a_hub_that_does_not_answer_is_tried_once_and_shortly(no_network):
    from huggingface_hub import constants

    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(LabError, match=r"weights of vit_small.* cannot be fetched; give a local file"):
            Encoder(HUB)
    assert no_network == [(constants.ENDPOINT, hubs.TIMEOUT)]
    assert time.monotonic() - began < 30  # five retries of each of five files took a minute
    assert not constants.HF_HUB_OFFLINE


@pytest.fixture
def unaligned(trained, no_network):
    """A run without alignment, whose preset names a teacher that is not on this machine."""
    run = rl.load(trained)
    run.config = run.config.override({"align.strategy": "none"}).model_copy(update={"encoder": HUB})
    return run


def test_an_unaligned_run_needs_no_teacher(unaligned, no_network):
    with pytest.warns(LabWarning, match="is not aligned, and its encoder is left out: weights of vit_small"):
        table = rl.probe(unaligned, ["block.1.layer.1"], probes=["knn"], limit=40)
    assert set(table["tap"]) == {"block.1.layer.1", "pixels"}
    assert no_network == [], "nothing is fetched for a run that was trained without it"
    with pytest.raises(LabError, match="cannot be fetched"):
        rl.similarity(unaligned, images=rl.Images(limit=40))  # to be like the encoder is what is measured


def test_an_aligned_run_needs_its_teacher(unaligned):
    unaligned.config = rl.preset("digits-reverse").model_copy(update={"encoder": HUB})
    with pytest.raises(LabError, match="cannot be fetched"):
        unaligned.reference_encoder()


def test_a_random_teacher_is_the_same_in_training_and_after_it(trained, tmp_path):
    config = rl.load(trained).config.override({"train.steps": 2, "train.eval_every": 2, "train.save_every": 2})
    config = config.model_copy(update={"encoder": SMALL.override({"weights": "random:3", "channels": 1, "image_size": 64})})
    seen = []
    for name in ("a", "b"):
        for _ in rl.train(config, tmp_path / name, device="cpu"):
            torch.rand(1)  # whatever else happens to the global random state
        run = rl.load(tmp_path / name)
        seen.append((run.encoder()(torch.zeros(1, 1, 8, 8)), run.weights()))
    assert torch.equal(seen[0][0], seen[1][0])
    for name, value in seen[0][1].items():
        assert_close(value, seen[1][1][name], rtol=0, atol=0)


def test_a_coarse_grid_of_patches_is_a_hint():
    encoder = Encoder(EncoderConfig(model="vit_tiny_patch16_224", weights="random", image_size=224, args={"depth": 1}))
    assert encoder.grid == (14, 14)
    hint = (
        "the teacher has 14x14 patches for 16x16 tokens, and its features are interpolated; encoder.image_size=256 gives 16x16"
    )
    assert grid_hint(encoder, 16).startswith(hint)
    finer = Encoder(EncoderConfig(model="vit_tiny_patch16_224", weights="random", image_size=256, args={"depth": 1}))
    assert finer.grid == (16, 16)
    for side in (16, 8):
        assert grid_hint(finer, side) == ""


def test_a_training_warns_of_a_coarse_grid_of_patches(tiny, tmp_path):
    config = tiny.model_copy(update={"encoder": SMALL.override({"channels": 1})})
    with pytest.warns(LabWarning, match="the teacher has 2x2 patches for 4x4 tokens, .* encoder.image_size=64 gives 4x4"):
        next(rl.train(config, tmp_path / "run", device="cpu"))


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_draws_a_run_whose_teacher_is_not_there_and_says_so(unaligned, no_network, monkeypatch):
    from tabs import reverse_path
    from tabs.trajectories import ReversePathView

    for strategy in ("none", "reverse"):
        config = unaligned.config.override({"align.strategy": strategy, "align.blocks": [2], "align.layers": [1]})
        run = rl.load(unaligned.directory)
        run.config = config
        monkeypatch.setattr(reverse_path, "pair", lambda first, second, run=run: {"mine": run})
        began = time.monotonic()
        view, _, words = reverse_path.draw_features(ReversePathView(run="mine", other="", block=1, layer=1))
        assert "features, block.1.layer.1" in view
        assert "the teacher" not in view.replace("the teacher&#x27;s", "")
        assert "its teacher vit_small_patch14_dinov2.lvd142m is not shown: no weights on this machine" in words
        assert time.monotonic() - began < 30
    assert no_network == [], "the page downloads no teacher"


def test_an_error_leaves_nothing_of_the_view_before(monkeypatch):
    from dataclasses import dataclass

    from page.panels import Code, Panel, Sidebar, Tab, drawing
    from page.views import View

    @dataclass(frozen=True)
    class NumberView(View):
        value: int = 0

    reported = []
    monkeypatch.setattr(gr, "Warning", lambda message, **more: reported.append(message))

    def draw(view):
        if view.value < 0:
            raise LabError("below zero")
        return f"<b>{view.value}</b>", f"value {view.value}", view.value

    def stream(view):
        yield "<b>begun</b>", "begun", 0
        yield draw(view)

    outputs = [gr.HTML(), gr.Markdown(), gr.Slider(0, 1)]
    sidebar, value = Sidebar(gr.Dropdown(), gr.Dropdown(), gr.Number()), gr.Number()
    for function in (draw, stream):
        panel = Panel(outputs, function, locked=False)
        tab = Tab(NumberView, sidebar, {"value": value}, [panel], lambda _: Code("", ""))
        handler = drawing(tab, panel, lambda _: True)

        def updates(seed, number, handler=handler, streamed=function is stream):
            values = {sidebar.run: "a", sidebar.other: "", sidebar.seed: seed, value: number}
            return list(handler(values))[-1] if streamed else handler(values)

        assert updates(0, 3) == ("<b>3</b>", "value 3", 3)
        html, text, slider = updates(0, -1)
        assert html["value"] is None
        assert text["value"] is None
        assert "value" not in slider, "controls keep their values"
        assert reported.pop() == "below zero"
        html, *_ = updates(-5, 3)
        assert html["value"] is None
        assert reported == [], "a seed out of range is reported once for the tab, not by its panels"


def test_bundled_weights_bring_the_settings_they_were_trained_with():
    """By name alone, also in place of another teacher; settings that are given stay."""
    alone = EncoderConfig(weights="bundled:cifar10")
    assert (alone.model, alone.image_size, alone.channels, alone.layer) == ("resnet10t", 32, 3, 2)
    changed = rl.preset("cifar10-tiny-reverse").override({"encoder.weights": "bundled:cifar10"}).encoder
    assert changed == alone
    assert EncoderConfig(weights="bundled:cifar10", layer=3).layer == 3
    teacher = make_teacher(alone)
    assert (teacher.dim, teacher.grid) == (64, (8, 8))
    assert teacher(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 64)
    with pytest.raises(LabError, match="no encoder weights at"):
        make_teacher(EncoderConfig(weights="bundled:nothing", model="resnet10t"))
