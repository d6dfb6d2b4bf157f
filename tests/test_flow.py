"""The map itself, in float64 on perturbed weights."""

from typing import Any

import pytest
import torch
from conftest import CONFIGS, make_flow
from torch.nn.functional import one_hot
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.errors import LabError
from rrepa_lab.flow.likelihood import bits_per_dim, flow_loss, nats_per_dim
from rrepa_lab.flow.patches import patchify, unpatchify
from rrepa_lab.flow.taps import Tap
from rrepa_lab.flow.tarflow.transformer import axial_angles, rotate

GUIDED: list[dict[str, Any]] = [{"guidance": 1.5}, {"guidance": 1.5, "annealed": True}, {"guidance": 0.7, "temperature": 0.6}]


def shut(a, b, atol):
    assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("method", ["sequential", "cached", "jacobi"])
def test_there_and_back(flow, batch, method):
    x, y = batch
    out = flow(x, y)
    assert (out.z - flow.tokenize(x)).abs().max() > 0.1, "the flow does nothing: this test would prove nothing"
    shut(flow.inverse(out.z, y, method=method).x, x, 1e-8)


def test_back_and_there(flow, batch):
    _, y = batch
    z = torch.randn(3, flow.config.tokens, flow.config.token_size, dtype=torch.float64)
    shut(flow(flow.inverse(z, y).x, y).z, z, 1e-8)


def test_logdet_is_that_of_autograd(flow, batch):
    x, y = batch
    label = None if y is None else y[:1]

    def encode(flat):
        return flow(flat.view(1, *flow.config.image_shape), label).z.flatten()

    jacobian = torch.autograd.functional.jacobian(encode, x[0].flatten())
    shut(flow(x, y).logdet[0], torch.linalg.slogdet(jacobian).logabsdet, 1e-8)


def test_log_prob_is_prior_plus_logdet_and_agrees_with_the_training_loss(flow, batch):
    x, y = batch
    out = flow(x, y)
    spread = torch.ones(1, dtype=torch.float64) if flow.prior_var is None else flow.prior_var.sqrt()
    prior = torch.distributions.Normal(0.0, spread).log_prob(out.z).sum(dim=(1, 2))
    shut(flow.log_prob(x, y), prior + out.logdet, 1e-9)
    # paper.md: log p = -T P (L_nf + 0.5 log 2 pi)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    shut(
        nats_per_dim(flow.log_prob(x, y), flow.config.dims).mean(),
        flow_loss(out.z, out.logdet, flow.prior_var) + constant,
        1e-12,
    )


@pytest.mark.parametrize("number", [1, 2])
def test_each_block_is_causal_in_its_own_order(flow, batch, number):
    x, y = batch
    block, tokens = flow.block(number), flow.tokenize(x)
    condition = flow.condition(y, 3).of_block(number)
    count = flow.config.tokens
    for token in range(count):
        moved = tokens.clone()
        moved[:, token] += 1.0
        before, after = (block(block.affine, given, condition) for given in (tokens, moved))
        changed = ((before.mu != after.mu) | (before.alpha != after.alpha)).any(dim=2).any(dim=0)
        # a reversed block reads from the last token to the first
        later = torch.arange(count) < token if number % 2 == 0 else torch.arange(count) > token
        assert torch.equal(changed, later)


def test_blocks_alternate(flow):
    assert [block.reversed_order for block in flow.blocks] == [t % 2 == 1 for t in range(flow.config.blocks)]


def test_first_token_of_a_block_passes_unchanged(flow, batch):
    x, y = batch
    out = flow(x, y, ["block.1.*", "block.2.*"])
    assert torch.equal(out.states["block.1.in"][:, 0], out.states["block.1.out"][:, 0])
    assert torch.equal(out.states["block.2.in"][:, -1], out.states["block.2.out"][:, -1])


def test_states_are_the_same_both_ways(flow, batch):
    x, y = batch
    out = flow(x, y, "*")
    assert len(out.states) == flow.config.blocks * (flow.config.layers + 2)
    for method in ("sequential", "cached", "jacobi"):
        back = flow.inverse(out.z, y, method=method, taps="*").states
        assert list(back) == list(out.states)
        for tap, state in out.states.items():
            shut(back[tap], state, 1e-9)


def test_states_are_in_image_order():
    # a reversed block, looked at by hand: the state of the last layer must predict mu and alpha of the token before
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    block, tokens = flow.block(2), flow.tokenize(x)
    affine = block(block.affine, tokens, flow.condition(None, 2).of_block(2), keep={2})
    alpha, mu = block.proj_out(affine.states[2]).chunk(2, dim=-1)
    shut(mu[:, 1:], affine.mu[:, :-1], 1e-12)
    shut(alpha[:, 1:], affine.alpha[:, :-1], 1e-12)


def test_class_weights_one_hot_equal_ids():
    flow = make_flow(CONFIGS["plain"])
    x, y = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 9, 5])
    weights = one_hot(y, 10).double()
    assert torch.equal(flow.log_prob(x, weights), flow.log_prob(x, y))
    assert not torch.allclose(flow.log_prob(x, y), flow.log_prob(x, y.flip(0))), "labels do nothing"


def test_unconditional_is_the_mean_of_the_table_and_the_same_both_ways():
    flow = make_flow(CONFIGS["plain"])
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    dropped, uniform = torch.tensor([-1, -1]), torch.full((2, 10), 0.1, dtype=torch.float64)
    z = flow(x).z
    for y in (None, dropped, uniform):
        shut(flow(x, y).z, z, 1e-12)
        shut(flow.inverse(z, y).x, x, 1e-9)
    # by hand: with the table replaced by its mean, a label changes nothing
    for block in map(flow.block, (1, 2, 3)):
        assert block.class_embed is not None
        block.class_embed.data[:] = block.class_embed.mean(dim=0)
    shut(flow(x, torch.tensor([3, 7])).z, z, 1e-12)


def test_guidance_zero_is_none_and_methods_agree():
    flow = make_flow(CONFIGS["plain"])
    z, y = torch.randn(2, 16, 4, dtype=torch.float64), torch.tensor([2, 8])
    plain = flow.inverse(z, y).x
    assert torch.equal(flow.inverse(z, y, guidance=0.0, annealed=True, temperature=0.5).x, plain)
    for settings in GUIDED:
        cached, sequential = (flow.inverse(z, y, method=method, **settings).x for method in ("cached", "sequential"))
        shut(cached, sequential, 1e-10)
        assert (cached - plain).abs().max() > 1e-3


def test_guidance_formula_at_the_second_token():
    # alpha <- alpha_c + w (alpha_c - alpha_u), mu likewise; in a block's own order token 1 depends on token 0 alone
    flow = make_flow(rl.FlowConfig(classes=4, width=16, head_width=16, blocks=1, layers=1))
    z, w = torch.randn(1, 16, 4, dtype=torch.float64), 1.7
    block, y = flow.block(1), torch.tensor([2])
    conditional, unconditional = (block(block.affine, z, flow.condition(label, 1)) for label in (y, None))
    for annealed, weight in ((False, w), (True, w * 1 / 15)):
        mu, alpha = (c[:, 1] + weight * (c[:, 1] - u[:, 1]) for c, u in zip(conditional[:2], unconditional[:2], strict=True))
        made = flow.tokenize(flow.inverse(z, y, guidance=w, annealed=annealed).x)
        shut(made[:, 1], mu + alpha.exp() * z[:, 1], 1e-12)
        assert torch.equal(made[:, 0], z[:, 0])


def test_temperature_touches_the_unconditional_branch_only():
    flow = make_flow(CONFIGS["plain"])
    z, y = torch.randn(2, 16, 4, dtype=torch.float64), torch.tensor([2, 8])
    tap = "block.3.layer.2"
    cool, warm = (flow.inverse(z, y, guidance=1.0, temperature=t, taps=tap) for t in (1.0, 0.5))
    assert (cool.x - warm.x).abs().max() > 1e-6
    # block 3 is the first to generate: its conditional branch at the first token has seen the same in both
    assert torch.equal(cool.states[tap][:, 0], warm.states[tap][:, 0])


def test_inputs_are_not_written_to(flow, batch):
    x, y = batch
    kept, z = x.clone(), torch.randn(3, flow.config.tokens, flow.config.token_size, dtype=torch.float64)
    kept_z = z.clone()
    flow(x, y, "*")
    flow.inverse(z, y, guidance=1.0, taps="*")
    assert torch.equal(x, kept)
    assert torch.equal(z, kept_z)


def test_fresh_flow_is_the_identity():
    flow = rl.TarFlow(CONFIGS["plain"])
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(flow(x, torch.tensor([1, 2])).z, flow.tokenize(x))


def test_gradient_reaches_every_parameter(flow, batch):
    x, y = batch
    flow.zero_grad()
    flow.log_prob(x, y).sum().backward()
    assert [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradient_flows_through_generation(flow, batch):
    _, y = batch
    z = torch.randn(3, flow.config.tokens, flow.config.token_size, dtype=torch.float64, requires_grad=True)
    flow.inverse(z, y).x.square().sum().backward()
    assert z.grad is not None
    assert (z.grad != 0).all()


def test_bfloat16_autocast_keeps_the_likelihood_in_float32():
    flow = rl.TarFlow(CONFIGS["plain"])
    perturb_std = 0.05
    for p in flow.parameters():
        p.data += perturb_std * torch.randn_like(p)
    x = torch.randn(4, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = flow(x, None, "block.1.layer.1")
    assert (out.z.dtype, out.logdet.dtype) == (torch.float32, torch.float32)
    plain = flow(x)
    assert 0 < (out.z - plain.z).abs().max() < 0.1


def test_patches_are_laid_out_as_unfold_gives_them():
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float64).view(2, 3, 4, 4)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 4, 12)
    assert torch.equal(tokens[0, 1], x[0, :, 0:2, 2:4].reshape(-1))
    assert torch.equal(unpatchify(tokens, 2, 4), x)


def test_rotary_logits_depend_on_relative_position_only():
    angles = axial_angles(4, 16)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)

    def logit(a, b):  # image positions (row, column)
        return (rotate(q, angles[a[0] * 4 + a[1]][None]) * rotate(k, angles[b[0] * 4 + b[1]][None])).sum()

    shut(logit((0, 1), (1, 3)), logit((2, 0), (3, 2)), 1e-12)
    assert (logit((0, 1), (1, 3)) - logit((0, 1), (2, 3))).abs() > 1e-6


def test_bits_per_dim_of_a_uniform_guess():
    # a uniform density on [-1, 1] is a uniform code: log2(levels) bits a number
    log_prob = torch.tensor([-64 * torch.log(torch.tensor(2.0))])
    assert_close(bits_per_dim(log_prob, 64, 256), torch.tensor([8.0]))
    assert_close(bits_per_dim(log_prob, 64, 17), torch.log2(torch.tensor([17.0])))
    with pytest.raises(ValueError, match="dims >= 1"):
        bits_per_dim(log_prob, 0, 256)


def test_tap_names():
    assert Tap.parse("block.7.layer.6") == Tap(7, 6)
    assert Tap.parse("block.2.in").name == "block.2.in"
    flow = make_flow(CONFIGS["plain"])
    assert flow.get_submodule(Tap(3, 2).module_path) is flow.block(3).transformer.layers[1]
    assert [tap.name for tap in flow.resolve("block.*.layer.2")] == ["block.1.layer.2", "block.2.layer.2", "block.3.layer.2"]
    with pytest.raises(LabError, match=r"3 blocks of 2 layers, counted from 1"):
        flow.resolve("block.0.layer.1")
    with pytest.raises(LabError, match="is not a tap"):
        Tap.parse("layer.3")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(torch.zeros(1, 1, 28, 28)), r"images must be \(B, 1, 8, 8\).*not \(1, 1, 28, 28\)"),
        (lambda f: f(torch.zeros(1, 1, 8, 8), torch.tensor([10])), r"label 10 is out of range: 0\.\.9"),
        (lambda f: f(torch.zeros(1, 1, 8, 8), torch.tensor([-2])), r"label -2 is out of range"),
        (lambda f: f(torch.zeros(1, 1, 8, 8), torch.tensor([1, 2])), r"class ids must be \(1,\)"),
        (lambda f: f(torch.zeros(1, 1, 8, 8), torch.zeros(1, 3)), r"class weights must be \(1, 10\)"),
        (lambda f: f.inverse(torch.zeros(1, 4, 4)), r"noise must be \(B, 16, 4\)"),
        (lambda f: f.inverse(torch.zeros(1, 16, 4), method="fast"), "unknown decoding method 'fast'"),
        (lambda f: f.inverse(torch.zeros(1, 16, 4), guidance=-1.0), "guidance must be >= 0"),
        (lambda f: rl.TarFlow(rl.FlowConfig())(torch.zeros(1, 1, 8, 8), torch.tensor([1])), "has no classes"),
        (lambda f: rl.FlowConfig.from_dict({"patch_size": 3}), "patch_size 3 does not divide image_size 8"),
        (lambda f: rl.FlowConfig.from_dict({"head_width": 48}), "head_width 48 does not divide width 64"),
    ],
)
def test_errors_name_the_thing_and_the_values(call, message):
    with pytest.raises(LabError, match=message):
        call(rl.TarFlow(CONFIGS["plain"]))


# --- guidance when encoding, and labels for each block ----------------------------------------------------------------


@pytest.mark.parametrize("settings", GUIDED, ids=str)
def test_the_guided_map_is_inverted_exactly(flow, batch, settings):
    x, y = batch
    out = flow(x, y, "*", **settings)
    back = flow.inverse(out.z, y, taps="*", **settings)
    shut(back.x, x, 1e-8)
    for tap, state in out.states.items():
        shut(back.states[tap], state, 1e-8)


def test_logdet_of_the_guided_map_is_that_of_autograd():
    flow, y = make_flow(CONFIGS["plain"]), torch.tensor([3])
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)

    def encode(flat):
        return flow(flat.view(1, 1, 8, 8), y, guidance=1.5, annealed=True).z.flatten()

    jacobian = torch.autograd.functional.jacobian(encode, x.flatten())
    shut(flow(x, y, guidance=1.5, annealed=True).logdet[0], torch.linalg.slogdet(jacobian).logabsdet, 1e-8)


def test_labels_for_each_block_reach_that_block_alone():
    flow = make_flow(CONFIGS["plain"])
    x, y = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([3, 7])
    same = one_hot(y, 10).double()[:, None].repeat(1, 3, 1)
    assert torch.equal(flow.log_prob(x, same), flow.log_prob(x, y))
    only_second = torch.full((2, 3, 10), 0.1, dtype=torch.float64)
    only_second[:, 1] = same[:, 1]
    taps = ["block.1.layer.2", "block.2.layer.2"]
    mixed, none, full = (flow(x, label, taps).states for label in (only_second, None, y))
    shut(mixed[taps[0]], none[taps[0]], 1e-12)
    assert (mixed[taps[1]] - none[taps[1]]).abs().max() > 1e-3
    # block 2 alone, on what an unlabelled block 1 gave it
    tokens, block = flow(x, None, "block.2.in").states["block.2.in"], flow.block(2)
    shut(mixed[taps[1]], block(block.features, tokens, flow.condition(y, 2).of_block(2), {2})[2], 1e-12)
    assert (mixed[taps[1]] - full[taps[1]]).abs().max() > 1e-6
    for guidance in (0.0, 1.5):
        shut(flow.inverse(flow(x, only_second, guidance=guidance).z, only_second, guidance=guidance).x, x, 1e-8)
