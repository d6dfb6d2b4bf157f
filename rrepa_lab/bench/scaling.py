"""How costs grow: with tokens, blocks, classes and images."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pandas as pd
import torch

from rrepa_lab.analysis.classify import classify
from rrepa_lab.bench.speed import random_flow
from rrepa_lab.bench.timing import alternate, spread
from rrepa_lab.data.loaders import generator
from rrepa_lab.flow.tarflow.config import FlowConfig
from rrepa_lab.sampling.sample import noise

BASE = FlowConfig(image_size=16, channels=3, patch_size=2, width=128, blocks=4, layers=2, classes=10)  # 64 tokens
TOKENS, BLOCKS, CLASSES, IMAGES = (16, 64, 256, 1024), (1, 2, 4, 8), (10, 100, 1000), (1, 4, 16, 64)
KINDS = ("encode", "cached", "jacobi", "classify")


def scaling_table(repeats: int, device: str) -> pd.DataFrame:
    """Seconds of encoding, decoding (by cached and jacobi) and classifying against one size at a time, the others as in BASE.

    Returns: columns kind, over (tokens, blocks, classes or images), size, seconds (median), fastest, slowest,
        seconds_per_image.
    """
    rows = []
    for over, size, config, images in _points():
        calls = _calls(config, images, device)
        if over == "classes":
            calls = {"classify": calls["classify"]}
        for kind, seconds in alternate(calls, repeats, device).items():
            times = spread(seconds)
            row = {"kind": kind, "over": over, "size": size} | times
            rows.append(row | {"seconds_per_image": times["seconds"] / images, "images": images})
    return pd.DataFrame(rows)


def _points() -> Iterator[tuple[str, int, FlowConfig, int]]:
    for tokens in TOKENS:
        yield "tokens", tokens, BASE.model_copy(update={"image_size": 2 * round(tokens**0.5)}), 4
    for blocks in BLOCKS:
        yield "blocks", blocks, BASE.model_copy(update={"blocks": blocks}), 4
    for classes in CLASSES:
        yield "classes", classes, BASE.model_copy(update={"classes": classes}), 4
    for images in IMAGES:
        yield "images", images, BASE, images


def _calls(config: FlowConfig, images: int, device: str) -> dict[str, Callable[[], Any]]:
    flow = random_flow(config, device).requires_grad_(False)
    x = torch.randn(images, *config.image_shape, generator=generator(0)).to(device)
    z, y = noise(flow, range(images)).to(device), (torch.arange(images) % config.classes).to(device)
    return {
        "encode": partial(torch.no_grad()(flow.forward), x, y),
        "cached": partial(flow.inverse, z, y, method="cached"),
        "jacobi": partial(flow.inverse, z, y, method="jacobi"),
        "classify": partial(classify, flow, x),
    }
