"""Interventions: a state is exchanged, moved or removed. The answers are compared with hooks and loops written by hand."""

import pytest
import torch
from conftest import CONFIGS, make_flow
from test_contracts import CouplingFlow
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.analysis.intervene import log_prob_terms
from rrepa_lab.data.images import Batch
from rrepa_lab.errors import LabError
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.flow.tarflow.components import components
from rrepa_lab.runs.run import build

LAYER, HEAD, BLOCK, BORDER = "block.2.layer.1", "block.2.layer.2.head.2", "block.2", "block.3.in"
PLACES = (LAYER, HEAD, BLOCK, BORDER, "block.1.layer.2.mlp", "block.3.layer.1.attention")
Y, SOURCE_Y = torch.tensor([3, -1, 7]), torch.tensor([5, 2, -1])


def close(one, other, atol=1e-10):
    assert_close(one, other, atol=atol, rtol=0)


def random_images(seed):
    return torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def flow():
    """Float64, away from its zero start."""
    config = rl.FlowConfig(classes=10, width=32, head_width=16, blocks=3, layers=2, positions="rotary", mlp="swiglu")
    return make_flow(config).requires_grad_(False)


@pytest.fixture(scope="module")
def x():
    return random_images(1)


@pytest.fixture(scope="module")
def source():
    return random_images(2)


@pytest.fixture(scope="module")
def run(flow):
    found = build(rl.RunConfig.from_dict({"flow": flow.config.to_dict()}), [str(k) for k in range(10)])
    found.flow = flow
    return found


# --- changes nothing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("config", ["plain", "rotary-swiglu", "volume-preserving", "colour"])
def test_a_state_in_its_own_place_changes_nothing(config, place, direction):
    """Patching an image with itself, and moving by nothing, in every kind of flow."""
    flow = make_flow(CONFIGS[config])
    c = flow.config
    if place not in {one.name for one in components(flow)} | {tap.name for tap in flow.resolve("*")}:
        place = {HEAD: "block.2.layer.1.head.1", BORDER: "block.2.in"}.get(place, "block.1.layer.1.mlp")
    x = torch.randn(2, *c.image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = torch.tensor([1, -1])
    for found in (
        rl.patch(flow, x, x, place, y=y, direction=direction, record="*"),
        rl.steer(flow, x, place, torch.ones(1, dtype=torch.float64).expand(width(flow, place)), 0.0, y=y, direction=direction,
                 record="*"),
    ):  # fmt: skip
        close(found.images, x)
        close(found.delta_by_block, torch.zeros(2, c.blocks, dtype=torch.float64))
        close(found.delta_prior, torch.zeros(2, dtype=torch.float64))
        for name, state in found.states.items():
            close(state, found.before.states[name])
        assert float(found.round_trip.max()) < 1e-10


def width(flow, place):
    c = flow.config
    if place.endswith((".in", ".out")):
        return c.token_size
    if place.count(".") == 1:
        return c.token_size * (1 if c.volume_preserving else 2)
    return c.head_width if "head" in place else c.width


# --- against hooks and loops written by hand --------------------------------------------------------------------------


def by_hand(flow, z, block, put):
    """Generate token by token, while `put(state, position)` replaces the output (B, 1, D) of layer 1 of one block.

    `position` counts tokens in the order of the image. The loop of `AffineBlock.invert` calls the layer once for a token.
    """
    condition, tokens = flow.condition(Y, len(z)), z
    for number in range(flow.config.blocks, 0, -1):
        own = flow.block(number)
        calls = []

        def hook(_module, _inputs, out, own=own, calls=calls):
            position = len(calls)
            calls.append(position)
            return put(out, flow.config.tokens - 1 - position if own.reversed_order else position)

        handle = own.transformer.layers[0].register_forward_hook(hook) if number == block else None
        tokens, _ = own.invert(tokens, condition.of_block(number))
        if handle is not None:
            handle.remove()
            assert len(calls) == flow.config.tokens - 1
    return flow.untokenize(tokens)


@pytest.mark.parametrize("tokens", [None, [0, 3, 9]])
@pytest.mark.parametrize("block", [2, 3])  # of reversed and of image order
def test_patching_a_layer_while_generating_equals_hooks_in_the_loop_over_tokens(flow, x, source, block, tokens):
    tap = f"block.{block}.layer.1"
    state = flow(source, SOURCE_Y, tap).states[tap]
    z = flow(x, Y).z

    def put(out, position):
        return state[:, position : position + 1] if tokens is None or position in tokens else out

    expected = by_hand(flow, z, block, put)
    found = rl.patch(flow, Batch(source, SOURCE_Y), x, tap, y=Y, tokens=tokens)
    close(found.images, expected, 1e-8)
    assert float((found.images - x).abs().max()) > 0.01
    close(found.delta_log_prob, flow.log_prob(expected, Y) - flow.log_prob(x, Y), 1e-6)
    close(found.before.x["block.1.in"], x, 1e-8)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("place", [LAYER, BORDER])
def test_the_strength_of_a_patch_mixes_the_states(flow, x, source, place, direction):
    given = {"y": Y, "direction": direction, "record": "*"}
    none, all_, half = (rl.patch(flow, source, x, place, strength, **given) for strength in (0, 1, 0.5))
    close(none.delta_log_prob, torch.zeros(3, dtype=torch.float64))
    close(all_.images, rl.patch(flow, source, x, place, **given).images)
    if place == BORDER:
        close(half.states[place], (none.states[place] + all_.states[place]) / 2, 1e-8)
    assert float((half.images - none.images).abs().max()) > 1e-3
    assert float((half.images - all_.images).abs().max()) > 1e-3
    weaker = rl.ablate(flow, x, LAYER, 0.5, y=Y, record=(LAYER, "block.2.in"))
    added = weaker.states[LAYER] - inputs_of(flow, weaker.states["block.2.in"])
    before = weaker.before.states[LAYER] - inputs_of(flow, weaker.before.states["block.2.in"])
    close(added, before / 2)


def test_steering_a_layer_while_generating_equals_hooks_in_the_loop_over_tokens(flow, x):
    vector = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = by_hand(flow, flow(x, Y).z, 2, lambda out, position: out + 0.7 * vector * (position in (1, 2)))
    found = rl.steer(flow, x, LAYER, vector, 0.7, y=Y, tokens=[1, 2])
    close(found.images, expected, 1e-8)
    assert float((found.images - x).abs().max()) > 0.01


def test_removing_a_layer_while_generating_equals_a_flow_that_skips_it(flow, x):
    z, condition, tokens = flow(x, Y).z, flow.condition(Y, 3), flow(x, Y).z
    for number in range(3, 0, -1):
        own = flow.block(number)
        first = own.transformer.layers[0]
        handle = first.register_forward_hook(lambda _module, inputs, _out: inputs[0]) if number == 2 else None
        tokens, _ = own.invert(tokens, condition.of_block(number))
        if handle is not None:
            handle.remove()
    found = rl.ablate(flow, x, LAYER, y=Y, direction="reverse")
    close(found.images, flow.untokenize(tokens), 1e-8)
    close(found.run(found.images, Y).z, z, 1e-8)


def test_removing_a_head_equals_zeros_in_the_projection(flow, x):
    """Without head 2, the projection of the attention has no use for its columns."""
    weight = flow.block(2).transformer.layers[1].attention.proj.weight
    kept = weight.clone()
    weight[:, 16:] = 0
    expected = flow.log_prob(x, Y)
    weight.copy_(kept)
    found = rl.ablate(flow, x, HEAD, y=Y)
    close(found.delta_log_prob, expected - flow.log_prob(x, Y))
    assert float(found.delta_log_prob.abs().min()) > 1e-3
    close(found.delta_by_block[:, 0], torch.zeros(3, dtype=torch.float64))  # block 1 comes before


def test_removing_a_block_leaves_its_tokens(flow, x):
    found = rl.ablate(flow, x, BLOCK, y=Y, record="block.2.*")
    close(found.states["block.2.out"], found.states["block.2.in"])
    close(found.delta_by_block[:, 1], flow.block(2).affine(found.states["block.2.in"], flow.condition(Y, 3)).alpha.sum((1, 2)))


def test_the_mean_takes_the_place_of_what_is_removed(flow, x):
    one = rl.ablate(flow, x[:1], LAYER, y=3, mean=True)  # the mean over one image is its own update
    close(one.delta_log_prob, torch.zeros(1, dtype=torch.float64))
    several = rl.ablate(flow, x, LAYER, y=Y, mean=True, record="block.2.*")
    added = several.states[LAYER] - inputs_of(flow, several.states["block.2.in"])
    close(added, added.mean(dim=0, keepdim=True).expand_as(added))


def inputs_of(flow, tokens):
    """What enters layer 1 of block 2, (B, T, D) in image order."""
    block = flow.block(2)
    h = block.embed_tokens(block.to_block_order(tokens), 0, block.embed_label(flow.condition(Y, 3)))
    return block.to_block_order(h)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_tokens_between_blocks_have_one_answer_in_both_directions(flow, x, source, direction):
    """The edited tokens give noise and image by the flow itself."""
    state = flow(source, SOURCE_Y, "block.2.out").states["block.2.out"]
    tokens = flow(x, Y, "block.2.out").states["block.2.out"].clone()
    tokens[:, [2, 5]] = state[:, [2, 5]]
    condition = flow.condition(Y, 3)
    below = tokens
    for number in (2, 1):
        below, _ = flow.block(number).invert(below, condition)
    found = rl.patch(flow, Batch(source, SOURCE_Y), x, "block.3.in", y=Y, tokens=[2, 5], direction=direction)
    close(found.images, flow.untokenize(below), 1e-8)
    close(found.delta_log_prob, flow.log_prob(flow.untokenize(below), Y) - flow.log_prob(x, Y), 1e-6)
    again = rl.patch(flow, Batch(source, SOURCE_Y), x, "block.2.out", y=Y, tokens=[2, 5], direction=direction)
    close(again.images, found.images)


# --- the changed flow is a flow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [LAYER, HEAD, BLOCK, [LAYER, "block.3.layer.2.mlp"]])
def test_the_density_of_the_changed_flow_is_exact(flow, x, source, place):
    """log p' is that of its own Jacobian, by autograd, and its inverse leads back."""
    found = rl.patch(flow, Batch(source, SOURCE_Y), x, place, y=Y, direction="forward")
    changed = found.run
    out = changed(x, Y)
    jacobian = torch.autograd.functional.jacobian(lambda images: changed(images, Y).z.flatten(1), x)
    for row in range(3):
        own = jacobian[row, :, row].flatten(1)
        close(out.logdet[row], torch.linalg.slogdet(own).logabsdet, 1e-8)
    close(found.delta_log_prob, changed.log_prob(x, Y) - flow.log_prob(x, Y), 1e-9)
    close(found.delta_by_block.sum(dim=1), out.logdet - flow(x, Y).logdet, 1e-9)
    close(changed.inverse(out.z, Y).x, x, 1e-8)
    close(found.images, flow.inverse(out.z, Y).x, 1e-6)
    assert float(found.delta_log_prob.abs().min()) > 1e-3


def test_the_terms_of_log_p_sum_to_it(flow, x):
    close(log_prob_terms(flow, x, flow.condition(Y, 3)).sum(dim=1), flow.log_prob(x, Y))


def test_the_flow_is_as_before_after_an_intervention(flow, x, source):
    before = flow(x, Y).z
    rl.patch(flow, source, x, LAYER, y=Y)
    with pytest.raises(LabError):
        rl.steer(flow, x, LAYER, torch.full((32,), 1e300, dtype=torch.float64), y=Y)
    assert torch.equal(flow(x, Y).z, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in flow.modules())


def test_instruments_take_the_changed_run(run, x, source):
    changed = rl.ablate(run, x.float(), LAYER, y=Y).run
    assert isinstance(changed, rl.Run)
    one, other = (rl.classify(of, x).scores for of in (run, changed))
    assert not one.allclose(other)
    assert rl.sample(changed, [0, 1], 3).images.shape == (2, 1, 8, 8)
    given = rl.patch(run, source, x, LAYER, y=Y).run
    with pytest.raises(LabError, match="holds states of 3 images: give it as many, not 2"):
        rl.classify(given, x[:2])


def test_a_family_without_layers_has_the_tokens_between_its_blocks(x, source):
    coupling = CouplingFlow(rl.FlowConfig(classes=10, blocks=3, layers=1, width=16, head_width=8)).double()
    perturb(coupling, 0)
    coupling.requires_grad_(False)
    found = rl.patch(coupling, source, x, BORDER, y=Y)
    close(found.delta_log_prob, coupling.log_prob(found.images, Y) - coupling.log_prob(x, Y), 1e-8)
    with pytest.raises(LabError, match="known for TARFlow alone, not for CouplingFlow"):
        rl.ablate(coupling, x, "block.1", y=Y)


def test_noise_of_the_run_is_on_the_images(x):
    run = rl.load("digits-reverse")
    digits = run.data("test", 2).x
    clean = rl.ablate(run, digits, "block.1")
    noisy = rl.ablate(run, digits, "block.1", noise=1)
    assert_close(clean.before.x["block.1.in"], digits)
    difference = noisy.before.x["block.1.in"] - digits
    assert 0.1 < float(difference.std()) < 0.3  # sigma 0.2


# --- steering vectors -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(run):
    """Pooled states of layer 1 of block 2, computed here, and the images."""
    x = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(5)).double()
    y = torch.arange(60) % 3
    x[y == 1] += 0.5
    states = run.flow(x, None, LAYER).states[LAYER]
    return states.mean(dim=1), rl.Images(data=Batch(x, y))


def test_a_class_vector_is_a_difference_of_means(run, features):
    states, images = features
    y = images.data.y
    found = rl.steering_vector(run, LAYER, "class", label=1, versus="2", images=images)
    assert_close(found.vector.double(), states[y == 1].mean(0) - states[y == 2].mean(0), atol=1e-6, rtol=0)
    rest = rl.steering_vector(run, LAYER, "class", label=1, images=images)
    assert_close(rest.vector.double(), states[y == 1].mean(0) - states[y != 1].mean(0), atol=1e-6, rtol=0)
    assert rest.words.startswith("mean of 1 minus mean of the others, 60")


def test_a_component_is_one_standard_deviation_along_an_eigenvector(run, features):
    states, images = features
    found = rl.steering_vector(run, LAYER, "component", component=2, images=images).vector.double()
    values, axes = torch.linalg.eigh(states.T.cov())
    assert_close(found.norm(), values[-2].sqrt(), atol=1e-6, rtol=0)
    assert abs(float(found @ axes[:, -2]) / float(found.norm())) > 1 - 1e-6
    assert float(found.sum()) > 0


def test_a_probe_vector_raises_the_logit_of_its_class(run, features):
    from sklearn.linear_model import LogisticRegression

    states, images = features
    y = images.data.y
    found = rl.steering_vector(run, LAYER, "probe", label=1, images=images).vector.double()
    scale = states.std(dim=0, correction=0)
    model = LogisticRegression(max_iter=2000).fit(((states - states.mean(0)) / scale).numpy(), y.numpy())
    slope = torch.from_numpy(model.coef_[1]) / scale
    assert float(torch.cosine_similarity(found, slope, dim=0)) > 0.999
    assert_close(float((states @ (found / found.norm())).std()), float(found.norm()), atol=1e-5, rtol=0)


def test_all_tokens_of_a_border_can_be_moved(run, features):
    _, images = features
    found = rl.steering_vector(run, BORDER, "class", label=1, images=images, protocol=rl.FeatureProtocol(pool="all"))
    assert found.vector.shape == (16, 4)
    x = images.data.x[:2]
    moved = rl.steer(run, x, BORDER, found, 0.5, record=BORDER)
    close(moved.states[BORDER] - moved.before.states[BORDER], (0.5 * found.vector.double()).expand(2, 16, 4), 1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: rl.patch(f, x, x, "block.9.layer.1"), "no part 'block.9.layer.1'"),
        (lambda f, x: rl.patch(f, x, x, "block.1.layer.1.head.3"), "2 heads, counted from 1"),
        (lambda f, x: rl.patch(f, x, x, []), "name what is to be changed"),
        (lambda f, x: rl.patch(f, x, x, ["block.2.in", "block.1"]), "determines all other states: change it alone"),
        (lambda f, x: rl.patch(f, x[:2], x, "block.2"), "2 source images for 3 targets"),
        (lambda f, x: rl.patch(f, x, x, "block.2", tokens=[16]), "must be some of 0..15"),
        (lambda f, x: rl.patch(f, x, x, "block.2", tokens=[]), "must be some of 0..15"),
        (lambda f, x: rl.patch(f, x, x, "block.2", direction="back"), "unknown direction"),
        (lambda f, x: rl.patch(f, x, x[:0], "block.2"), "no images to intervene on"),
        (lambda f, x: rl.steer(f, x, "block.2.layer.*", torch.zeros(32)), "names 10 parts: steer one"),
        (lambda f, x: rl.steer(f, x, LAYER, torch.zeros(5)), r"must be \(32,\) or \(16, 32\), not \(5,\)"),
        (lambda f, x: rl.steer(f, x, LAYER, torch.full((32,), torch.nan)), "must be finite"),
        (lambda f, x: rl.steer(f, x, LAYER, torch.zeros(32), float("inf")), "strength"),
        (lambda f, x: rl.steer(f, x, LAYER, rl.SteeringVector(BLOCK, torch.zeros(32), "")), "is of block.2"),
        (lambda f, x: rl.ablate(f, x, "block.2.in"), "cannot be removed"),
        (lambda f, x: rl.ablate(f, x, "blok.2"), "no part 'blok.2'"),
        (lambda f, x: rl.jacobian(f, x, blocks=[4]), "must be some of 1..3, or 0"),
        (lambda f, x: rl.jacobian(f, x[:0]), "no images to differentiate at"),
        (lambda f, x: rl.jacobian(f, x, tolerance=0.0), "tolerance"),
    ],
)  # fmt: skip
def test_what_is_refused(flow, x, call, message):
    with pytest.raises(LabError, match=message):
        call(flow, x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mean"}, "unknown kind of steering vector"),
        ({"kind": "class"}, "needs a label"),
        ({"kind": "component", "label": 1}, "has no label"),
        ({"kind": "class", "label": 7}, "no images of class 7"),
        ({"kind": "class", "label": 11}, "label 11 is out of range"),
        ({"kind": "component", "component": 99}, "component must be"),
        ({"kind": "probe", "label": 1, "tap": "block.*.layer.1"}, "names 3 taps: give one"),
    ],
)
def test_vectors_that_are_refused(run, features, settings, message):
    with pytest.raises(LabError, match=message):
        rl.steering_vector(run, settings.pop("tap", LAYER), images=features[1], **settings)


# --- the Jacobian -----------------------------------------------------------------------------------------------------


def test_singular_values_are_those_of_autograd(flow, x):
    table = rl.jacobian(flow, x[:2], Y[:2], tolerance=1e-5).set_index(["image", "block"])
    condition = flow.condition(Y[:2], 2)
    for row in range(2):
        tokens, own = flow.tokenize(x[row : row + 1]), condition.rows(slice(row, row + 1))
        whole = torch.eye(64, dtype=torch.float64)
        for number in (1, 2, 3):
            block = flow.block(number)
            dense = torch.autograd.functional.jacobian(lambda t, b=block, o=own: b.encode(t, o).z.flatten(), tokens).view(
                64, 64
            )
            tokens, whole = block.encode(tokens, own).z, dense @ whole
            compare(table.loc[(row, number)], dense)
        compare(table.loc[(row, 0)], whole)
    assert (table.dims == 64).all()
    assert (table.n == 2).all()


def compare(found, dense):
    values = torch.linalg.svdvals(dense)
    assert found.sigma_max == pytest.approx(float(values[0]), rel=1e-6)
    assert found.sigma_min == pytest.approx(float(values[-1]), rel=1e-6)
    assert found.condition == pytest.approx(float(values[0] / values[-1]), rel=1e-6)
    assert found.logdet == pytest.approx(float(values.log().sum()), abs=1e-8)


def test_the_jacobian_of_a_run_names_it(run, x):
    table = rl.jacobian(run, x[:1].float(), blocks=[2])
    assert table.strategy.tolist() == ["none"]
    assert table.sigma_min[0] < table.sigma_max[0]
