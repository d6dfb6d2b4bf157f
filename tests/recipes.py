"""The settings of `align.*` that the tests go through, one at a time; run under torchrun, it trains with each of them.

python tests/recipes.py OUT    one run for each in OUT/<name>
"""

import sys
import warnings
from pathlib import Path

import rrepa_lab as rl
from rrepa_lab.errors import LabWarning

RECIPES: dict[str, dict[str, object]] = {
    "plain": {},
    "linear": {"align.projector": "linear"},
    "conv3": {"align.projector": "conv3"},
    "masked": {"align.projector": "masked"},
    "shared": {"align.sharing": "shared"},
    "spatial": {"align.target": "spatial"},
    "self": {"align.teacher": "self", "align.self_tap": "block.2.layer.2"},
    "random": {"align.teacher": "random"},
    "dropped": {"align.labels": "dropped"},
    "nt-xent": {"align.similarity": "nt-xent"},
    "cosine": {"align.schedule": "cosine"},
    "warmup": {"align.schedule": "warmup:3"},
    "until": {"align.schedule": "until:3"},
    "reverse-cached": {"align.strategy": "reverse-cached"},
    "refined": {"align.refinements": 1},
    "together": {
        "align.projector": "masked", "align.sharing": "shared", "align.target": "spatial", "align.labels": "dropped",
        "align.schedule": "until:5",
    },
}  # fmt: skip
SMALL: dict[str, object] = {
    "data.shift": 0, "data.holdout": 0.0, "train.keep": "last", "train.patience": 0, "train.precision": "float32",
    "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 2, "align.blocks": [1, 2], "align.layers": [1],
    "align.projector_width": 64, "train.batch": 32, "train.warmup": 2, "train.log_every": 1, "train.eval_every": 100,
    "train.save_every": 100,
}  # fmt: skip


def config_of(name: str, **more: object) -> rl.RunConfig:
    """digits-reverse, small, with the settings of a recipe."""
    settings = {key.replace("__", "."): value for key, value in more.items()}
    return rl.preset("digits-reverse").override(SMALL | RECIPES[name] | settings)


if __name__ == "__main__":
    warnings.simplefilter("error", LabWarning)
    for recipe in RECIPES:
        for _ in rl.train(config_of(recipe, train__steps=6), Path(sys.argv[1]) / recipe, device="cpu"):
            pass
