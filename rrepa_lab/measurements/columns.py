"""Columns that all tables of measurements share, so that rows of different instruments can stand in one table."""

import math
from typing import Any

from torch import Tensor

from rrepa_lab.flow.taps import Tap
from rrepa_lab.runs.run import Run


def about(run: Run) -> dict[str, Any]:
    """Which run was measured, what it was trained on and what its flow models: run, strategy, data, space, train_seed."""
    config = run.config
    return {
        "run": run.name, "strategy": config.align.strategy, "data": run.data_words, "space": config.space_words,
        "train_seed": config.train.seed,
    }  # fmt: skip


def place(tap: Tap | str) -> dict[str, Any]:
    """Where: tap, block, layer, module_path.

    Layer 0 is a block's tokens (block.<t>.in or .out). A name that is no tap ("pixels", "encoder") has block 0, layer 0
    and no module path.
    """
    if isinstance(tap, str):
        return {"tap": tap, "block": 0, "layer": 0, "module_path": ""}
    layer = tap.layer if isinstance(tap.layer, int) else 0
    return {"tap": tap.name, "block": tap.block, "layer": layer, "module_path": tap.module_path}


def accuracy(right: Tensor) -> dict[str, Any]:
    """Columns value (part of (n,) answers that is right), standard_error (binomial) and n."""
    value = float(right.double().mean())
    return {"value": value, "standard_error": math.sqrt(value * (1 - value) / len(right)), "n": len(right)}
