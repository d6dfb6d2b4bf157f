"""Outputs of the flow and of every public function on small flows, in float64 where the function takes it."""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from test_published import CHANNELS, PATCH, SIDE, STEM, make_state
from torch import Tensor, nn

import rrepa_lab as rl
from golden.digest import EXACT, MIXED, SINGLE, Tolerance
from golden.flows import FLOWS, flow_named, inputs, labels, small_run
from rrepa_lab.evaluation.adm import AdmFile

GUIDED: dict[str, dict[str, Any]] = {
    "guided": {"guidance": 1.5},
    "annealed": {"guidance": 1.5, "annealed": True, "temperature": 1.3},
}
UNGUIDED = {"guidance": 0.0, "annealed": False, "temperature": 1.0}
STRATEGIES = ("none", "forward", "detach", "reverse", "reverse-exact", "reverse-cached")


def gradient_norms(loss: Tensor, *modules: nn.Module) -> dict[str, float]:
    """Norm of the gradient in the parameters of each block and projector, and in each kind of parameter."""
    named = [item for module in modules for item in module.named_parameters()]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, materialize_grads=True)
    squares: dict[str, float] = {}
    for (name, _), gradient in zip(named, found, strict=True):
        first, second, *rest = name.split(".")
        for group in (f"{first}.{second}", f"{first}.{second}.{rest[0]}" if rest else ""):
            squares[group] = squares.get(group, 0.0) + float(gradient.square().sum())
    return {group: value**0.5 for group, value in squares.items() if group}


# --- the flow ---------------------------------------------------------------------------------------------------------


def encode(name: str) -> dict[str, Any]:
    """`forward` with every state, by every form of label, guided and not; `log_prob`, its gradients."""
    flow = flow_named(name)
    x, _ = inputs(flow.config)
    given = labels(flow.config)
    values: dict[str, Any] = {}
    for form, y in given.items():
        out = flow(x, y, taps="*")
        values[form] = {"z": out.z, "logdet": out.logdet, "states": out.states, "log_prob": flow.log_prob(x, y)}
    for rule, settings in GUIDED.items():
        out = flow(x, given.get("ids"), taps="block.*.layer.1", **settings)
        values[rule] = {"z": out.z, "logdet": out.logdet, "states": out.states}
    flow.requires_grad_()
    values["gradient"] = gradient_norms(flow.log_prob(x, given.get("ids")).mean(), flow)
    return values


def decode(name: str) -> dict[str, Any]:
    """`inverse` by every method, guided and not, with states."""
    flow = flow_named(name)
    _, z = inputs(flow.config)
    y = labels(flow.config).get("ids")
    values: dict[str, Any] = {}
    for rule, settings in {"plain": {}, **GUIDED}.items():
        for method in ("sequential", "cached", "jacobi"):
            decoding = rl.Decoding(method, tolerance=1e-12 if method == "jacobi" else None)
            out = flow.inverse(z, y, method=decoding, taps="block.*", **settings)
            values[f"{rule}, {method}"] = {"x": out.x, "states": out.states}
    values["by block"] = flow.inverse(z, labels(flow.config).get("by block"), method="cached").x
    return values


def classify(name: str) -> dict[str, Any]:
    """Every method, blocks and noise draws; the steps of the iterated one; the evidence of each block."""
    flow = flow_named(name)
    x, _ = inputs(flow.config)
    settings: dict[str, dict[str, Any]] = {
        "gradient": {}, "bayes": {"method": "bayes"}, "iterated": {"method": "iterated", "ascent": rl.Ascent(steps=3)},
        "gradient, block 2": {"blocks": [2]}, "bayes, block 1": {"method": "bayes", "blocks": [1]},
        "gradient, 2 draws": {"noise": rl.NoiseSamples(2, 0.2)},
        "bayes, 2 draws": {"method": "bayes", "noise": rl.NoiseSamples(2, 0.3)},
    }  # fmt: skip
    values: dict[str, Any] = {}
    for what, given in settings.items():
        found = rl.classify(flow, x, **given)
        top = found.top(2)
        values[what] = {
            "scores": found.scores, "label": found.label, "path": found.path, "probability": found.probability,
            "margin": found.margin, "top scores": top.scores, "top labels": top.labels,
        }  # fmt: skip
    values["steps"] = torch.stack([step.scores for step in rl.classify_steps(flow, x, ascent=rl.Ascent(3, 0.5))])
    values["evidence"] = rl.evidence(flow, x)
    values["evidence, 2 draws"] = rl.evidence(flow, x, noise=rl.NoiseSamples(2, 0.2))
    return values


def trace(name: str) -> dict[str, Any]:
    """Both directions, from images and from noise."""
    flow = flow_named(name)
    x, z = inputs(flow.config)
    y = labels(flow.config).get("ids")
    traces = {
        "forward": rl.trace(flow, x, y, "forward", taps="*"),
        "forward, guided": rl.trace(flow, x, y, "forward", taps="block.1.layer.1", guidance=rl.Guidance(1.5, True, 1.3)),
        "reverse": rl.trace(flow, x, y, "reverse", taps="*"),
        "reverse, noise": rl.trace(flow, z, y, "reverse", taps="block.2.layer.1", guidance=1.0 if y is not None else 0.0),
    }
    return {what: {"states": found.states, "images": found.images} for what, found in traces.items()}


def sample(name: str) -> dict[str, Any]:
    """Samples with and without the denoising step, guided."""
    flow = flow_named(name)
    label = 1 if flow.config.classes else None
    rules = GUIDED if flow.config.classes else {}
    values: dict[str, Any] = {}
    plain: dict[str, dict[str, Any]] = {"plain": {}, "as decoded": {"denoise": False}, "strength": {"strength": 0.5}}
    for what, settings in (plain | rules).items():
        rule = rl.Guidance(*(settings.get(key, default) for key, default in UNGUIDED.items()))
        other = {key: value for key, value in settings.items() if key not in UNGUIDED}
        made = rl.sample(flow, [3, 4], label, rule, **other)
        values[what] = {"images": made.images, "path": torch.stack([stage.flatten() for stage in made.path])}
    return values


def interventions(name: str) -> dict[str, Any]:
    """States exchanged, moved and removed, in both directions, and singular values."""
    flow = flow_named(name)
    x, _ = inputs(flow.config)
    y = labels(flow.config).get("ids")
    tap = "block.2.layer.1"
    moved = torch.linspace(-1, 1, flow.config.width, dtype=torch.float64)
    found = {}
    for direction in ("reverse", "forward"):
        found[f"patch, {direction}"] = rl.patch(flow, x.flip(0), x, tap, y=y, tokens=[0, 2], direction=direction)
        found[f"steer, {direction}"] = rl.steer(flow, x, f"{tap}.attention", moved, 0.5, y=y, direction=direction)
        found[f"ablate, {direction}"] = rl.ablate(flow, x, f"{tap}.head.1", mean=True, y=y, direction=direction)
    giver = x[:1] if y is None else rl.Batch(x[:1], y[:1])
    found["patch, tokens"] = rl.patch(flow, giver, x, "block.2.in", y=y, tokens=[1])
    values: dict[str, Any] = {
        what: {"images": one.images, "by block": one.delta_by_block, "prior": one.delta_prior} for what, one in found.items()
    }
    return values | {"jacobian": rl.jacobian(flow, x[:1], tolerance=1e-9)}


# --- runs -------------------------------------------------------------------------------------------------------------


@cache
def test_images() -> tuple[Tensor, Tensor]:
    """Eight digits of the test split."""
    x, y = small_run().data("test", 8)
    return x.double(), y


def alignment(strategy: str) -> dict[str, Any]:
    """Loss, similarity and the norms of its gradient; of the reverse strategy with refinements too; two kinds of flows."""
    x, y = test_images()
    random = torch.Generator().manual_seed(4)
    noised = x + 0.2 * torch.randn(x.shape, generator=random, dtype=torch.float64)
    other = {"flow.positions": "rotary", "flow.mlp": "swiglu", "flow.volume_preserving": True, "align.blocks": [1, 3]}
    values: dict[str, Any] = {}
    for what, settings in {"learned": {}, "rotary": other}.items():
        run = small_run(strategy, settings=settings)
        for module in (run.flow, run.projectors):
            module.requires_grad_()
        for refinements in (0, 2) if strategy == "reverse" else (None,):
            found = rl.alignment(run, noised, y, clean=x, refinements=refinements)
            name = what if not refinements else f"{what}, {refinements} refinements"
            norms = gradient_norms(found.loss, run.flow, run.projectors) if strategy != "none" else {}
            values[name] = {"loss": found.loss, "similarity": found.similarity, "gradient": norms}
            values[name]["without label"] = rl.alignment(run, x, refinements=refinements).loss
    return values


def gradients() -> dict[str, Any]:
    """The tables about gradients of the alignment loss."""
    run = small_run("reverse")
    return {
        "routing": rl.routing(run, STRATEGIES[1:], images=4),
        "routing, fresh": rl.routing(run.config, ["forward", "reverse"], taps="block.1.layer.2", images=4),
        "refinement_errors": rl.refinement_errors(run, (0, 1, 2), images=4),
        "gradient_ratio": rl.gradient_ratio(run, batches=2, batch=8),
        "gradient_ratio, forward": rl.gradient_ratio(run, strategy="forward", weight=2.0, batches=2, batch=8),
    }


def floors() -> dict[str, Any]:
    """The cosine with the teacher that is reached without reading the image."""
    run = small_run("forward")
    features = torch.randn(12, 4, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ids = torch.arange(12) % 3
    return {
        "position_floor": rl.position_floor(features, ids),
        "position_floor, no labels": rl.position_floor(features),
        "teacher_floors": rl.teacher_floors(run, rl.Images(limit=40)),
        "teacher_floors, train": rl.teacher_floors(run, rl.Images("train", limit=40), noise_std=0.1),
    }


def similarities() -> dict[str, Any]:
    """Similarity to the teacher and to another run, in both directions."""
    run, other = small_run("reverse"), small_run("forward", seed=2)
    few: dict[str, Any] = {"images": rl.Images(limit=24), "neighbours": 5}

    def how(**settings: Any) -> rl.FeatureProtocol:
        return rl.FeatureProtocol(samples=24, **settings)

    return {
        "teacher": rl.similarity(run, **few),
        "teacher, labels and draws": rl.similarity(run, taps="block.2.*.1", protocol=how(feed_label=True, noise=2), **few),
        "teacher, reverse": rl.similarity(run, protocol=how(direction="reverse", feed_label=True, guidance=1.0), **few),
        "run": rl.similarity(run, other, taps="block.1.layer.*", protocol=how(pool="all"), **few),
    }


def spatial() -> dict[str, Any]:
    """Spatial structure of the flow's features in both directions, and of its teacher's."""
    run = small_run("reverse")
    generated = rl.FeatureProtocol("reverse", samples=12, feed_label=True, guidance=1.0)
    return {
        "taps and teacher": rl.spatial_structure(run, images=rl.Images(limit=24)),
        "tokens": rl.spatial_structure(run, "block.*.out", baselines=False, images=rl.Images("train", limit=12)),
        "reverse": rl.spatial_structure(run, "block.2.layer.1", metrics=["lds", "rmsc"], protocol=generated),
    }


def features() -> dict[str, Any]:
    """Maps of features, nearest neighbours and colours."""
    run = small_run("reverse")
    x, y = test_images()
    states = run.flow(x, y, taps="block.*.layer.1").states
    pooled = states["block.2.layer.1"].mean(dim=1)
    generated = rl.FeatureProtocol("reverse", samples=12, feed_label=True)
    maps = {
        "embed": rl.embed(run, "block.2.layer.1", images=rl.Images(limit=24)),
        "embed, reverse": rl.embed(run, "block.3.layer.2", protocol=generated, components=3),
    }
    for table in maps.values():
        for axis in ("c1", "c2", "c3"):
            if axis in table:
                table[axis] = table[axis].abs()  # an axis of a PCA has no sign of its own
    return maps | {
        "neighbours": rl.neighbours(pooled, pooled[:3], k=3, exclude=[0, 1, 2]),
        "patch_colours": rl.patch_colours(states, run.flow.config.side),
    }


def agreement() -> dict[str, Any]:
    """The columns that are not rounding errors."""
    x, y = test_images()
    table = rl.agreement(small_run("reverse"), x[:3], y[:3], guidance=1.0)
    small = table[["gap", "relative_gap", "round_trip_error"]].to_numpy()
    return {"table": table.drop(columns=["gap", "relative_gap", "round_trip_error"]), "exact": float((small < 1e-8).all())}


def probes() -> dict[str, Any]:
    """Probes of layers, pixels and teacher; the best layer."""
    run = small_run("reverse")
    table = rl.probe(
        run, taps="block.*.layer.1", classifiers=["gradient"], limit=60,
        protocol=[rl.FeatureProtocol(pool=pool) for pool in ("mean", "all")],
    )  # fmt: skip
    known = table.assign(value=[((7 * row) % 11) / 11 for row in range(len(table))])  # a maximum that rounding cannot move
    return {"table": table, "best_layer": rl.best_layer(known[known["pool"] == "mean"], "knn_accuracy")}


def steering() -> dict[str, Any]:
    """One vector of each kind."""
    run, images = small_run(), rl.Images(limit=60)
    vectors = {
        "class": rl.steering_vector(run, "block.2.layer.1", "class", label=3, versus=8, images=images),
        "component": rl.steering_vector(run, "block.2.layer.1", "component", component=2, images=images),
        "probe": rl.steering_vector(run, "block.2.in", "probe", label=3, images=images),
    }
    return {kind: {"vector": found.vector, "words": found.words} for kind, found in vectors.items()}


def classified() -> dict[str, Any]:
    """Reports about the classification of a split, and the choice of its noise."""
    run = small_run("none")
    report = rl.classification_report(run, images=rl.Images(limit=30), bins=5)
    iterated = rl.classification_report(run, "iterated", images=rl.Images(limit=20), ascent=rl.Ascent(steps=3), noise=1)
    return {
        "gradient": report._asdict(),
        "iterated": {"summary": iterated.summary, "images": iterated.images},
        "choose_read_noise": rl.choose_read_noise(run, counts=(0, 1, 2), limit=40),
    }


def _saved_reference(run: rl.Run) -> dict[str, Any]:
    """What the file of a reference holds."""
    with tempfile.TemporaryDirectory() as folder:
        rl.save_reference(Path(folder) / "reference.npz", "test", "digits", run=run)
        found = AdmFile(Path(folder) / "reference.npz").statistics()
        assert found is not None
        return {"mean": torch.from_numpy(found.mean), "covariance": torch.from_numpy(found.covariance)}


def scored() -> dict[str, Any]:
    """Scores of runs, of samples, and several runs in one table."""
    run, other = small_run("none", dtype=torch.float32), small_run("reverse", 2, torch.float32)
    uniform = small_run("none", dtype=torch.float32, settings={"flow.noise": "uniform"})
    return {
        "evaluate": rl.evaluate(run, ["val", "test"], samples=80, n_noise_samples=2, limit=20),
        "evaluate, uniform": rl.evaluate(uniform, samples=0, n_noise_samples=2, limit=20),
        "evaluate_samples": rl.evaluate_samples(run, 80, guidance=0.5, strength=0.5),
        "samples_by_class": rl.samples_by_class(run, 80),
        "score": rl.score(run.data("train", 90).x, run.data("test").x, "digits"),
        "choose_sampling": rl.choose_sampling(run, guidances=[0.0, 0.5], samples=80),
        "nearest_training": rl.nearest_training(run, 20).table,
        "save_reference": _saved_reference(run),
        "compare": rl.compare([run, other], samples=0, limit=20),
        "compare, single": rl.compare([run, other], samples=0, limit=20, over_seeds=False),
    }


def imported() -> dict[str, Any]:
    """A run from a checkpoint of the public code: its configuration and its map."""
    values: dict[str, Any] = {}
    random = torch.Generator().manual_seed(6)
    x = 2 * torch.rand(2, CHANNELS, SIDE * PATCH, SIDE * PATCH, generator=random) - 1
    with tempfile.TemporaryDirectory() as folder:
        torch.save(make_state(), Path(folder) / f"{STEM}.pth")
        run = rl.import_tarflow(Path(folder) / f"{STEM}.pth", Path(folder) / "run")
        run.flow.double()
        flow = run.config.flow
        values["config"] = [
            flow.image_size,
            flow.patch_size,
            flow.width,
            flow.blocks,
            flow.layers,
            flow.classes,
            flow.noise_std,
        ]
        values["log_prob"] = run.flow.log_prob(x.double(), torch.tensor([2, -1]))
    return values


def stored() -> dict[str, Any]:
    """What goes through a file: a run, a result, a plan."""
    run = small_run("reverse")
    x, y = test_images()
    with tempfile.TemporaryDirectory() as folder:
        run.save(folder, torch.float64)
        again = rl.load(Path(folder))
        result = rl.write_result(Path(folder) / "result", "golden", rl.similarity(run, images=rl.Images(limit=20)), [run])
    plan = rl.calibrate(again, repeats=1)
    known = len(plan.windows) == 3 and all(1 <= size < 16 for size in plan.windows) and plan.upto >= 0
    return {
        "log_prob of the loaded run": again.flow.log_prob(x.float(), y),
        "write_result": result,
        "preset": ", ".join(f"{key}={value}" for key, value in rl.preset("imagenet64-reverse").align.to_dict().items()),
        "bundled runs": ", ".join(info.name for info in rl.available() if info.name.startswith("digits-")),
        "plan is well-formed": float(known),
    }


CASES: dict[str, tuple[Callable[[], dict[str, Any]], Tolerance]] = {
    **{f"encode {name}": (partial(encode, name), EXACT) for name in FLOWS},
    **{f"decode {name}": (partial(decode, name), EXACT) for name in FLOWS},
    **{f"classify {name}": (partial(classify, name), EXACT) for name in FLOWS if FLOWS[name].classes},
    **{f"trace {name}": (partial(trace, name), EXACT) for name in FLOWS},
    **{f"sample {name}": (partial(sample, name), MIXED) for name in FLOWS},
    **{f"interventions {name}": (partial(interventions, name), MIXED) for name in FLOWS},
    **{f"alignment {strategy}": (partial(alignment, strategy), MIXED) for strategy in STRATEGIES},
    "gradients": (gradients, MIXED),
    "floors": (floors, MIXED),
    "similarities": (similarities, MIXED),
    "spatial": (spatial, MIXED),
    "features": (features, MIXED),
    "agreement": (agreement, MIXED),
    "probes": (probes, MIXED),
    "steering": (steering, MIXED),
    "classified": (classified, MIXED),
    "scored": (scored, SINGLE),
    "imported": (imported, MIXED),
    "stored": (stored, SINGLE),
}
