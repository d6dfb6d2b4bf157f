"""What a configuration is, in a line or as facts."""

from typing import Any

import torch

from rrepa_lab.align.facts import all_words, teacher_facts
from rrepa_lab.data.originals import seen_words
from rrepa_lab.flow.taps import Tap
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.runs.config import RunConfig


def summary(config: RunConfig) -> str:
    """Size, strategy and steps in a line."""
    flow = config.flow
    size = f"{flow.size}, width {flow.width}" + ("" if config.space.is_pixels else f", in latents ({config.space.kind})")
    if config.origin:
        return f"{size}, imported"
    how = "not aligned" if config.align.strategy == "none" else f"{config.align.strategy} {config.align.place}"
    how += "".join(f", {words}" for words in config.align.recipe) if config.align.taps else ""
    began = f", from {config.init.name}" if config.init is not None else ""
    return f"{size}, {how}, {config.train.steps} steps{began}"


def describe_config(config: RunConfig) -> dict[str, Any]:
    """The facts a reader asks for first: sizes, parameters, aligned taps with their module paths."""
    flow, align = config.flow, config.align.counted(config.flow.blocks, config.flow.layers)
    with torch.device("meta"):
        known = flow.model_copy(update={"classes": max(0, flow.classes)})
        parameters = sum(p.numel() for p in TarFlow(known).parameters())
    facts: dict[str, Any] = {
        "name": config.name,
        "data": config.data.words,
        "image": "x".join(map(str, config.frame.picture)),
        "tokens": flow.tokens,
        "token_size": flow.token_size,
        "flow": f"{flow.size}, width {flow.width}",
        "parameters": parameters,
        "noise": f"gaussian, sigma {flow.noise_std}" if flow.noise == "gaussian" else "uniform dequantization",
        "strategy": align.strategy,
    }
    if not config.space.is_pixels:
        weights = config.space.weights or "space.weights is not set"
        facts["space"] = f"{config.space_words}, {weights}"
    if align.taps:
        facts["aligned"] = [f"{name} ({Tap.parse(name).module_path})" for name in align.taps]
        facts["lambda"] = align.weight
        if align.recipe:
            facts["recipe"] = align.recipe
    if config.teachers and align.taps:
        facts["encoder"] = all_words(config.teachers) + seen_words(config.data)
        if any(licences := [teacher_facts(encoder).licence for encoder in config.teachers]):
            facts["encoder licence"] = " + ".join(licence or "not known" for licence in licences)
    if config.read.n_noise_samples:
        sigma = "the training noise" if config.read.noise_std is None else f"noise of sigma {config.read.noise_std:g}"
        facts["instruments"] = f"read images under {config.read.n_noise_samples} x {sigma}"
    if config.init is not None:
        facts["began with"] = config.init.words
    if config.origin:
        return facts | {"origin": config.origin}
    return facts | {"steps": config.train.steps, "batch": config.train.batch, "lr": config.train.lr, "seed": config.train.seed}
