"""The first losses of a short training for every strategy, and the scores of the bundled runs, in float32."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import PLAIN

import rrepa_lab as rl
from golden.digest import SINGLE, TRAINED, Count, Tolerance

TRAININGS: dict[str, dict[str, Any]] = {
    "none": {}, "forward": {}, "detach": {}, "reverse": {},
    "reverse, other flow": {
        "flow.positions": "rotary", "flow.mlp": "swiglu", "flow.volume_preserving": True, "flow.noise": "uniform",
        "align.refinements": 1, "train.checkpointing": True,
    },
}  # fmt: skip
BUNDLED = ("digits-none", "digits-forward", "digits-detach", "digits-reverse")


def training(name: str) -> dict[str, Any]:
    """Ten steps under label drop, shift and noise: the reports of each, the validation after the last, the averaged weights."""
    config = rl.preset(f"digits-{name.partition(',')[0]}").override(
        PLAIN
        | {
            "flow.width": 16, "flow.head_width": 8, "flow.blocks": 2, "flow.layers": 2, "align.blocks": [1, 2],
            "align.projector_width": 16, "train.steps": 10, "train.batch": 32, "train.warmup": 3, "train.lr": 2e-3,
            "train.log_every": 1, "train.label_drop": 0.3, "data.shift": 1, "data.shift_probability": 0.5,
            "data.holdout": 0.2,
        }
        | TRAININGS[name]
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        reports = list(rl.train(config, Path(folder), device="cpu"))
        run = rl.load(Path(folder))
        weights, validated = run.flow.state_dict(), len(run.images("val"))
    last = reports[-1]
    accuracies = {"held out": last.held_out_accuracy, "train": last.train_accuracy}
    return {
        "loss": [report.loss for report in reports],
        "nats_per_dim": [report.nats_per_dim for report in reports],
        "grad_norm": [report.grad_norm for report in reports],
        "learning_rate": [report.learning_rate for report in reports],
        "similarity": {tap: [report.similarity[tap] for report in reports] for tap in last.similarity},
        "floors": last.floors,
        "validation": [last.held_out_nats_per_dim, last.train_nats_per_dim],
        "accuracy": {part: Count(round((value or 0.0) * validated), validated) for part, value in accuracies.items()},
        "weights": torch.cat([value.flatten() for value in weights.values()]),
    }


def bundled(name: str) -> dict[str, Any]:
    """Accuracies, scores, nats per dimension, similarity to the teacher, samples."""
    run = rl.load(name)
    x, y = run.data("test")
    some = run.data("test", 40)
    values: dict[str, Any] = {}
    for method, images, truth in (("gradient", x, y), ("bayes", *some), ("iterated", *some)):
        found = rl.classify(run, images, method)
        values[method] = {"accuracy": Count(int((found.label == truth).sum()), len(truth)), "scores": found.scores[:40]}
    scores = rl.evaluate(run, samples=0, n_noise_samples=2, limit=40).set_index("metric")["value"]
    values["nats_per_dim"] = float(scores["nats_per_dim"])
    values["log_prob"] = run.flow.log_prob(*some)
    near = rl.similarity(run, images=rl.Images(limit=60)).groupby("metric")[
        "value"
    ]  # in float32 rounding may change who is a neighbour
    values["similarity"] = {metric: rows for metric, rows in near if metric in ("cka", "teacher_cosine")}
    if run.projectors.taps:
        values["alignment"] = rl.alignment(run, *some).similarity
    values["samples"] = rl.sample(run, range(8), list(range(8))).images
    values["samples, guided"] = rl.sample(run, range(4), 3, guidance=1.0).images
    return values


CASES: dict[str, tuple[Callable[[], dict[str, Any]], Tolerance]] = {
    **{f"training {name}": (partial(training, name), TRAINED) for name in TRAININGS},
    **{f"bundled {name}": (partial(bundled, name), SINGLE) for name in BUNDLED},
}
