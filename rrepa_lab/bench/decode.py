"""Decoding methods, side by side on the same noise."""

from collections.abc import Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.analysis.features import cycled_labels
from rrepa_lab.bench.timing import alternate, summary
from rrepa_lab.errors import LabError
from rrepa_lab.flow.decode.plan import METHODS
from rrepa_lab.measurements.columns import about
from rrepa_lab.runs.run import Run
from rrepa_lab.sampling.sample import noise

DECODERS = tuple(method for method in METHODS if method != "auto")  # "auto" is one of the others


@torch.no_grad()
def decoding(
    run: Run,
    images: int = 16,
    repeats: int = 7,
    *,
    guidance: float = 0.0,
    seed: int = 0,
    methods: Sequence[str] = DECODERS,
) -> pd.DataFrame:
    """Decode the same noise by every method, in alternation.

    Args:
        images: decoded at once; labels in turn, image i from the noise of seed `seed` + i, not denoised.
        repeats: rounds, see `alternate`.
        guidance: classifier-free guidance weight.
        methods: see `TarFlow.inverse`; compared with "sequential", which is run in any case.

    Returns: one row a method: run, strategy, data, space, encoder, train_seed, method, seconds (median over rounds, for all
        images), fastest, slowest, ratio (median over rounds of the time to that of "sequential" in the same round),
        seconds_per_image, error (largest difference of a pixel from "sequential", images being in [-1, 1]), n (images),
        guidance, seed.

    Raises: LabError for no images, an unknown method, or a negative guidance.
    """
    if images < 1:
        raise LabError(f"images must be at least 1, not {images}")
    flow = run.flow
    z = noise(flow, range(seed, seed + images)).to(next(flow.parameters()))
    y = cycled_labels(run, images).to(run.device) if flow.config.classes else None
    made: dict[str, Tensor] = {}

    def decode(method: str) -> None:
        made[method] = flow.inverse(z, y, guidance, method=method).x

    wanted = list(dict.fromkeys(["sequential", *methods]))
    times = alternate({method: partial(decode, method) for method in wanted}, repeats, str(run.device))
    rows = []
    for method in wanted:
        error = float((made[method] - made["sequential"]).abs().max())
        rows.append(about(run) | {"method": method} | summary(times[method], times["sequential"]) | {"error": error})
    table = pd.DataFrame(rows)
    return table.assign(seconds_per_image=table["seconds"] / images, n=images, guidance=guidance, seed=seed)
