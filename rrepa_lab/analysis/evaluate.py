"""Scores of a run with their protocol, one row a measurement."""

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.analysis.classify import classify
from rrepa_lab.analysis.evaluator import Evaluator, frechet_distance, load_evaluator
from rrepa_lab.analysis.features import in_turn
from rrepa_lab.analysis.tables import about, accuracy
from rrepa_lab.data.datasets import split_rule
from rrepa_lab.data.images import Batch
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.pixels import training_noise
from rrepa_lab.data.subset import subset_words, whole
from rrepa_lab.errors import LabError
from rrepa_lab.flow.likelihood import bits_per_dim, nats_per_dim
from rrepa_lab.runs import Run
from rrepa_lab.sampling.sample import sample

_COLUMNS = ["run", "strategy", "split", "train_seed", "metric", "value", "unit", "n", "protocol"]


def evaluate(
    run: Run, split: str = "test", samples: int = 2000, draws: int = 4, seed: int = 0, limit: int | None = None
) -> pd.DataFrame:
    """Score a run on a split.

    Rows: nats/dim under the training noise (bits/dim for a flow trained with uniform noise); accuracy by gradient
    and by Bayes' rule, on clean images; where an evaluator is bundled, the Fréchet distance of samples to the
    split, and the part of them that it sees as the label asked for.

    Args:
        samples: images generated, unguided, with labels 0..K-1 in turn, seeds from `seed` on; 0 skips them.
        draws: noise draws a likelihood is averaged over.
        seed: of the noise and the samples.
        limit: likelihood and accuracies of so many images of the split, class-balanced (seed 0); samples are held against all
            of it.

    Returns: columns run, strategy, split, train_seed, metric, value, unit, n, protocol.
    """
    images = run.images(split)
    x, y = whole(images, limit)
    x, y = x.to(run.device), y.to(run.device)
    part = "" if len(y) == len(images) else f", {subset_words(len(y), len(images))}"
    rule = split_rule(run.config.data, split)
    if run.config.data.name == "folder" and rule != f"{split} = {split}/":
        part += f", {rule}"
    rows = [_likelihood(run, Batch(x, y), images.levels, draws, seed, part)]
    for method in ("gradient", "bayes") if run.config.flow.classes else ():
        right = classify(run, x, method=method).label == y
        what = "one step from zero logits" if method == "gradient" else "equal priors"
        rows.append(_row(f"{method}_accuracy", float(right.double().mean()), "fraction", len(y), f"clean images, {what}{part}"))
    told = about(run) | {"split": split}
    table = pd.DataFrame([told | row for row in rows], columns=_COLUMNS)
    if samples and (evaluator := _bundled_evaluator(run)):
        words = f"{samples} samples, unguided, denoised, labels in turn, seeds {seed}..{seed + samples - 1}"
        made = pd.DataFrame([told | row for row in _samples(run, evaluator, samples, seed, split, words)], columns=_COLUMNS)
        table = pd.concat([table, made], ignore_index=True)
    return table


def evaluate_samples(
    run: Run,
    samples: int = 2000,
    *,
    guidance: float = 0.0,
    annealed: bool = False,
    temperature: float = 1.0,
    denoise: bool = True,
    seed: int = 0,
    split: str = "test",
) -> pd.DataFrame:
    """Score samples under given settings with the bundled evaluator.

    Rows: frechet_distance to the split (evaluator units^2) and, for a flow with classes, label_agreement: the part of the
    samples that the evaluator sees as the label asked for. A Fréchet distance falls with the number of samples, so only
    distances of equally many belong together.

    Args:
        samples: images generated, with labels 0..K-1 in turn; image i from seed `seed` + i.
        guidance, annealed, temperature: as in `TarFlow.inverse`.
        denoise: finish with one step along the score.
        seed: of the first sample.
        split: the real images.

    Returns: columns run, strategy, split, train_seed, metric, value, unit, n, protocol, standard_error (binomial, of the
        agreement), guidance, annealed, temperature, denoise, seed.

    Raises: LabError where no evaluator is bundled for the run's data, or for fewer samples than the evaluator has features.
    """
    settings: dict[str, Any] = {
        "guidance": guidance, "annealed": annealed, "temperature": temperature, "denoise": denoise,
    }  # fmt: skip
    evaluator = load_evaluator(run.config.data)
    rows = _samples(run, evaluator, samples, seed, split, f"{samples} samples, labels in turn", **settings)
    table = pd.DataFrame([about(run) | {"split": split} | row for row in rows], columns=[*_COLUMNS, "standard_error"])
    return table.assign(**settings, seed=seed)


@torch.no_grad()
def _samples(
    run: Run, evaluator: Evaluator, samples: int, seed: int, split: str, protocol: str, **settings: Any
) -> list[dict[str, object]]:
    """Rows of `evaluate_samples`; `settings` are those of `sample`."""
    evaluator = evaluator.to(run.device)
    real = run.data(split).x
    made = sample(run, range(seed, seed + samples), in_turn(run, samples).tolist(), **settings)
    fakes = made.images.to(run.device)
    distance = frechet_distance(evaluator.features(fakes), evaluator.features(real))
    rows = [_row("frechet_distance", distance, "evaluator units^2", samples, f"{protocol}, against {len(real)} real images")]
    if run.config.flow.classes:
        agree = accuracy(evaluator(fakes).argmax(dim=1).cpu() == made.labels)
        rows.append(_row("label_agreement", agree["value"], "fraction", samples, protocol) | agree)
    return rows


def _bundled_evaluator(run: Run) -> Evaluator | None:
    """The evaluator of the run's data, where one is bundled."""
    try:
        return load_evaluator(run.config.data)
    except LabError:
        return None


def _row(metric: str, value: float, unit: str, n: int, protocol: str) -> dict[str, object]:
    return {"metric": metric, "value": value, "unit": unit, "n": n, "protocol": protocol}


@torch.no_grad()
def _likelihood(run: Run, batch: Batch, levels: int, draws: int, seed: int, part: str) -> dict[str, object]:
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
    return _row(metric, value, unit, len(batch.x), f"{how}, {draws} draws, true labels, seed {seed}{part}")
