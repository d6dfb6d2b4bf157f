"""What a run says of images: likelihood, and accuracies with and without a trained classifier."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rrepa_lab.analysis.classify import Ascent
from rrepa_lab.analysis.noise import image_noise
from rrepa_lab.analysis.probe import best_layer, probe
from rrepa_lab.data.images import Batch
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.splits import splits
from rrepa_lab.evaluation.correct import label_ranks
from rrepa_lab.evaluation.intervals import NORMAL, mean_interval
from rrepa_lab.flow.finite import NotFiniteError, cause, listed, rows_not_finite
from rrepa_lab.flow.likelihood import bits_per_dim, nats_per_dim
from rrepa_lab.measurements.columns import accuracy
from rrepa_lab.processes import shared
from rrepa_lab.runs.inputs import for_flow
from rrepa_lab.runs.run import Run

MANY = 10  # classes above which the accuracy of the best five is of interest
TOP = 5
PROBED = 5000  # images that a probe is fitted on, at most


@torch.no_grad()
def likelihood(run: Run, batch: Batch, n_noise_samples: int, seed: int, part: str) -> dict[str, Any]:
    """A row: nats/dim under the training noise, or bits/dim of a flow that was trained with uniform noise.

    Args:
        part: which images these are, for the protocol.

    Raises: NotFiniteError, naming the images, where log p is not finite.
    """
    flow, config = run.flow, run.config.flow
    y = batch.y if config.classes else None

    def log_prob(noised: Tensor) -> Tensor:
        def of_rows(rows: Tensor) -> Tensor:
            parts = [(for_flow(flow, noised[part]), None if y is None else y[part]) for part in rows.split(256)]
            return torch.cat([flow.log_prob(*part) for part in parts])

        return shared(of_rows, len(noised))

    noises = [generator(seed, number) for number in range(n_noise_samples)]
    x = run.space.encode(batch.x)
    densities = torch.stack([log_prob(run.space.add_noise(x, noise)) for noise in noises])
    if config.noise == "gaussian":
        values = nats_per_dim(densities, config.dims)
        metric, unit, how = "nats_per_dim", "nats/dim", f"gaussian noise, sigma {config.noise_std}"
        how += "" if run.config.space.is_pixels else f" in {run.space.unit}, per dimension of these"
    else:
        values = bits_per_dim(densities, config.dims, run.config.data.levels)
        metric, unit, how = "bits_per_dim", "bits/dim", "uniform dequantization"
    bad = rows_not_finite(densities.T)
    if bad:
        raise NotFiniteError(f"log p is not finite for image {listed(bad)} of {len(batch.x)}: {cause(flow)}", bad)
    draws = f"{n_noise_samples} draw{'s' if n_noise_samples > 1 else ''}"
    protocol = f"{how}, {draws}, true labels, seed {seed}{part}"
    each = values.double().mean(dim=0)
    row = {"metric": metric, "value": float(values.double().mean()), "unit": unit, "n": len(batch.x), "protocol": protocol}
    return row | mean_interval(each, seed)


def accuracies(run: Run, batch: Batch, method: str, seed: int, part: str) -> Iterator[dict[str, Any]]:
    """Rows of a method of `rl.classify`, under the noise of the run's own `config.read`.

    Of more than ten classes a second row says how often the label is among the best five.
    """
    ranks = label_ranks(run, batch.x, batch.y, method, seed)
    steps = Ascent().steps
    what = {"gradient": "one step from zero logits", "bayes": "equal priors", "iterated": f"{steps} steps from zero logits"}
    protocol = f"{image_noise(run).words}, {what[method]}{part}"
    many = [(f"{method}_top5_accuracy", ranks < TOP)] if run.flow.config.classes > MANY else []
    for metric, right in [(f"{method}_accuracy", ranks == 0), *many]:
        row = {"metric": metric, "unit": "fraction", "protocol": protocol}
        yield row | accuracy(right) | mean_interval(right, seed)


def best_probe(run: Run, split: str, limit: int | None, part: str) -> dict[str, Any]:
    """A row: the linear probe of the layer that is best on the validation split, on this split; `best_tap` names the layer.

    Without a validation split, or on it, the best of all layers on the images themselves, which flatters: the row says so.
    """
    count = PROBED if limit is None else limit
    chosen_on = "val" if "val" in splits(run.config.data) else split
    honest = chosen_on != split

    def table(taps: str, scored: str) -> Any:
        data = {"train": run.images("train"), "test": run.images(scored)}
        return probe(run, taps, probes=["linear"], baselines=False, data=data, limit=count)

    found = best_layer(table("block.*.layer.*", chosen_on)).iloc[0]
    row = table(str(found["tap"]), split).iloc[0] if honest else found
    how = f"best of all layers on {chosen_on}" + ("" if honest else ", the scored images themselves, which flatters")
    value, error = float(row["value"]), float(row["standard_error"])
    interval = {"low": value - NORMAL * error, "high": value + NORMAL * error, "interval": "95 % over images, binomial"}
    protocol = f"{how}; {row['probe']}, {row['n_train']} training images, no label fed{part}"
    common = {"metric": "linear_accuracy", "value": value, "unit": "fraction", "standard_error": error, "n": int(row["n"])}
    return common | {"best_tap": str(row["tap"])} | interval | {"protocol": protocol}
