"""The noise that images are read under: none, or the mean over samples of the training noise or of another sigma.

| flow trained under | no samples | samples |
|---|---|---|
| Gaussian noise | the images as they are | images + sigma * eps |
| uniform noise | the centres of the bins: the mean of the dequantized values | (integer + u) / levels * 2 - 1 |

All methods average over the same samples. The noise on an image depends on the seed, the sample and its row alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rrepa_lab.checks import real_number, seed_number, whole_number
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.pixels import add_noise, dequantize
from rrepa_lab.errors import LabError
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.runs.config import ReadConfig
from rrepa_lab.runs.run import Run, flow_of

CLEAN = "clean images"  # the words for images as they are


@dataclass(frozen=True)
class NoiseSamples:
    """Which noise images are read under; what is None is the run's own choice, `config.read`.

    Args:
        n: noise samples that an answer is averaged over; 0 reads the images as they are.
        std: sigma of Gaussian noise; the training noise where the run says nothing else.
        seed: of the noise, 0..2^63 - 1.

    Raises: LabError for a number out of range.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> rl.classify(run, run.data("test", 2).x, noise=rl.NoiseSamples(4, std=0.1)).n_noise_samples
        4
    """

    n: int | None = None
    std: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n is not None:
            whole_number("noise samples", self.n)
        if self.std is not None:
            real_number("noise_std", self.std)
        seed_number(self.seed)

    @classmethod
    def of(cls, value: "int | NoiseSamples | None", seed: int = 0) -> "NoiseSamples":
        """All settings, or a number of samples alone, or None for the run's own choice; with this seed where they have none."""
        return value if isinstance(value, NoiseSamples) else cls(value, seed=seed)


class ImageNoise(NamedTuple):
    """The noise on images, with nothing left open."""

    n: int  # samples, 0 for none
    std: float  # sigma of Gaussian noise, 0 where there is none; nan for uniform noise
    levels: int | None = None  # of a run that was trained under uniform noise
    seed: int = 0

    def add(self, x: Tensor, *key: int) -> Tensor:
        """x under one noise sample, from a random stream of its own for each key."""
        if self.std == self.std:
            return add_noise(x, self.std, generator(self.seed, *key))
        assert self.levels is not None
        return dequantize(x, self.levels, generator(self.seed, *key))

    def views(self, x: Tensor) -> Iterator[Tensor]:
        """x (B, *shape), what the space makes of images, as it is or under one sample after the other."""
        if not self.n:
            yield x
        for number in range(self.n):
            yield self.add(x, number)

    def views_of_rows(self, x: Tensor, rows: Sequence[int]) -> Iterator[Tensor]:
        """As `views`, for images at these rows of a set: the noise depends on seed, row and sample alone."""
        if not self.n:
            yield x
        for number in range(self.n):
            key = (number,) if number else ()
            yield torch.cat([self.add(image[None], row, *key) for image, row in zip(x, rows, strict=True)])

    @property
    def words(self) -> str:
        """For a protocol."""
        if not self.n:
            return CLEAN if self.levels is None else f"centres of the {self.levels} bins"
        count = f"{self.n} draw{'s' if self.n > 1 else ''} of"
        return f"{count} gaussian noise, sigma {self.std:g}" if self.std == self.std else f"{count} uniform noise"

    @property
    def columns(self) -> dict[str, Any]:
        """Protocol columns n_noise_samples and noise_std of a table."""
        return {"n_noise_samples": self.n, "noise_std": self.std}


def image_noise(run: Run | FlowModel, noise: int | NoiseSamples | None = None) -> ImageNoise:
    """The noise on the images of a run: what is given, and the run's own `config.read` for what is not; none for a bare flow.

    Another sigma alone is one sample of it at least; a sigma of 0 is no noise.

    Raises: LabError for numbers out of range, or samples for a bare flow of uniform noise, whose levels are not known.

    Example:
        >>> import rrepa_lab as rl
        >>> image_noise(rl.load("digits-reverse"), 4).words
        '4 draws of gaussian noise, sigma 0.2'
    """
    given, config = NoiseSamples.of(noise), flow_of(run).config
    own = run.config.read if isinstance(run, Run) else ReadConfig()
    levels = run.config.data.levels if isinstance(run, Run) and config.noise == "uniform" else None
    n = max(own.n_noise_samples, int(given.std is not None)) if given.n is None else given.n
    std = own.noise_std if given.std is None else given.std
    if std == 0 or n == 0:
        return ImageNoise(0, 0.0, levels, given.seed)
    if std is None and config.noise == "uniform":
        if levels is None:
            raise LabError("this flow was trained with uniform noise: say noise_std to average over draws, or give its run")
        return ImageNoise(n, float("nan"), levels, given.seed)
    std = config.noise_std if std is None else std
    return ImageNoise(n if std else 0, std, levels, given.seed)
