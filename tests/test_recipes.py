"""Every setting of the alignment beside the strategy: it trains, and reaches what its strategy reaches."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipes import RECIPES, SMALL, config_of
from torch.nn import functional as F
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.align.projector import Projectors
from rrepa_lab.align.projector_kind import PROJECTORS, ProjectorKind
from rrepa_lab.align.projectors.masked import Masked
from rrepa_lab.align.schedule import Schedule
from rrepa_lab.align.self_teacher import SelfTeacher
from rrepa_lab.align.similarity import LOSSES, TEMPERATURE, cosine_loss, nt_xent_loss, patch_cosine
from rrepa_lab.align.target import spatially_normalized
from rrepa_lab.errors import LabError
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.runs.records import Records
from rrepa_lab.runs.run import Run, build
from rrepa_lab.training.objective import Objective

STRATEGIES = ("forward", "detach", "reverse", "reverse-cached")


def perturbed(config: rl.RunConfig) -> Run:
    """A float64 run away from its zero start."""
    run = build(config, [str(digit) for digit in range(10)])
    run.flow.double()
    perturb(run.flow, 0, std=0.05)
    run.projectors.double()
    return run


def inputs(run: Run):
    """Four noised images with labels, one of them dropped; their targets and, for a projector that takes one, a mask."""
    x, _ = run.data("test", 4)
    noised = run.space.add_noise(run.space.encode(x), torch.Generator().manual_seed(3)).double()
    targets = run.targets()
    target = targets.of_encoded(x.double(), noised) if targets.own is not None else targets(x)
    tokens = run.flow.config.tokens
    mask = torch.rand(4, tokens, generator=torch.Generator().manual_seed(4)) < 0.3
    return noised, torch.tensor([1, -1, 0, 4]), target.double(), mask if run.projectors.kind.masks else None


def gradients(run: Run, plain: bool, factor: float = 1.0) -> dict[str, torch.Tensor | None]:
    """Of the total loss, by parameter name of flow and projectors."""
    objective = Objective(run.flow, run.projectors, run.config.align, plain=plain).requires_grad_()
    names, parameters = zip(*objective.named_parameters(), strict=True)
    total = objective(*inputs(run), factor).total
    return dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_it_trains(name, tmp_path):
    """Loss falls, similarity rises, weights and their average are those of a run that loads and measures itself."""
    steps = 40
    config = config_of(name, train__steps=steps, train__lr=5e-3)
    rows = [vars(report) for report in rl.train(config, tmp_path / "run", device="cpu")]
    aligned = [row for row in rows if row["similarity"]]
    first, last = aligned[0]["similarity"], aligned[-1]["similarity"]
    assert rows[-1]["nats_per_dim"] < rows[0]["nats_per_dim"] - 0.1
    assert list(first) == ["block.1.layer.1", "block.2.layer.1"]
    if len(aligned) == steps:
        assert all(last[tap] > first[tap] + 0.1 for tap in first), (first, last)
    schedule = Schedule.parse(config.align.schedule)
    weights = [config.align.weight * schedule.factor(step, steps) for step in range(steps)]
    assert [row["alignment_weight"] for row in rows] == pytest.approx(weights)
    assert len(aligned) == sum(weight > 0 for weight in weights)
    run = rl.load(tmp_path / "run")
    found = rl.alignment(run, *run.data("test", 16))
    assert set(found.similarity) == set(first)
    assert all(-1 <= value <= 1 for value in found.similarity.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("reverse-cached", "refined")])
def test_the_gradient_reaches_what_the_strategy_reaches(name, strategy):
    """The alignment loss alone, of one tap: by block and part of the flow."""
    run = perturbed(config_of(name, align__strategy=strategy, align__blocks=[2], flow__blocks=3))
    aligner, (x, y, target, mask) = run.aligner(), inputs(run)
    run.flow.requires_grad_()
    loss = aligner(run.flow, x, y, target, plain=True, mask=mask).loss
    groups = {group.name: group.parameters for group in run.flow.parameter_groups()}
    found = {
        key: any(grad is not None and bool(grad.any()) for grad in torch.autograd.grad(loss, values, retain_graph=True,
                                                                                         allow_unused=True))
        for key, values in groups.items()
    }  # fmt: skip
    upto = {"block.2.in", "block.2.layer.1"}
    reached = {
        "forward": upto | {key for key in groups if key.startswith("block.1.")},
        "detach": upto,
        "reverse-cached": upto,
        "reverse": {key for key in groups if key.startswith(("block.2.", "block.3."))},
    }
    assert {key for key, value in found.items() if value} == reached[strategy]


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "forward"])
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("reverse-cached", "refined")])
def test_the_one_pass_form_agrees_with_the_plain_passes(name, strategy):
    run = perturbed(config_of(name, align__strategy=strategy))
    plain, fast = gradients(run, plain=True), gradients(run, plain=False)
    alone = gradients(run, plain=True, factor=0.0)
    assert any(not torch.equal(plain[key], alone[key]) for key in plain if alone[key] is not None), "nothing is aligned"
    for key, value in plain.items():
        assert_close(fast[key], torch.zeros_like(fast[key]) if value is None else value, atol=1e-10, rtol=0, msg=key)


def test_reverse_cached_is_detach():
    """The same features, losses and gradients to 1e-10; not those of reverse."""
    found = {name: gradients(perturbed(config_of("plain", align__strategy=name)), plain=True) for name in STRATEGIES}
    fast = gradients(perturbed(config_of("plain", align__strategy="reverse-cached")), plain=False)
    for key, value in found["detach"].items():
        assert_close(found["reverse-cached"][key], value, atol=1e-10, rtol=0)
        assert_close(fast[key], value, atol=1e-10, rtol=0)
    assert max(float((found["reverse"][key] - value).abs().max()) for key, value in found["detach"].items()) > 1e-4


@pytest.mark.slow
def test_two_processes_train_like_one_with_each(tmp_path):
    """Losses and similarities of six steps, each run by one process and by two."""
    script = str(Path(__file__).with_name("recipes.py"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", port]
    for words, folder in (([script], "one"), ([*launch, script], "two")):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words, str(tmp_path / folder)], capture_output=True, text=True, timeout=280, env=env, check=False
        )
        assert done.returncode == 0, done.stderr
    for name in RECIPES:
        one, two = (Records(tmp_path / folder / name).table() for folder in ("one", "two"))
        taps = [column for column in one if column.startswith("similarity.")]
        assert len(taps) == 2
        for column in ("loss", "nats_per_dim", *taps):
            assert two[column].tolist() == pytest.approx(one[column].tolist(), abs=2e-5, nan_ok=True), (name, column)


def test_measurements_travel_by_name(tmp_path):
    """The taps of align.blocks=[2, 1] keep their own similarities, whatever the order they are computed in."""
    rows = {}
    for blocks in ([1, 2], [2, 1]):
        config = config_of("plain", align__blocks=blocks, train__steps=1, align__sharing="shared")
        (row,) = rl.train(config, tmp_path / str(blocks[0]), device="cpu")
        rows[blocks[0]] = row.similarity
    assert rows[1] == pytest.approx(rows[2], abs=1e-6)
    assert rows[1]["block.1.layer.1"] != pytest.approx(rows[1]["block.2.layer.1"], abs=1e-3)


def test_a_training_that_stops_aligning_resumes_to_the_same_numbers(tmp_path):
    config = config_of("until", train__steps=6, train__log_every=4)
    whole = [vars(report) for report in rl.train(config, tmp_path / "whole", device="cpu")]
    stopped = rl.train(config, tmp_path / "parts", device="cpu", stop=lambda: True)
    assert [report.step for report in stopped] == [1]
    rest = [vars(report) for report in rl.train(config, tmp_path / "parts", resume=True, device="cpu")]
    assert [row["step"] for row in rest] == [4, 6] == [row["step"] for row in whole]
    assert whole[0]["similarity"].keys() == {"block.1.layer.1", "block.2.layer.1"}, "of the aligned steps among the four"
    assert whole[1]["similarity"] == {}
    for one, two in zip(*(rl.load(tmp_path / name).weights().values() for name in ("whole", "parts")), strict=True):
        assert torch.equal(one, two)


# --- projectors -------------------------------------------------------------------------------------------------------


def test_projectors_have_the_size_that_is_counted():
    """The multiply-adds of one token, against the weights of the linear maps."""
    for kind, expected in (("mlp", 16 * 64 + 64**2 + 64 * 8), ("linear", 16 * 8), ("conv3", 9 * 16 * 8)):
        made = Projectors(["block.1.layer.1"], 16, 64, 8, kind=kind, side=4)
        weights = sum(value.numel() for name, value in made.named_parameters() if name.endswith("weight"))
        assert weights == expected


def test_one_projector_is_shared():
    shared = Projectors(["block.1.layer.1", "block.2.layer.1"], 16, 64, 8, shared=True)
    each = Projectors(["block.1.layer.1", "block.2.layer.1"], 16, 64, 8)
    assert (list(shared), shared.taps, each.taps) == (["shared"], each.taps, ["block.1.layer.1", "block.2.layer.1"])
    assert 2 * sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in each.parameters())
    x = torch.randn(2, 16, 16)
    assert torch.equal(shared.project("block.1.layer.1", x), shared.project("block.2.layer.1", x))
    assert not torch.equal(each.project("block.1.layer.1", x), each.project("block.2.layer.1", x))


def test_conv3_sees_the_eight_neighbours():
    made = Projectors(["block.1.layer.1"], 3, 64, 5, kind="conv3", side=4)
    x = torch.randn(1, 16, 3, requires_grad=True)
    made.project("block.1.layer.1", x)[0, 5].sum().backward()  # row 1, column 1
    seen = x.grad.abs().sum(dim=-1).view(4, 4) > 0
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:3, :3] = True
    assert torch.equal(seen, expected)


def test_a_hidden_token_is_read_from_the_others():
    torch.manual_seed(0)
    made = Projectors(["block.1.layer.1"], 3, 64, 5, kind="masked", side=2)
    (module,) = made.values()
    assert isinstance(module, Masked)
    x, mask = torch.randn(1, 4, 3, requires_grad=True), torch.tensor([[True, False, False, False]])
    made.project("block.1.layer.1", x, mask)[0, 0].sum().backward()
    assert not x.grad[0, 0].any(), "the state of a hidden token is not read"
    assert x.grad[0, 1:].abs().sum(dim=-1).gt(0).all()
    assert not torch.equal(made.project("block.1.layer.1", x, mask), made.project("block.1.layer.1", x))


@pytest.mark.parametrize("kind", PROJECTORS.names())
@pytest.mark.parametrize("dims", [(8,), (8, 5)])
def test_stored_projectors_say_their_dims(kind, dims):
    from rrepa_lab.align.projector import stored_dims

    for shared in (False, True):
        made = Projectors(["block.1.layer.1", "block.12.layer.1"], 16, 64, dims, kind=kind, side=2, shared=shared)
        shapes = {f"projectors.{name}": tuple(value.shape) for name, value in made.state_dict().items()}
        assert stored_dims(shapes, kind) == dims
        assert made.project("block.12.layer.1", torch.zeros(2, 4, 16)).shape == (2, 4, sum(dims))
        one = made.of_teacher(len(dims) - 1)
        assert (one.dims, one.taps, one.is_shared) == (dims[-1:], made.taps, shared)
        assert one.project("block.1.layer.1", torch.zeros(2, 4, 16)).shape == (2, 4, dims[-1])


def test_a_mask_hides_the_part_that_is_set():
    from rrepa_lab.training.inputs import StepInputs

    config = config_of("masked", align__projector_mask=0.25)
    made = StepInputs(config, build(config, list("0123456789")).space, None, torch.device("cpu"))
    mask = made._mask(list(range(2000)), 0)
    assert mask.shape == (2000, 16)
    assert mask.double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(mask[7:9], made._mask([7, 8], 0)), "it belongs to the image"
    assert not torch.equal(mask[:9], made._mask(list(range(9)), 1)), "and to the epoch"


# --- target, teacher, labels, similarity ------------------------------------------------------------------------------


def test_spatial_normalization_is_a_z_score_over_tokens():
    x = torch.randn(3, 16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4 + 2
    whole = spatially_normalized(x, 1.0)
    assert_close(whole.mean(dim=1), torch.zeros(3, 5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(whole.std(dim=1), torch.ones(3, 5, dtype=torch.float64), atol=1e-5, rtol=0)
    part = spatially_normalized(x, 0.6)
    assert_close(part.mean(dim=1), 0.4 * x.mean(dim=1) / x.std(dim=1), atol=1e-5, rtol=0)


def test_all_instruments_compare_with_the_normalized_target():
    """The trained run, its similarity table, its floors and `rl.alignment` see one target."""
    run = perturbed(config_of("spatial"))
    run.flow.float()
    run.projectors.float()
    x, y = run.data("test", 12)
    target = run.aligner().target(x)
    assert_close(target, spatially_normalized(run.encoder()(x), 0.6))
    tap = "block.2.layer.1"
    states = run.flow(x, y, tap).states[tap]
    expected = F.cosine_similarity(run.projectors.project(tap, states), target, dim=-1).mean().item()
    assert rl.alignment(run, x, y).similarity[tap] == pytest.approx(expected, abs=1e-6)
    how = rl.FeatureProtocol(feed_label=True)
    data = {"test": rl.Batch(x, y)}
    table = rl.similarity(run, taps=tap, metrics=["teacher_cosine"], protocol=how, images=rl.Images(data=data["test"]))
    assert table.value.item() == pytest.approx(expected, abs=1e-5)


def test_the_self_teacher_is_the_average_of_the_weights():
    run = perturbed(config_of("self"))
    own = copy.deepcopy(run.flow)
    perturb(own, 9, std=0.05)
    teacher = SelfTeacher(own, run.config.align)
    x = torch.randn(4, *run.flow.config.image_shape, dtype=torch.float64)
    noised = x + torch.randn_like(x)
    state = own((x + noised) / 2, None, "block.2.layer.2").states["block.2.layer.2"]
    assert_close(teacher(x, noised), state.detach(), atol=1e-12, rtol=0)
    assert_close(teacher(x), own(x, None, "block.2.layer.2").states["block.2.layer.2"].detach(), atol=1e-12, rtol=0)
    assert not teacher(x).requires_grad


def test_the_self_teacher_takes_the_last_layer_of_the_last_aligned_block_by_default():
    run = perturbed(config_of("self", align__self_tap="", align__blocks=[1, 2], flow__blocks=3, flow__layers=[1, 2, 1]))
    assert SelfTeacher(run.flow, run.config.align).tap.name == "block.2.layer.2"


@pytest.mark.parametrize("name", ["self", "together"])
def test_it_trains_in_bfloat16(name, tmp_path):
    """Cosines are float32: those of bfloat16 are multiples of 1/256 near one."""
    config = config_of(name, train__steps=6, train__precision="bfloat16", align__target="spatial")
    rows = list(rl.train(config, tmp_path / "run", device="cpu"))
    values = [value for row in rows for value in row.similarity.values()]
    assert all(-1 <= value <= 1 for value in values)
    assert any(abs(value * 256 - round(value * 256)) > 1e-3 for value in values)


def test_a_projector_of_ones_own(tmp_path):
    """A module and its costs under a name: it trains, is stored, loads and is counted."""

    class Scale(torch.nn.Module):
        def __init__(self, sizes):
            super().__init__()
            self.out = torch.nn.Linear(sizes.width, sizes.dim)

        def forward(self, tokens):
            return 2 * self.out(tokens)

    kind = ProjectorKind(make=Scale, last="out.bias", products=lambda sizes: sizes.width * sizes.dim, kept=lambda sizes: 0)
    PROJECTORS.register("scale")(kind)
    try:
        config = config_of("plain", align__projector="scale", train__steps=2)
        list(rl.train(config, tmp_path / "run", device="cpu"))
        run = rl.load(tmp_path / "run")
        assert isinstance(run.projectors["block_2_layer_1"], Scale)
        assert rl.alignment(run, *run.data("test", 4)).similarity.keys() == {"block.1.layer.1", "block.2.layer.1"}
    finally:
        PROJECTORS._values.pop("scale")


def test_a_random_teacher_is_the_architecture_without_its_weights():
    config = config_of("random")
    (teacher,) = config.teachers
    assert teacher == config.encoder.override({"weights": "random:0"})
    assert config_of("random", align__strategy="none").teachers == [config.encoder], "nothing is aligned: the encoder itself"


def test_dropped_labels_reach_the_features_alone():
    run = perturbed(config_of("dropped"))
    aligner, (x, y, target, _) = run.aligner(), inputs(run)
    found = aligner(run.flow, x, y, target)
    assert_close(found.encoded.z, run.flow(x, y).z)
    tap = "block.2.layer.1"
    states = run.flow(x, None, tap).states[tap]
    assert_close(found.similarity[tap], patch_cosine(run.projectors.project(tap, states), target))
    assert not torch.allclose(states, run.flow(x, y, tap).states[tap])


def test_nt_xent_is_the_cross_entropy_of_the_own_token():
    torch.manual_seed(0)
    own, other = torch.randn(3, 6, 8, dtype=torch.float64), torch.randn(3, 6, 8, dtype=torch.float64)
    expected = []
    for image in range(3):
        terms = []
        for i in range(6):
            cosines = torch.stack([F.cosine_similarity(own[image, i], other[image, j], dim=0) for j in range(6)])
            terms.append(-(cosines / TEMPERATURE).log_softmax(dim=0)[i])
        expected.append(torch.stack(terms).mean())
    assert_close(nt_xent_loss(own, other), torch.stack(expected), atol=1e-12, rtol=0)
    both = nt_xent_loss(torch.cat([own, other], -1), torch.cat([other, other], -1), (8, 8))
    assert_close(both, (nt_xent_loss(own, other) + nt_xent_loss(other, other)) / 2, atol=1e-12, rtol=0)
    assert_close(cosine_loss(own, own), -torch.ones(3, dtype=torch.float64))
    assert set(LOSSES) == {"cosine", "nt-xent"}


@pytest.mark.parametrize(
    ("text", "step", "factor"),
    [
        ("constant", 99, 1.0), ("until:50", 49, 1.0), ("until:50", 50, 0.0), ("cosine", 0, 1.0), ("cosine", 50, 0.5),
        ("warmup:10", 0, 0.1), ("warmup:10", 9, 1.0), ("warmup:10", 99, 1.0),
    ],
)  # fmt: skip
def test_schedules(text, step, factor):
    assert Schedule.parse(text).factor(step, 100) == pytest.approx(factor)


# --- what contradicts itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"align.schedule": "until:40", "train.steps": 40}, "align.schedule is until:40, and the training has 40 steps"),
        ({"align.schedule": "warmup:41", "train.steps": 40}, "align.schedule is warmup:41, and the training has 40 steps"),
        ({"align.schedule": "until"}, "'until' is no schedule: give constant, cosine, until:STEP or warmup:STEP"),
        ({"align.schedule": "until:0"}, "the step must be 1 at least"),
        ({"align.schedule": "linear:3"}, "no schedule"),
        ({"align.projector": "conv5"}, "unknown projector 'conv5'; did you mean 'conv3'"),
        ({"align.similarity": "l2"}, "unknown similarity 'l2'; known: cosine, nt-xent"),
        ({"align.sharing": "both"}, "align.sharing"),
        ({"align.teacher": "self", "train.ema_decay": 0}, "averaged weights, but train.ema_decay is 0"),
        ({"align.teacher": "self", "train.parallel": "fsdp"}, "set train.parallel=ddp"),
        ({"align.self_tap": "block.2.layer.2"}, "align.self_tap is set, but align.teacher is 'encoder'"),
        ({"align.labels": "dropped", "flow.classes": 0}, "there is no label to drop"),
        ({"align.refinements": 2, "align.strategy": "detach"}, "steps of strategy 'reverse', not 'detach'"),
        ({"align.target_gamma": 1.5}, "align.target_gamma"),
        ({"align.projector_mask": 1}, "align.projector_mask"),
        ({"encoder": None}, "there is no encoder"),
    ],
)
def test_contradicting_settings_are_named(settings, says):
    with pytest.raises(LabError, match=says):
        rl.preset("digits-reverse").override(SMALL | settings)


def test_a_self_teacher_needs_no_encoder():
    assert config_of("self", encoder=None).teachers == []


@pytest.mark.parametrize("tap", ["block.2.in", "block.*.layer.1", "block.7.layer.1", "nothing"])
def test_a_self_tap_that_is_no_layer_is_named(tap):
    with pytest.raises(LabError, match=r"block|nothing"):
        perturbed(config_of("self", align__self_tap=tap)).targets()


def test_a_masked_projector_refuses_a_coarser_teacher():
    with pytest.raises(LabError, match=r"'masked' hides tokens, and the teacher .* has 2x2 patches for the flow's 4x4 tokens"):
        build(config_of("masked", encoder__weights="random", encoder__args={"patch_size": 4, "embed_dim": 16, "depth": 1,
              "num_heads": 2, "class_token": False, "global_pool": "avg"}), list("0123456789"))  # fmt: skip


def test_a_run_that_is_its_own_teacher_says_so():
    run = perturbed(config_of("self"))
    with pytest.raises(LabError, match="is its own teacher and has no encoder"):
        run.encoders()
