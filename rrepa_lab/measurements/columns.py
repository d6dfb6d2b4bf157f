"""Columns that all tables of measurements share, so that rows of different instruments can stand in one table."""

import math
from typing import Any

from torch import Tensor

from rrepa_lab.align.facts import all_words
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.data.originals import seen_words
from rrepa_lab.flow.taps import Tap
from rrepa_lab.runs.run import Run


def about(run: Run) -> dict[str, Any]:
    """Which run was measured, what it was trained on and what its flow models: run, strategy, data, space, encoder, train_seed.

    The encoder is that of the alignment, "" where nothing is aligned; of a self-teacher it is said what that is.
    """
    config = run.config
    encoder = config.align.own_teacher if config.align.with_self else encoder_words(run, *config.teachers)
    return {
        "run": run.name, "strategy": config.align.strategy, "data": run.data_words, "space": config.space_words,
        "encoder": encoder if config.align.taps else "", "train_seed": config.train.seed,
    }  # fmt: skip


def encoder_words(run: Run, *encoders: EncoderConfig) -> str:
    """Encoders in a table: model, weights and what they were trained on, and the pictures they see if not the flow's.

    Example:
        >>> import rrepa_lab as rl
        >>> encoder_words(rl.load("digits-reverse"), EncoderConfig(model="efficientnet-lite0"))
        'efficientnet-lite0, package:efficientnet-lite0, trained on ImageNet with its labels'
    """
    return all_words(encoders) + seen_words(run.config.data)


PIXELS_TAP, ENCODER_TAP = "pixels", "encoder"  # rows of a table that are not of a flow; further encoders are "encoder.1", ...


def encoder_tap(number: int) -> str:
    """The tap of the rows of a run's encoder of this number, from 0.

    Example:
        >>> encoder_tap(0), encoder_tap(1)
        ('encoder', 'encoder.1')
    """
    return f"{ENCODER_TAP}.{number}" if number else ENCODER_TAP


def is_baseline(tap: str) -> bool:
    """Whether a row of this name is one of raw pixels or of an encoder.

    Example:
        >>> is_baseline("encoder.1"), is_baseline("block.1.layer.1")
        (True, False)
    """
    return tap.split(".", maxsplit=1)[0] in (PIXELS_TAP, ENCODER_TAP)


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


def average(values: Tensor) -> dict[str, Any]:
    """Columns value (mean of (n,) numbers), standard_error (of that mean, nan for one number) and n.

    Example:
        >>> import torch
        >>> average(torch.tensor([1.0, 2.0, 3.0]))
        {'value': 2.0, 'standard_error': 0.5773502691896258, 'n': 3}
    """
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"value": float(values.mean()), "standard_error": error, "n": len(values)}
