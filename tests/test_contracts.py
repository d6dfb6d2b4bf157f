"""The protocols that data sets, spaces, teachers, flows and alignments follow, each with a small implementation of its own."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, ParamSpec, TypeVar

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.align.aligner import Aligner
from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.projector import Projectors
from rrepa_lab.align.target import Targets
from rrepa_lab.align.teacher import EncoderConfig, Teacher
from rrepa_lab.data.images import Batch, ImageSet
from rrepa_lab.flow.contract import Affine, BlockOutput, FlowModel, InverseOutput
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.flow.stack import BlockFlow
from rrepa_lab.flow.taps import Taps
from rrepa_lab.measurements.results import measurements
from rrepa_lab.measurements.schema import check
from rrepa_lab.space.contract import Space
from rrepa_lab.space.kinds.pixels import Pixels

P = ParamSpec("P")
R = TypeVar("R")


# --- a second family: affine coupling, as in RealNVP ------------------------------------------------------------------


class CouplingBlock(nn.Module):
    """Every other token passes unchanged and gives mu and alpha of the others; one layer."""

    passes: Tensor

    def __init__(self, config: rl.FlowConfig, odd: bool) -> None:
        super().__init__()
        self.read, self.net = nn.Linear(config.token_size, config.width), nn.Linear(config.width, 2 * config.token_size)
        self.table = nn.Parameter(torch.randn(config.classes, config.width))
        self.register_buffer("passes", ((torch.arange(config.tokens) + odd) % 2 == 0)[:, None], persistent=False)

    def forward(self, operation: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return operation(*args, **kwargs)

    def features(self, x: Tensor, condition: rl.Condition, layers: Collection[int]) -> dict[int, Tensor]:
        assert condition.weights is not None
        hidden = self.read(x * self.passes) + (condition.weights @ self.table)[:, None]
        return dict.fromkeys(layers, torch.tanh(hidden))

    def affine(self, x: Tensor, condition: rl.Condition, keep: Collection[int] = ()) -> Affine:
        states = self.features(x, condition, {1, *keep})
        mu, alpha = (self.net(states[1].mean(dim=1, keepdim=True)) * ~self.passes).chunk(2, dim=-1)
        return Affine(mu, alpha.tanh(), {layer: states[layer] for layer in keep})

    def encode(self, x: Tensor, condition: rl.Condition, keep: Collection[int] = ()) -> BlockOutput:
        mu, alpha, states = self.affine(x, condition, keep)
        return BlockOutput((x - mu) * torch.exp(-alpha), -alpha.sum(dim=(1, 2)), states)

    def invert(self, z: Tensor, condition: rl.Condition, keep: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        mu, alpha, states = self.affine(z, condition, keep)  # the tokens that mu and alpha come from are the same in x and z
        return mu + torch.exp(alpha) * z, states

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"in": [*self.read.parameters(), self.table], "layer.1": [], "out": list(self.net.parameters())}


class CouplingFlow(BlockFlow):
    """A stack of them."""

    def __init__(self, config: rl.FlowConfig) -> None:
        super().__init__(config)
        self.prior_var = None
        self.blocks = nn.ModuleList(CouplingBlock(config, number % 2 == 0) for number in range(config.blocks))

    def inverse(
        self, z: Tensor, y: Any = None, guidance: Any = 0.0, *, method: Any = "auto", taps: Taps = (), progress: Any = None
    ) -> InverseOutput:
        return self.invert_blocks(z, self.condition(y, len(z), guidance), self.resolve(taps))


@pytest.fixture
def coupling() -> CouplingFlow:
    flow = CouplingFlow(rl.FlowConfig(classes=10, blocks=3, layers=1, width=16, head_width=8)).double()
    perturb(flow, 0)
    return flow.requires_grad_(False)


@pytest.fixture
def digits() -> Batch:
    x, y = rl.load("digits-none").data("test", 6)
    return Batch(x.double(), y)


def test_a_second_family_is_invertible_with_the_right_density(coupling, digits):
    out = coupling(*digits)
    assert (out.z - coupling.tokenize(digits.x)).abs().max() > 0.1
    assert_close(coupling.inverse(out.z, digits.y).x, digits.x, atol=1e-12, rtol=0)

    def encode(x: Tensor) -> Tensor:
        return coupling(x[None], digits.y[:1]).z.flatten()

    jacobian = torch.autograd.functional.jacobian(encode, digits.x[0]).flatten(1)
    assert_close(out.logdet[0], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-10, rtol=0)


def test_the_instruments_take_a_second_family(coupling, digits):
    """Nothing outside of a family's own file names TARFlow."""
    flow: FlowModel = coupling
    traced = rl.trace(flow, digits.x, digits.y, taps="block.*.layer.1")
    assert float(traced.error.max()) < 1e-10
    assert traced.states["block.2.layer.1"].shape == (6, 16, 16)
    assert rl.sample(flow, [3, 4], 1).images.shape == (2, 1, 8, 8)
    scores = rl.classify(flow, digits.x).scores
    assert_close(rl.evidence(flow, digits.x).sum(dim=1), scores, atol=1e-12, rtol=0)
    weights = torch.full((6, 10), 0.1, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(flow.log_prob(digits.x, weights).sum(), weights)
    assert_close(scores, 0.1 * (slope - slope.mean(dim=1, keepdim=True)), atol=1e-12, rtol=0)
    assert rl.classify(flow, digits.x, "bayes").scores.exp().sum(dim=1).allclose(torch.ones(6, dtype=torch.float64))


def test_a_second_family_can_be_aligned(coupling, digits):
    """The gradient of every strategy reaches the blocks that it says, in one pass as in the plain passes."""
    coupling.requires_grad_()
    tap, reached = "block.2.layer.1", {"forward": {1, 2}, "detach": {2}, "reverse": {2, 3}, "reverse-exact": {2, 3}}
    projectors = Projectors([tap], 16, 8, 5).double()
    target = torch.randn(6, 16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for strategy, blocks in reached.items():
        found = []
        for plain in (True, False):
            aligner = Aligner(AlignConfig(strategy=strategy, blocks=[2], layers=[1]), projectors)
            loss = aligner(coupling, digits.x, digits.y, target, plain=plain).loss
            found.append(torch.autograd.grad(loss, list(coupling.parameters()), allow_unused=True, materialize_grads=True))
        norms = dict(zip((name for name, _ in coupling.named_parameters()), found[1], strict=True))
        assert {int(name.split(".")[1]) + 1 for name, value in norms.items() if value.norm() > 1e-12} == blocks, strategy
        assert_close(found[0], found[1], atol=1e-10, rtol=0)


# --- blocks are entered through their call ----------------------------------------------------------------------------


def test_parameters_of_a_block_are_used_within_its_call_only(digits):
    """As with FSDP: outside of a block's call its parameters are gone, here NaN."""
    run = rl.load("digits-reverse")
    expected = _outputs(run, digits)

    def hide(block: nn.Module) -> None:
        for parameter in block.parameters():
            if not hasattr(parameter, "kept"):
                parameter.kept = parameter.data.clone()  # type: ignore[attr-defined]
            parameter.data.fill_(torch.nan)

    def show(block: nn.Module, *_: object) -> None:
        for parameter in block.parameters():
            parameter.data.copy_(parameter.kept)  # type: ignore[attr-defined]

    for block in run.flow.blocks:
        block.register_forward_pre_hook(show)
        block.register_forward_hook(lambda block, *_: hide(block))
        hide(block)
    for name, value in _outputs(run, digits).items():
        assert_close(value, expected[name], atol=0, rtol=0, msg=name)


@torch.no_grad()
def _outputs(run: rl.Run, digits: Batch) -> dict[str, Tensor]:
    """Everything that computes with a block, without a backward pass."""
    flow, (x, y) = run.flow, (digits.x.float(), digits.y)
    out = flow(x, y, taps="*", guidance=1.0)
    found = {"z": out.z, **out.states, "log_prob": flow.log_prob(x, y), "bayes": rl.classify(run, x, "bayes").scores}
    for method in ("sequential", "cached", "jacobi"):
        found[method] = flow.inverse(out.z, y, method=method, taps="block.2.layer.1").x
    taps = flow.resolve("block.3.layer.2")
    for strategy in ("forward", "detach", "reverse", "reverse-exact"):
        aligner = run.aligner(AlignConfig(strategy=strategy))
        found[strategy] = aligner.features(flow, x, y, [tap.name for tap in taps]).aligned["block.3.layer.2"]
    return found


# --- data, space, teacher, alignment, tables --------------------------------------------------------------------------


class Stripes:
    """Images of vertical or horizontal stripes: an ImageSet in 12 lines."""

    classes, levels = ["vertical", "horizontal"], 256

    def __init__(self, count: int) -> None:
        self.labels, self.fingerprint = torch.arange(count) % 2, f"{count:016x}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        y = self.labels[list(indices)]
        lines = torch.stack([torch.cos(torch.arange(8.0) * (1 + row % 3)) for row in indices])
        x = torch.where(y[:, None, None] == 0, lines[:, None, :], lines[:, :, None]).expand(-1, 8, 8)
        return Batch(x[:, None].contiguous(), y)


def test_an_image_set_needs_labels_and_batches():
    images: ImageSet = Stripes(60)
    assert isinstance(images, ImageSet)
    table = rl.probe(rl.load("digits-none"), "block.4.layer.2", probes=["knn"], data={"train": images, "test": Stripes(24)})
    assert table.set_index("tap")["value"]["pixels"] == 1.0, "stripes of one direction and width are the same image"


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_a_space_decodes_what_it_encodes(noise: str, digits):
    space: Space = Pixels((1, 8, 8), 17, noise, 0.2)
    x = space.encode(digits.x.float())
    assert x.shape[1:] == space.shape == space.picture_shape
    assert_close(space.encode(space.decode(x)), x, atol=1e-6, rtol=0)
    noised = space.add_noise(x, torch.Generator().manual_seed(0))
    assert noised.shape == x.shape
    assert 0.01 < float((noised - x).std()) < 0.5
    assert_close(space.add_noise(x, torch.Generator().manual_seed(0)), noised, atol=0, rtol=0)
    # the integers are those of the picture, whether it is given itself or what the space makes of it
    assert_close(space.add_noise(digits.x.float(), torch.Generator().manual_seed(0)), noised, atol=0, rtol=0)


class MeanColour:
    """A teacher: the mean of each quarter of the image, and its square."""

    config, dim, grid = EncoderConfig(model="mean-colour"), 2, (2, 2)

    def __call__(self, x: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool2d(x, 2).mean(dim=1).flatten(1)
        return torch.stack([mean, mean**2], dim=2)

    def to(self, device: Any) -> "MeanColour":
        return self


def test_a_teacher_gives_targets_on_the_grid_of_the_flow(digits):
    teacher: Teacher = MeanColour()
    targets = Targets([teacher], side=4)
    assert targets(digits.x.float()).shape == (6, 16, 2)
    table = rl.similarity(rl.load("digits-none"), teacher, "block.1.layer.1", metrics=["cka"], images=rl.Images(limit=60))
    assert 0 < table["value"].item() < 1
    assert table["other"].item() == "mean-colour, pretrained"


def test_an_aligner_computes_the_similarity_that_it_says(digits):
    run = rl.load("digits-reverse")
    x, y = digits.x.float(), digits.y
    aligner = run.aligner()
    out = aligner(run.flow, x, y, aligner.target(x))
    states = run.flow(x, y, taps="block.3.layer.2").states["block.3.layer.2"]
    target = run.encoder()(x)  # its grid is that of the flow
    expected = F.cosine_similarity(run.projectors.project("block.3.layer.2", states), target, dim=-1).mean(dim=1)
    assert_close(out.similarity["block.3.layer.2"], expected, atol=1e-5, rtol=0)
    assert_close(out.loss, -torch.stack(list(out.similarity.values())).mean(), atol=1e-6, rtol=0)


def test_tables_follow_the_schema():
    run, images = rl.load("digits-reverse"), rl.Images(limit=40)
    x, _ = run.data("test", 4)
    tables = [
        rl.routing(run, ["detach"], images=2), rl.refinement_errors(run, [0], images=2),
        rl.gradient_ratio(run, batches=1, batch=4),
        rl.probe(run, "block.3.layer.2", limit=40, classifiers=["gradient"]),
        rl.similarity(run, taps="block.3.layer.2", images=images), rl.embed(run, "block.3.layer.2", images=images),
        rl.teacher_floors(run, images), rl.agreement(run, x), rl.evaluate(run, samples=70, limit=20),
        rl.evaluate_samples(run, 70), rl.choose_read_noise(run, counts=(0, 1), limit=20),
        rl.compare([run], samples=0, limit=20),
        *rl.classification_report(run, images=images),
    ]  # fmt: skip
    for table in tables:
        check(table)
    with pytest.raises(rl.LabError, match="metrics"):
        check(pd.DataFrame({"metrics": ["cka"]}))
    with pytest.raises(rl.LabError, match="column value is"):
        check(pd.DataFrame({"value": ["high"]}))


def test_aligned_and_unaligned_runs_share_a_protocol():
    runs = [rl.load("digits-none"), rl.load("digits-reverse")]
    table = rl.probe(runs, "block.3.layer.2", probes=["knn"], limit=40)
    assert set(table.loc[table["layer"] > 0, "encoder"]) == {"", "vit_tiny_patch16_224, bundled:digits"}
    found = measurements(table, by=["tap", "block", "layer", "module_path"])
    assert len({row.protocol for row in found}) == 1, "the encoder belongs to the run, as its strategy does"
