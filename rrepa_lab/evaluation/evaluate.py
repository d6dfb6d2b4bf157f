"""Scores of a run with their protocol, one row a measurement."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rrepa_lab.checks import whole_number
from rrepa_lab.data.images import Batch
from rrepa_lab.data.splits import split_rule
from rrepa_lab.data.subset import subset_words, whole
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.evaluation.nearest import nearest_training
from rrepa_lab.evaluation.networks.named import find_default_network
from rrepa_lab.evaluation.protocols import choose
from rrepa_lab.evaluation.readings import accuracies, best_probe, likelihood
from rrepa_lab.evaluation.run_samples import Sampling
from rrepa_lab.evaluation.sample_rows import sample_rows
from rrepa_lab.flow.condition import Guidance
from rrepa_lab.measurements.columns import about
from rrepa_lab.measurements.schema import arrange
from rrepa_lab.runs.run import Run
from rrepa_lab.space.networks import psnr

RECONSTRUCTED = 1000  # images whose PSNR is taken, at most
PARTS = ("likelihood", "gradient", "iterated", "bayes", "probe", "samples", "nearest")
USUAL = ("likelihood", "gradient", "bayes", "samples")
_FIRST = ["run", "strategy", "data", "space", "encoder", "split", "train_seed", "metric", "value", "unit", "n", "protocol"]


def evaluate(
    run: Run,
    split: str | Sequence[str] = "test",
    samples: int | Sampling = 2000,
    n_noise_samples: int = 4,
    seed: int = 0,
    limit: int | None = None,
    *,
    parts: str | Sequence[str] = USUAL,
    protocols: str | Sequence[str] | None = None,
    reference: Any = None,
    save_samples: Path | str | None = None,
) -> pd.DataFrame:
    """Score a run on a split, or on several: training images beside others show how far it has overfitted.

    | part | rows |
    |---|---|
    | likelihood | nats/dim under the training noise, bits/dim of a flow trained with uniform noise; of latents also PSNR |
    | gradient, iterated, bayes | accuracy by a method of `rl.classify`; of more than ten classes also of the best five |
    | probe | the linear probe of the layer that is best on the validation split |
    | samples | see `rl.evaluate_samples` |
    | nearest | distance of samples to the nearest training image, see `rl.nearest_training` |

    Args:
        split: one or several; samples are compared with the last.
        samples: how many are generated, unguided, with labels 0..K-1 in turn, seeds from `seed` on; or all their settings;
            0 skips them.
        n_noise_samples: noise samples a likelihood is averaged over.
        seed: of the noise, the samples and the bootstrap.
        limit: likelihood and accuracies of so many images of the split, class-balanced (seed 0); samples are compared with all
            of it.
        parts: of the table above; "all" for all of them.
        protocols, reference, save_samples: of `rl.evaluate_samples`.

    Returns: columns run, strategy, data, space, encoder, split, train_seed, metric, value, unit, n, protocol, standard_error,
        low, high and interval (over images or samples, never over training seeds), best_tap, probe, and for samples
        those of `rl.evaluate_samples`.

    Raises: LabError for numbers out of range, a split that does not exist, an unknown part or protocol; NotFiniteError where a
        score is not finite. Warns (LabWarning) where no network is at hand that samples could be compared with.

    Example:
        >>> import rrepa_lab as rl
        >>> rl.evaluate(rl.load("digits-reverse"), samples=0, n_noise_samples=1, limit=20).metric.tolist()
        ['nats_per_dim', 'gradient_accuracy', 'bayes_accuracy']
    """
    sampling = Sampling.of(samples, seed)
    count = whole_number("noise samples", n_noise_samples, 1)
    if limit is not None:
        limit = whole_number("limit", limit, 1)
    names = [split] if isinstance(split, str) else list(split)
    if not names:
        raise LabError("name at least one split: train, val or test")
    wanted = _parts(parts)
    scored = "samples" in wanted and sampling.n and (protocols is not None or find_default_network(run.config) is not None)
    chosen = choose(protocols, run) if scored else []  # before anything is measured: its weights may be missing
    rows: list[dict[Any, Any]] = [
        {"split": name} | row for name in names for row in _of_images(run, name, wanted, (count, seed, limit))
    ]
    if "likelihood" in wanted and not run.config.space.is_pixels:
        rows.append({"split": names[-1]} | _reconstruction(run, names[-1], limit))
    if chosen:
        found = sample_rows(run, sampling, chosen, names[-1], reference, save_samples)
        rows += [{"split": names[-1]} | row for row in found]
    if "nearest" in wanted and sampling.n and names[-1] != "train":
        rows += nearest_training(run, sampling, names[-1]).table.to_dict("records")
    if not rows:
        raise LabError(f"nothing to measure: {', '.join(wanted)} with {sampling.n} samples")
    return _table(run, rows)


def _parts(parts: str | Sequence[str]) -> tuple[str, ...]:
    listed = [parts] if isinstance(parts, str) else list(parts)
    if listed == ["all"]:
        return PARTS
    for name in listed:
        if name not in PARTS:
            raise unknown("part of an evaluation", name, [*PARTS, "all"])
    return tuple(listed)


def _of_images(run: Run, split: str, wanted: Sequence[str], settings: tuple[int, int, int | None]) -> Iterator[dict[str, Any]]:
    """Rows of likelihood and accuracies."""
    n_noise_samples, seed, limit = settings
    images = run.images(split)
    x, y = whole(images, limit)
    batch = Batch(x.to(run.device), y.to(run.device))
    part = "" if len(y) == len(images) else f", {subset_words(len(y), len(images))}"
    rule = split_rule(run.config.data, split)
    if run.config.data.name != "digits" and rule != f"{split} = {split}/":
        part += f", {rule}"
    if "likelihood" in wanted:
        yield likelihood(run, batch, n_noise_samples, seed, part)
    if run.config.flow.classes:
        for method in ("gradient", "iterated", "bayes"):
            if method in wanted:
                yield from accuracies(run, batch, method, seed, part)
        if "probe" in wanted:
            yield best_probe(run, split, limit, part)


def _table(run: Run, rows: list[dict[Any, Any]]) -> pd.DataFrame:
    """Rows with the columns of the run; the usual ones first, a text that there is not is empty."""
    return arrange(pd.DataFrame([about(run) | row for row in rows]), _FIRST)


def evaluate_samples(
    run: Run,
    samples: int | Sampling = 2000,
    *,
    guidance: float | Guidance = 0.0,
    denoise: bool = True,
    strength: float = 1.0,
    seed: int = 0,
    split: str = "test",
    protocols: str | Sequence[str] | None = None,
    reference: Any = None,
    save_samples: Path | str | None = None,
) -> pd.DataFrame:
    """Score samples under named protocols.

    Rows of the protocol "encoder", whose network is the bundled evaluator of digits, and of photographs an encoder at hand that
    is no teacher of the run: FD, sFD (Fréchet distances of pooled and of spatial features), KD (kernel distance), precision,
    recall, Vendi score, all with the network in brackets; for a flow with classes label_agreement (the part of the samples that
    the network, or a linear probe of its features, classifies as their label), the accuracy of that classifier on real images,
    and class_diversity. "adm": FID, sFID, IS, precision and recall; "tarflow": FID. See `evaluation.protocols`.

    A Fréchet distance falls with the number of samples, so only distances of equally many belong together.

    Args:
        samples: images generated, image i from seed `seed` + i; or all settings, in place of the next four.
        guidance: as in `rl.sample`.
        denoise, strength: finish with one step along the score; see `rl.sample`.
        seed: of the first sample, and of the bootstrap.
        split: the real images of the protocol "encoder".
        protocols: "encoder", "adm", "tarflow", or a network: "efficientnet-lite2", the folder of an encoder.
        reference: in place of the protocol's own: a split, a .npz file of statistics or pictures, or a folder.
        save_samples: a .npz file that the samples are written to, in ADM's layout.

    Returns: columns run, strategy, data, space, encoder, split, train_seed, metric, value, unit, n, protocol, standard_error,
        low, high, interval (over samples), reference, reference_sha256, n_reference, network, network_sha256, features, labels,
        resize, bytes, dtype, batch, guidance, annealed, temperature, denoise, strength, seed, finish (what the last step was),
        decoding, device.

    Raises: LabError where no network is at hand, for numbers out of range, or samples that overflow (it says how many). Warns
        (LabWarning) of fewer samples than features.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.evaluate_samples(rl.load("digits-reverse"), 80, guidance=rl.Guidance(1.0, annealed=True))
        >>> table.metric.tolist()[:3]
        ['FD[digits]', 'sFD[digits]', 'KD[digits]']
    """
    sampling = samples
    if not isinstance(sampling, Sampling):
        sampling = Sampling(whole_number("samples", samples, 1), seed, guidance, denoise, strength)
    rows = sample_rows(run, sampling, choose(protocols, run), split, reference, save_samples, brief=True)
    table = _table(run, [{"split": split} | row for row in rows])
    return table.assign(annealed=sampling.rule.annealed, denoise=sampling.denoise)


@torch.no_grad()
def _reconstruction(run: Run, split: str, limit: int | None) -> dict[str, Any]:
    """PSNR of images that are encoded and decoded: what the space keeps of them."""
    images = run.images(split)
    x, _ = whole(images, min(RECONSTRUCTED, len(images)) if limit is None else limit)
    x = x.to(run.device)
    made = run.space.decode(run.space.encode(x)).clamp(-1, 1)
    words = f"mean over images, encoded and decoded without noise, {subset_words(len(x), len(images))}"
    value = float(psnr(x, made).mean())
    return {"metric": "reconstruction_psnr", "value": value, "unit": "dB", "n": len(x), "protocol": words}
