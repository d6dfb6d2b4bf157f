"""Strategies: what the features are, and which parameters their gradient reaches."""

import numpy as np
import pytest
import torch
from conftest import CONFIGS, features, make_flow
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.align.aligner import Aligner, alignment_loss
from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.encoder import Encoder
from rrepa_lab.align.projector import Projectors
from rrepa_lab.align.similarity import patch_cosine
from rrepa_lab.align.strategies.reverse import pseudo_reverse
from rrepa_lab.align.strategy import strategy_names
from rrepa_lab.align.target import match_grid
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.errors import LabError
from rrepa_lab.flow.taps import Tap

CONFIG = rl.FlowConfig(classes=10, width=32, head_width=16, blocks=4, layers=3)


def setting(taps, seed=0):
    """A perturbed flow, four images with labels (one dropped), and the alignment loss of a strategy as a function."""
    flow = make_flow(CONFIG, seed)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = torch.tensor([1, -1, 9, 4])
    target = torch.randn(4, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    torch.manual_seed(seed)
    projectors = Projectors(taps, CONFIG.width, 16, 8).double()

    def loss(strategy, refinements=0):
        aligner = Aligner(AlignConfig(strategy=strategy, refinements=refinements), projectors)
        return aligner(flow, x, y, target, taps).loss

    return flow, x, y, loss


def gradients(flow, loss):
    """Gradient by parameter name; None where the graph does not reach."""
    names, parameters = zip(*flow.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def reached(grads):
    return {name for name, grad in grads.items() if grad is not None and bool((grad != 0).any())}


def flat(grads, prefix):
    return torch.cat([grad.flatten() for name, grad in grads.items() if name.startswith(prefix) and grad is not None])


@pytest.mark.parametrize("strategy", strategy_names()[1:])
def test_all_strategies_see_the_same_features(strategy):
    flow, x, y, _ = setting([])
    taps = flow.resolve("block.[234].layer.*")
    plain = flow(x, y, [tap.name for tap in taps]).states
    _, aligned = features(flow, x, y, strategy, taps)
    assert set(aligned) == set(plain)
    for tap, states in aligned.items():
        assert_close(states, plain[tap], atol=1e-10, rtol=0)


def test_rebuilt_tokens_equal_the_cached_ones():
    flow, x, y, _ = setting([])
    encoded = flow(x, y, [f"block.{t}.in" for t in (1, 2, 3, 4)])
    cache = {t: encoded.states[f"block.{t}.in"].detach() for t in (1, 2, 3, 4)}
    for refinements in (0, 1, 3):
        rebuilt = pseudo_reverse(flow, encoded.z.detach(), cache, flow.condition(y, 4), {}, refinements).rebuilt
        for t, tokens in rebuilt.items():
            assert_close(tokens, cache[t], atol=1e-10, rtol=0)
            assert tokens.requires_grad


def test_full_refinement_is_the_exact_reverse():
    flow, _, _, loss = setting(["block.2.layer.2", "block.3.layer.1"])
    exact = gradients(flow, loss("reverse-exact"))
    full = gradients(flow, loss("reverse", refinements=CONFIG.tokens - 1))
    assert reached(full) == reached(exact)
    for name, grad in exact.items():
        if grad is not None:
            assert_close(full[name], grad, atol=1e-8, rtol=0)


def test_pseudo_reverse_points_where_the_exact_one_points():
    """Cosine of the gradients on the bundled aligned flow, a number a block (`pytest -s` shows them)."""
    table = rl.routing(rl.load("digits-reverse"), ["reverse", "reverse-exact"])
    table = table[(table.block > 0) & (table.gradient_norm > 0)].set_index(["tap", "block", "group"])
    exact, pseudo = (table[table.strategy == name] for name in ("reverse-exact", "reverse"))
    assert exact.cosine_with_exact.to_numpy() == pytest.approx(np.ones(len(exact)), abs=1e-12)
    products = (pseudo.cosine_with_exact * pseudo.gradient_norm * exact.gradient_norm).groupby(["tap", "block"]).sum()
    lengths = [np.sqrt((part.gradient_norm**2).groupby(["tap", "block"]).sum()) for part in (exact, pseudo)]
    cosines = products / (lengths[0] * lengths[1])
    print(cosines.to_string())
    assert cosines.min() > 0.5
    assert cosines.max() < 1 - 1e-6, "not the same computation by accident"


def test_refinements_approach_the_exact_gradient():
    flow, _, _, loss = setting(["block.2.layer.2"])
    exact = flat(gradients(flow, loss("reverse-exact")), "")
    errors = [float((flat(gradients(flow, loss("reverse", k)), "") - exact).norm() / exact.norm()) for k in (0, 2, 8, 15)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-12


def test_a_feature_on_the_cached_tokens_would_be_detach():
    """The mistake that is easy to make: mu and alpha from the cache, and the feature from the cache as well."""
    taps = ["block.2.layer.2", "block.3.layer.2"]
    flow, x, y, loss = setting(taps)
    encoded = flow(x, y, [f"block.{t}.in" for t in (2, 3, 4)])
    cache = {t: encoded.states[f"block.{t}.in"].detach() for t in (2, 3, 4)}
    wrong = {}
    for t in (2, 3):
        block = flow.block(t)
        wrong[f"block.{t}.layer.2"] = block(block.features, cache[t], flow.condition(y, 4).of_block(t), {2})[2]
    torch.manual_seed(0)
    projectors = Projectors(taps, CONFIG.width, 16, 8).double()
    target = torch.randn(4, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mistaken = alignment_loss({tap: patch_cosine(projectors.project(tap, states), target) for tap, states in wrong.items()})
    grads, detach, reverse = gradients(flow, mistaken), gradients(flow, loss("detach")), gradients(flow, loss("reverse"))
    assert reached(grads) == reached(detach) < reached(reverse)
    for name, grad in detach.items():
        if grad is not None:
            assert_close(grads[name], grad, atol=1e-12, rtol=0)


def parts(flow, block, layers):
    """Parameter names of what enters a block and of its layers in this range."""
    names = {n for n, _ in flow.named_parameters() if n.startswith(f"blocks.{block - 1}.")}
    out = {n for n in names if ".proj_out." in n}
    inner = {n for n in names if any(f".layers.{layer - 1}." in n for layer in range(1, flow.config.layers + 1))}
    wanted = {n for n in inner if any(f".layers.{layer - 1}." in n for layer in layers)}
    return (names - out - inner) | wanted, names


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("layer", [1, 2])
def test_each_strategy_reaches_exactly_what_it_should(block, layer):
    flow, _, _, loss = setting([f"block.{block}.layer.{layer}"])
    upto, whole_block = parts(flow, block, range(1, layer + 1))
    before = set().union(*(parts(flow, t, ())[1] for t in range(1, block)))
    after = set().union(*(parts(flow, t, ())[1] for t in range(block + 1, 5)))
    assert reached(gradients(flow, loss("forward"))) == before | upto
    assert reached(gradients(flow, loss("detach"))) == upto
    for strategy, refinements in (("reverse", 0), ("reverse", 1), ("reverse-exact", 0)):
        got = reached(gradients(flow, loss(strategy, refinements)))
        # all of block t, layers after l included, and every block after it; nothing below
        assert got == whole_block | after, strategy


def test_reverse_on_several_blocks_starts_at_the_lowest():
    flow, _, _, loss = setting(["block.2.layer.1", "block.4.layer.3"])
    got = reached(gradients(flow, loss("reverse")))
    assert got == set().union(*(parts(flow, t, ())[1] for t in (2, 3, 4)))


def test_routing_table_agrees_with_the_strategies():
    table = rl.routing(
        rl.preset("digits-reverse"), strategies=["forward", "detach", "reverse"], taps="block.3.layer.2", images=4
    )
    touched = {name: set(rows[rows.gradient_norm > 0].group) for name, rows in table.groupby("strategy")}
    blocks = [f"block.{t}" for t in (1, 2, 3, 4)]
    whole_blocks = [[f"{b}.in", *(f"{b}.layer.{n}" for n in (1, 2, 3, 4)), f"{b}.out"] for b in blocks]
    upto = {"block.3.in", "block.3.layer.1", "block.3.layer.2"}
    assert touched["detach"] == {"projector"} | upto
    assert touched["forward"] == {"projector"} | upto | {*whole_blocks[0], *whole_blocks[1]}
    assert touched["reverse"] == {"projector", *whole_blocks[2], *whole_blocks[3]}
    flow = rl.TarFlow(rl.preset("digits-reverse").flow)
    assert table[table.strategy == "detach"].parameters.iloc[1:].sum() == sum(p.numel() for p in flow.parameters())


def test_parameter_groups_cover_the_flow_once():
    run = rl.load("digits-reverse")
    grouped = [id(p) for group in run.flow.parameter_groups() for p in group.parameters]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in run.flow.parameters()}


def test_alignment_of_a_bundled_run(digits):
    x, y = digits[0][:32], digits[1][:32]
    run = rl.load("digits-reverse")
    for parameter in run.flow.parameters():
        parameter.requires_grad_()
    result = rl.alignment(run, x, y)
    assert result.similarity.keys() == set(run.config.align.taps)
    assert_close(result.loss.item(), -sum(result.similarity.values()) / len(result.similarity), atol=1e-6, rtol=0)
    assert min(result.similarity.values()) > 0.5, "an aligned run should be near its encoder"
    result.loss.backward()
    lowest = min(run.config.align.blocks)
    got = {
        t
        for t in range(1, run.flow.config.blocks + 1)
        if any(p.grad is not None and p.grad.any() for p in run.flow.block(t).parameters())
    }
    assert got == set(range(lowest, run.flow.config.blocks + 1))


def test_alignment_errors():
    run = rl.load("digits-none")
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(LabError, match="has no projector for block.3.layer.2"):
        rl.alignment(run, x, strategy="reverse", taps="block.3.layer.2")
    with pytest.raises(LabError, match="unknown strategy 'backward'"):
        rl.alignment(run, x, strategy="backward")
    with pytest.raises(LabError, match=r"block\.3\.in cannot be aligned"):
        rl.alignment(run, x, strategy="reverse", taps="block.3.in")


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_encoder_owns_resize_normalisation_and_trimming():
    # class and register tokens, another size, three channels: none of it is the caller's business
    config = EncoderConfig(model="vit_small_patch14_reg4_dinov2", weights="random", image_size=28, args={"depth": 1})
    encoder = Encoder(config)
    assert (encoder.grid, encoder.dim) == ((2, 2), 384)
    out = encoder(torch.rand(2, 1, 8, 8) * 2 - 1)
    assert out.shape == (2, 4, 384)
    assert not out.requires_grad
    # by hand: resized to 28, in [0, 1], normalised with timm's own numbers, prefix tokens dropped
    x = torch.rand(2, 3, 28, 28)
    mean, std = (torch.tensor(encoder.model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        by_hand = encoder.model.forward_features((x - mean) / std)[:, encoder.model.num_prefix_tokens :]
    assert encoder.model.num_prefix_tokens == 5
    assert_close(encoder(x * 2 - 1), by_hand, atol=1e-5, rtol=1e-5)


def test_encoder_never_trains():
    encoder = Encoder(EncoderConfig(model="vit_tiny_patch16_224", weights="random", image_size=16, args={"depth": 1})).train()
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_convolutional_encoder():
    encoder = Encoder(EncoderConfig(model="resnet10t", weights="random", image_size=64))
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 4, encoder.dim)


def test_local_weights_file(tmp_path):
    from safetensors.torch import save_file

    config = EncoderConfig(model="vit_tiny_patch16_224", weights="random", image_size=32, args={"depth": 1})
    first = Encoder(config)
    save_file(first.model.state_dict(), tmp_path / "w.safetensors")
    second = Encoder(config.override({"weights": str(tmp_path / "w.safetensors")}))
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(first(x), second(x))
    other = Encoder(config.override({"weights": "random:1"}))
    assert not torch.equal(other(x), first(x)), "weights of another seed should differ"


def test_encoder_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(LabError, match="unknown timm model 'vit_bas'"):
        Encoder(EncoderConfig(model="vit_bas"))
    with pytest.raises(LabError, match="no encoder weights at .*nothing.safetensors"):
        Encoder(EncoderConfig(model="vit_tiny_patch16_224", weights="nothing.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights")
    with pytest.raises(LabError, match="does not hold weights of vit_tiny_patch16_224"):
        Encoder(EncoderConfig(model="vit_tiny_patch16_224", weights=str(broken)))


def test_missing_hub_weights_say_what_to_do(tmp_path, monkeypatch):
    # no network here: the real call fails the way it fails for a user without one
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LabError, match="cannot be fetched; give a local file: --set encoder.weights=FILE.safetensors"):
        Encoder(EncoderConfig(model="vit_small_patch14_dinov2.lvd142m", image_size=28))


def test_match_grid():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    tokens = maps.flatten(2).transpose(1, 2)
    assert match_grid(tokens, (4, 4), 4) is tokens
    finer = match_grid(tokens, (4, 4), 2)
    assert torch.equal(finer.flatten(), torch.tensor([2.5, 4.5, 10.5, 12.5]))  # means of the 2x2 corners
    coarser = match_grid(tokens, (4, 4), 8)
    assert coarser.shape == (1, 64, 1)
    assert_close(coarser.mean(), tokens.mean())


def test_bundled_encoder_saw_no_label_and_beats_an_untrained_one():
    from rrepa_lab.data.config import DataConfig
    from rrepa_lab.runs.presets import DIGITS_VIT
    from rrepa_lab.training.selfsup import knn_table

    table = knn_table(Encoder(DIGITS_VIT.override({"weights": "bundled:digits"})), DataConfig()).set_index("features")
    accuracy = table.knn_accuracy
    assert accuracy["encoder"] > 0.96
    assert accuracy["encoder"] > accuracy["untrained encoder"] + 0.2


def test_flow_without_classes_can_be_aligned():
    flow = make_flow(CONFIGS["unconditional"])
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    _, aligned = features(flow, x, None, "reverse", [Tap(2, 1)])
    assert aligned["block.2.layer.1"].shape == (2, 4, 16)


def test_the_table_of_refinements_ends_at_the_exact_gradient():
    """The dial of the pseudo-reverse: less error with every step, none with as many as there are tokens but one."""
    small = {"flow.blocks": 3, "flow.layers": 1, "flow.width": 16, "flow.head_width": 16, "align.projector_width": 8}
    config = rl.preset("digits-reverse").override({**small, "align.blocks": [2], "align.layers": [1]})
    table = rl.refinement_errors(config, (0, 2, 15), images=2)
    assert list(table.groupby("refinements")["block"].apply(list)) == [[2, 3]] * 3, "the aligned block and those after it"
    worst = table.groupby("refinements")["relative_error"].max()
    assert worst[0] > worst[2] > worst[15]
    assert worst[15] < 1e-10
    assert worst[0] < 0.5
    assert (table["cosine"] > 0.9).all()


def test_step_costs_say_what_a_strategy_adds():
    from rrepa_lab.bench import step_costs

    config = rl.preset("digits-reverse").override(
        {"flow.blocks": 2, "flow.layers": 1, "align.blocks": [2], "align.layers": [1]}
    )
    table = step_costs(config, [0, 2], images=2, repeats=1).set_index(["strategy", "refinements"])
    assert list(table.index) == [
        ("none", 0),
        ("forward", 0),
        ("detach", 0),
        ("reverse", 0),
        ("reverse", 2),
        ("reverse-exact", 0),
    ]
    kept = table["kept_mib"]
    assert kept["none", 0] < kept["detach", 0] == kept["reverse", 0] < kept["reverse", 2]
    assert table.loc[("none", 0), "ratio"] == 1
    # two runs keep the same: nothing is measured by the clock here
    assert kept.equals(step_costs(config, [0, 2], images=2, repeats=1).set_index(["strategy", "refinements"])["kept_mib"])
