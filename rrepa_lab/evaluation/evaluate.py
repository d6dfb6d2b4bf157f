"""Scores of a run with their protocol, one row a measurement."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.analysis.features import cycled_labels
from rrepa_lab.analysis.noise import image_noise
from rrepa_lab.checks import whole_number
from rrepa_lab.data.images import Batch
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.splits import split_rule
from rrepa_lab.data.subset import subset_words, whole
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.correct import correct
from rrepa_lab.evaluation.evaluator import Evaluator, find_evaluator, frechet_distance, load_evaluator
from rrepa_lab.flow.condition import Guidance
from rrepa_lab.flow.finite import NotFiniteError, cause, listed, rows_not_finite
from rrepa_lab.flow.likelihood import bits_per_dim, nats_per_dim
from rrepa_lab.measurements.columns import about, accuracy
from rrepa_lab.processes import shared
from rrepa_lab.runs.inputs import for_flow
from rrepa_lab.runs.run import Run
from rrepa_lab.sampling.sample import SamplesNotFiniteError, sample, seed_range
from rrepa_lab.space.networks import psnr

RECONSTRUCTED = 1000  # images whose reconstructions are scored, at most
_COLUMNS = ["run", "strategy", "data", "space", "split", "train_seed", "metric", "value", "unit", "n", "protocol"]


def evaluate(
    run: Run,
    split: str | Sequence[str] = "test",
    samples: int = 2000,
    n_noise_samples: int = 4,
    seed: int = 0,
    limit: int | None = None,
) -> pd.DataFrame:
    """Score a run on a split, or on several: training images beside others show how far it has overfitted.

    Rows: nats/dim under the training noise (bits/dim for a flow trained with uniform noise); accuracy by gradient
    and by Bayes' rule, under the noise of the run's own `config.read`, which the protocol says; where an evaluator is
    bundled, the Fréchet distance of samples to the split, and the part of them that it classifies as the label of the sample.
    Of a run on latents also the PSNR of images that are encoded and decoded, and beside the Fréchet distance of samples
    that of reconstructions.

    Args:
        split: one or several; samples are compared with the last.
        samples: images generated, unguided, with labels 0..K-1 in turn, seeds from `seed` on; 0 skips them.
        n_noise_samples: noise samples a likelihood is averaged over.
        seed: of the noise and the samples.
        limit: likelihood and accuracies of so many images of the split, class-balanced (seed 0); samples are compared with all
            of it.

    Returns: columns run, strategy, data, space, split, train_seed, metric, value, unit, n, protocol.

    Raises: LabError for numbers out of range, a split that does not exist; NotFiniteError where a score is not finite.

    Example:
        >>> import rrepa_lab as rl
        >>> rl.evaluate(rl.load("digits-reverse"), samples=0, n_noise_samples=1, limit=20).metric.tolist()
        ['nats_per_dim', 'gradient_accuracy', 'bayes_accuracy']
    """
    samples = whole_number("samples", samples)
    count = whole_number("noise samples", n_noise_samples, 1)
    seed_range(seed, max(samples, 1))
    if limit is not None:
        limit = whole_number("limit", limit, 1)
    names = [split] if isinstance(split, str) else list(split)
    if not names:
        raise LabError("name at least one split: train, val or test")
    tables = [_of_split(run, name, count, seed, limit) for name in names]
    if not run.config.space.is_pixels:
        row = _reconstruction(run, names[-1], limit)
        tables.append(pd.DataFrame([about(run) | {"split": names[-1]} | row], columns=_COLUMNS))
    if samples and (evaluator := find_evaluator(run.config.data)):
        words = f"{samples} samples, unguided, {{finish}}, labels in turn, seeds {seed}..{seed + samples - 1}"
        rows = _samples(run, evaluator, samples, seed, names[-1], words)
        tables.append(pd.DataFrame([about(run) | {"split": names[-1]} | row for row in rows], columns=_COLUMNS))
    return pd.concat(tables, ignore_index=True)


def _of_split(run: Run, split: str, n_noise_samples: int, seed: int, limit: int | None) -> pd.DataFrame:
    """Likelihood and accuracies of `evaluate`."""
    images = run.images(split)
    x, y = whole(images, limit)
    x, y = x.to(run.device), y.to(run.device)
    part = "" if len(y) == len(images) else f", {subset_words(len(y), len(images))}"
    rule = split_rule(run.config.data, split)
    if run.config.data.name != "digits" and rule != f"{split} = {split}/":
        part += f", {rule}"
    rows = [_likelihood(run, Batch(x, y), n_noise_samples, seed, part)]
    for method in ("gradient", "bayes") if run.config.flow.classes else ():
        right = correct(run, x, y, method, seed)
        on_images = image_noise(run).words
        what = "one step from zero logits" if method == "gradient" else "equal priors"
        rows.append(_row(f"{method}_accuracy", float(right.double().mean()), "fraction", len(y), f"{on_images}, {what}{part}"))
    return pd.DataFrame([about(run) | {"split": split} | row for row in rows], columns=_COLUMNS)


def evaluate_samples(
    run: Run,
    samples: int = 2000,
    *,
    guidance: float | Guidance = 0.0,
    denoise: bool = True,
    strength: float = 1.0,
    seed: int = 0,
    split: str = "test",
) -> pd.DataFrame:
    """Score samples under given settings with the bundled evaluator.

    Rows: frechet_distance to the split (evaluator units^2) and, for a flow with classes, label_agreement: the part of the
    samples that the evaluator classifies as their label. A Fréchet distance falls with the number of samples, so only
    distances of equally many belong together.

    Args:
        samples: images generated, with labels 0..K-1 in turn; image i from seed `seed` + i.
        guidance: as in `rl.sample`.
        denoise, strength: finish with one step along the score; see `rl.sample`.
        seed: of the first sample.
        split: the real images.

    Returns: columns run, strategy, data, space, split, train_seed, metric, value, unit, n, protocol, standard_error
        (binomial, of the agreement), guidance, annealed, temperature, denoise, strength, seed, finish (what the last step
        was).

    Raises: LabError where no evaluator is bundled for the run's data, for fewer samples than the evaluator has features, or
        numbers out of range, or samples that overflow (it says how many).

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.evaluate_samples(rl.load("digits-reverse"), 80, guidance=rl.Guidance(1.0, annealed=True))
        >>> table.metric.tolist()
        ['frechet_distance', 'label_agreement']
    """
    samples = whole_number("samples", samples, 1)
    rule = Guidance.of(guidance)
    settings: dict[str, Any] = {"guidance": rule, "denoise": denoise, "strength": strength}
    evaluator = load_evaluator(run.config.data)
    rows = _samples(run, evaluator, samples, seed, split, f"{samples} samples, labels in turn", **settings)
    table = pd.DataFrame([about(run) | {"split": split} | row for row in rows], columns=[*_COLUMNS, "standard_error"])
    columns: dict[str, Any] = {"guidance": rule.scale, "annealed": rule.annealed, "temperature": rule.temperature}
    return table.assign(**columns, denoise=denoise, strength=strength, seed=seed, finish=str(rows[0]["finish"]))


@torch.no_grad()
def _samples(
    run: Run, evaluator: Evaluator, samples: int, seed: int, split: str, protocol: str, **settings: Any
) -> list[dict[str, object]]:
    """Rows of `evaluate_samples`; `settings` are those of `sample`."""
    evaluator = evaluator.to(run.device)
    real = run.data(split).x
    seeds, labels, finish = torch.tensor(seed_range(seed, samples)), cycled_labels(run, samples), ""

    def of_rows(rows: Tensor) -> Tensor:
        nonlocal finish
        try:
            made = sample(run, seeds[rows].tolist(), labels[rows].tolist(), **settings)
        except SamplesNotFiniteError as error:
            raise LabError(f"no score: {error}") from error
        finish = made.finish
        return made.images

    fakes = shared(of_rows, samples).to(real)
    protocol = protocol.format(finish=finish)
    distance = frechet_distance(evaluator.features(fakes), evaluator.features(real))
    rows = [_row("frechet_distance", distance, "evaluator units^2", samples, f"{protocol}, against {len(real)} real images")]
    rows[0]["finish"] = finish
    if not run.config.space.is_pixels:  # what no sample can be better than
        again = run.space.decode(run.space.encode(real)).clamp(-1, 1)
        floor = frechet_distance(evaluator.features(again), evaluator.features(real))
        words = f"{len(real)} real images, encoded and decoded, against themselves"
        rows.append(_row("reconstruction_frechet_distance", floor, "evaluator units^2", len(real), words))
    if run.config.flow.classes:
        agree = accuracy(evaluator(fakes).argmax(dim=1).cpu() == labels)
        rows.append(_row("label_agreement", agree["value"], "fraction", samples, protocol) | agree)
    return rows


@torch.no_grad()
def _reconstruction(run: Run, split: str, limit: int | None) -> dict[str, object]:
    """PSNR of images that are encoded and decoded: what the space keeps of them."""
    images = run.images(split)
    x, _ = whole(images, min(RECONSTRUCTED, len(images)) if limit is None else limit)
    x = x.to(run.device)
    made = run.space.decode(run.space.encode(x)).clamp(-1, 1)
    words = f"mean over images, encoded and decoded without noise, {subset_words(len(x), len(images))}"
    return _row("reconstruction_psnr", float(psnr(x, made).mean()), "dB", len(x), words)


def _row(metric: str, value: float, unit: str, n: int, protocol: str) -> dict[str, object]:
    return {"metric": metric, "value": value, "unit": unit, "n": n, "protocol": protocol}


@torch.no_grad()
def _likelihood(run: Run, batch: Batch, n_noise_samples: int, seed: int, part: str) -> dict[str, object]:
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
    value = float(values.double().mean())
    return _row(metric, value, unit, len(batch.x), f"{how}, {n_noise_samples} draws, true labels, seed {seed}{part}")
