"""Scores of a run with their protocol, one row a measurement."""

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.analysis.classify import classify
from rrepa_lab.analysis.evaluator import frechet_distance, load_evaluator
from rrepa_lab.analysis.features import in_turn
from rrepa_lab.data.datasets import Batch, load_split
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.pixels import training_noise
from rrepa_lab.errors import LabError
from rrepa_lab.flow.likelihood import bits_per_dim, nats_per_dim
from rrepa_lab.runs import Run
from rrepa_lab.sampling.sample import sample


def evaluate(run: Run, split: str = "test", samples: int = 2000, draws: int = 4, seed: int = 0) -> pd.DataFrame:
    """Score a run on a split.

    Rows: nats/dim under the training noise (bits/dim for a flow trained with uniform noise); accuracy by gradient
    and by Bayes' rule, on clean images; where an evaluator is bundled, the Fréchet distance of samples to the
    split, and the part of them that it sees as the label asked for.

    Args:
        samples: images generated, unguided, with labels 0..K-1 in turn, seeds from `seed` on; 0 skips them.
        draws: noise draws a likelihood is averaged over.
        seed: of the noise and the samples.

    Returns: columns run, strategy, split, train_seed, metric, value, unit, n, protocol.
    """
    x, y = run.data(split)
    images = load_split(run.config.data, split)
    rows = [_likelihood(run, Batch(x, y), images.levels, draws, seed)]
    for method in ("gradient", "bayes") if run.config.flow.classes else ():
        right = classify(run, x, method=method).label == y
        what = "one step from zero logits" if method == "gradient" else "equal priors"
        rows.append(_row(f"{method}_accuracy", float(right.double().mean()), "fraction", len(y), f"clean images, {what}"))
    if samples:
        rows += _samples(run, x, samples, seed)
    about = {"run": run.name, "strategy": run.config.align.strategy, "split": split, "train_seed": run.config.train.seed}
    return pd.DataFrame([about | row for row in rows])


def _row(metric: str, value: float, unit: str, n: int, protocol: str) -> dict[str, object]:
    return {"metric": metric, "value": value, "unit": unit, "n": n, "protocol": protocol}


@torch.no_grad()
def _likelihood(run: Run, batch: Batch, levels: int, draws: int, seed: int) -> dict[str, object]:
    flow, config = run.flow, run.config.flow
    y = batch.y if config.classes else None

    def log_prob(noised: Tensor) -> Tensor:
        parts = [slice(start, start + 256) for start in range(0, len(noised), 256)]
        return torch.cat([flow.log_prob(noised[part], None if y is None else y[part]) for part in parts])

    noises = [generator(seed, draw) for draw in range(draws)]
    densities = torch.stack(
        [log_prob(training_noise(batch.x, config.noise, config.noise_std, levels, noise)) for noise in noises]
    )
    if config.noise == "gaussian":
        values = nats_per_dim(densities, config.dims)
        metric, unit, how = "nats_per_dim", "nats/dim", f"gaussian noise, sigma {config.noise_std}"
    else:
        values = bits_per_dim(densities, config.dims, levels)
        metric, unit, how = "bits_per_dim", "bits/dim", "uniform dequantization"
    value = float(values.double().mean())
    return _row(metric, value, unit, len(batch.x), f"{how}, {draws} draws, true labels, seed {seed}")


@torch.no_grad()
def _samples(run: Run, real: Tensor, count: int, seed: int) -> list[dict[str, object]]:
    try:
        evaluator = load_evaluator(run.config.data).to(run.device)
    except LabError:
        return []
    made = sample(run, range(seed, seed + count), in_turn(run, count).tolist())
    fakes = made.images.to(run.device)
    protocol = f"{count} samples, unguided, denoised, labels in turn, seeds {seed}..{seed + count - 1}"
    distance = frechet_distance(evaluator.features(fakes), evaluator.features(real))
    against = f"{protocol}, against {len(real)} real images"
    rows = [_row("frechet_distance", distance, "evaluator units^2", count, against)]
    if run.config.flow.classes:
        agree = (evaluator(fakes).argmax(dim=1).cpu() == made.labels).double().mean()
        rows.append(_row("label_agreement", float(agree), "fraction", count, protocol))
    return rows
