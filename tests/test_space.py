"""Spaces: pictures in and out of every instrument, a flow of something smaller between."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import PLAIN
from torch.testing import assert_close

import rrepa_lab as rl
from rrepa_lab.errors import LabError
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.runs.inputs import encoded
from rrepa_lab.space.config import SPACES

HALF = {
    "space.kind": "half-size", "flow.image_size": 4, "flow.patch_size": 1, "flow.width": 32, "flow.head_width": 16,
    "flow.blocks": 2, "flow.layers": 2, "align.blocks": [2], "align.projector_width": 16, "train.steps": 20,
    "train.batch": 32, "train.warmup": 2, "train.eval_every": 10,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    import_module("extend.half_size")
    yield
    del SPACES._values["half-size"], sys.modules["extend.half_size"]


@pytest.fixture(scope="module")
def run(registered: None, tmp_path_factory: pytest.TempPathFactory) -> rl.Run:
    """A short training of digits-reverse on means of 2 x 2 pixels, then moved further from its zero start."""
    out = tmp_path_factory.mktemp("half") / "half"
    list(rl.train(rl.preset("digits-reverse").override(PLAIN | HALF), out, device="cpu"))
    run = rl.load(out)
    perturb(run.flow, 0, std=0.05)
    return run


def test_the_flow_models_the_space_and_the_instruments_speak_pictures(run):
    x, y = run.data("test", 40)
    assert run.flow.config.image_shape == run.space.shape == (1, 4, 4)
    assert x.shape[1:] == run.space.picture_shape == (1, 8, 8)
    for method in ("gradient", "bayes", "iterated"):
        assert rl.classify(run, x, method).scores.shape == (40, 10)
    assert rl.evidence(run, x, noise=2).shape == (40, 2, 10)
    assert rl.embed(run, "block.2.layer.1", images=rl.Images(limit=20)).shape[0] == 20
    assert (rl.similarity(run, taps="block.2.layer.2", images=rl.Images(limit=60)).space == "half-size 1x4x4 [" +
            run.config.space.fingerprint + "]").all()  # fmt: skip
    protocols = [rl.FeatureProtocol(), rl.FeatureProtocol("reverse", samples=60)]
    table = rl.probe(run, "block.2.layer.2", probes=["knn"], protocol=protocols, classifiers=["gradient"], limit=60)
    assert len(table) == 7
    assert rl.teacher_floors(run, rl.Images(limit=40)).value.notna().all()
    assert rl.gradient_ratio(run, batches=1, batch=8).query("group == 'all'").value.notna().all()
    assert rl.routing(run, ["detach"], images=2).gradient_norm.max() > 0
    assert rl.alignment(run, x, y).similarity.keys() == {"block.2.layer.2"}
    assert rl.agreement(run, x[:4]).relative_gap.max() < 1e-3
    assert rl.classification_report(run, images=rl.Images(limit=40)).images.shape[0] == 40
    assert rl.choose_read_noise(run.__class__(**vars(run) | {"config": run.config.override({"data.holdout": 0.2})}),
                                counts=(0, 1), limit=20).chosen.sum() == 1  # fmt: skip


def test_what_the_flow_is_given_is_what_the_space_encodes(run):
    x, y = run.data("test", 6)
    latents = run.space.encode(x)
    with torch.no_grad():
        states = run.flow(latents, y, taps="block.2.layer.1").states
    for given in (x, x.numpy(), latents, ((x + 1) * 127.5).round().to(torch.uint8)):
        found = rl.trace(run, given, y, direction="forward", taps="block.2.layer.1").states
        assert_close(found["block.2.layer.1"], states["block.2.layer.1"], atol=2e-2 if given is not x else 1e-6, rtol=0)
    assert_close(encoded(run, x), latents, atol=0, rtol=0)
    with pytest.raises(LabError, match=r"images must be \(B, 1, 8, 8\) for this run, not \(2, 1, 5, 5\)"):
        rl.classify(run, torch.zeros(2, 1, 5, 5))


def test_samples_are_pictures_and_their_path_is_decoded(run):
    made = rl.sample(run, range(3), 1)
    assert made.finish == "denoised, decoded by half-size"
    assert made.images.shape == (3, 1, 8, 8)
    assert [tuple(stage.shape) for stage in made.path] == 4 * [(3, 1, 8, 8)]
    assert [tuple(stage.shape) for stage in made.x] == 3 * [(3, 1, 4, 4)]
    assert_close(made.path[1], run.space.decode(made.x[1]), atol=0, rtol=0)
    assert made.space.stage_words == "decoded from the latents of this stage"
    # one step along the score in the space, then decoded
    z = made.x[-1].clone().requires_grad_()
    (score,) = torch.autograd.grad(run.flow.log_prob(z, made.labels).sum(), z)
    finished = run.space.decode(made.x[-1] + run.flow.config.noise_std**2 * score)
    assert_close(made.images, finished.clamp(-1, 1), atol=1e-5, rtol=0)
    plain = rl.sample(run, range(3), 1, denoise=False)
    assert plain.finish == "as generated, decoded by half-size"
    assert_close(plain.path[-1].clamp(-1, 1), plain.images, atol=0, rtol=0)


def test_a_trace_has_pictures_of_every_stage(run):
    x, _ = run.data("test", 2)
    found = rl.trace(run, x)
    assert found.error.max() < 1e-3
    assert {tuple(image.shape) for image in found.images.values()} == {(2, 1, 8, 8)}
    assert_close(found.images["block.1.in"], run.space.decode(run.space.encode(x)), atol=1e-4, rtol=0)


def test_likelihoods_are_per_dimension_of_the_space_and_never_beside_another(run):
    table = rl.evaluate(run, samples=0, n_noise_samples=1, limit=20)
    row = table.set_index("metric").loc["nats_per_dim"]
    assert row["space"] == run.config.space_words
    assert "in means of 2 x 2 pixels, per dimension of these" in row["protocol"]
    x, y = run.data("test", 20)
    from rrepa_lab.data.loaders import generator

    noised = run.space.add_noise(run.space.encode(x), generator(0, 0))
    with torch.no_grad():
        assert row["value"] == pytest.approx(float(-run.flow.log_prob(noised, y).mean() / 16), abs=1e-5)
    with pytest.raises(LabError, match="was measured under 2 protocols, which do not share a column"):
        rl.compare([run, rl.load("digits-none")], samples=0, limit=20)
    apart = rl.compare([run, rl.load("digits-none")], samples=0, limit=20, apart=True)
    assert {"nats_per_dim [1]", "nats_per_dim [2]"} <= set(apart.metric)


def test_sizes_and_noise_that_do_not_fit_are_one_line(run):
    config = rl.preset("digits-none")
    with pytest.raises(LabError, match=r"flow.image_size is 8 but the space half-size makes 1x4x4 of pictures of 1x8x8"):
        config.override({"space.kind": "half-size"})
    with pytest.raises(LabError, match="flow.image_size is 4 but data.image_size is 8"):
        config.override({"flow.image_size": 4})
    with pytest.raises(LabError, match="flow.noise is 'uniform', which suits integers, but the space is half-size"):
        config.override(HALF | {"flow.noise": "uniform"})
    with pytest.raises(LabError, match="'half-sise'.*half-size"):
        config.override({"space.kind": "half-sise"})


def test_another_space_than_that_of_the_training_is_refused_with_both_values(run, tmp_path):
    assert run.config.space.stored == {"version": None}
    other = rl.Run(run.flow, run.config.override({"space.weights": "another"}), run.classes, run.projectors)
    with pytest.raises(LabError, match="half-size another is not the one .*: version is another there, and None in the run"):
        rl.sample(other, 0)


def test_the_example_is_one_short_file():
    assert len((Path(__file__).parent / "extend" / "half_size.py").read_text("utf-8").splitlines()) < 45


def test_a_resumed_run_is_compared_with_the_space_it_was_trained_in(run):
    with pytest.raises(LabError, match="space.weights was None, now other"):
        list(rl.train(run.config.override({"space.weights": "other", "space.stored": {}}), run.directory, resume=True))
