"""What an evaluation costs on this machine: samples, features, moments and the distance, so that 50,000 can be planned."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch

from rrepa_lab.bench.timing import alternate, spread
from rrepa_lab.evaluation.distances import frechet_to
from rrepa_lab.evaluation.moments import Gaussian, Moments
from rrepa_lab.evaluation.networks.contract import FeatureNetwork
from rrepa_lab.evaluation.networks.named import default_network, find_network
from rrepa_lab.evaluation.run_samples import RunSamples, Sampling
from rrepa_lab.runs.store import load

PICTURES = 64  # of a round
PUBLISHED = 50_000  # samples of the published protocols


def evaluation_costs(
    repeats: int = 3, device: str = "cpu", run: str = "digits-reverse", networks: tuple[str, ...] = ()
) -> pd.DataFrame:
    """Seconds of the steps of an evaluation for 64 samples, and hours for 50,000.

    Args:
        run: whose samples are drawn, unguided and denoised.
        networks: that read them; by default the one that the run is evaluated with.

    Returns: one row a case: what (the run or the network), case (samples, features, moments, distance), images (of a round),
        seconds (median), fastest, slowest, pictures_per_second, hours_for_50000; of the distance, which is computed once, only
        seconds.

    Raises: LabError for an unknown run or network.
    """
    loaded = load(run, device)
    each = [find_network(name, loaded.config.data) for name in networks] or [default_network(loaded.config)]
    drawn = RunSamples(loaded, Sampling(PICTURES))
    rows = torch.arange(PICTURES)
    x = drawn.batch(rows)
    cases: dict[tuple[str, str], Callable[[], Any]] = {(loaded.name, "samples"): partial(drawn.batch, rows)}
    for network in each:
        cases |= _of_network(network.to(device), x)
    times = alternate(cases, repeats, device)
    found = []
    for (what, case), seconds in times.items():
        row = {"what": what, "case": case, "images": 1 if case == "distance" else PICTURES} | spread(seconds)
        if case != "distance":
            row |= {
                "pictures_per_second": PICTURES / row["seconds"],
                "hours_for_50000": row["seconds"] / PICTURES * PUBLISHED / 3600,
            }
        found.append(row)
    return pd.DataFrame(found)


def _of_network(network: FeatureNetwork, x: torch.Tensor) -> dict[tuple[str, str], Callable[[], Any]]:
    found = network(x)
    width = network.dim
    base = torch.eye(width, dtype=torch.float64).numpy()
    some = Gaussian(found.pooled.double().mean(dim=0).cpu().numpy(), base, width + 1)

    def moments() -> None:
        Moments(width).add(found.pooled)
        if found.spatial is not None:
            Moments(network.spatial_dim).add(found.spatial)

    name = f"{network.name}, {width} + {network.spatial_dim} numbers"
    return {
        (name, "features"): partial(network, x), (name, "moments"): moments,
        (name, "distance"): lambda: frechet_to(some)(some),
    }  # fmt: skip
