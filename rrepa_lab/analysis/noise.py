"""The noise under which a flow reads images: none, or the mean over draws of the training noise or of another sigma.

| flow trained under | no draws | draws |
|---|---|---|
| Gaussian noise | the images as they are | images + sigma * eps |
| uniform noise | the centres of the bins: the mean of the dequantized values | (integer + u) / levels * 2 - 1 |

All methods average over the same draws. The noise on an image depends on the seed, the draw and its row alone.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.data.loaders import generator
from rrepa_lab.data.pixels import add_noise, bin_centres, dequantize
from rrepa_lab.errors import LabError
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.runs.config import ReadConfig
from rrepa_lab.runs.run import Run
from rrepa_lab.sampling.denoise import levels_of


class ReadNoise(NamedTuple):
    """The noise of a reading, with nothing left open."""

    draws: int  # 0 for none
    std: float  # sigma of Gaussian noise, 0 where there is none; nan for draws of uniform noise
    levels: int | None = None  # of a run that was trained under uniform noise

    def clean(self, x: Tensor) -> Tensor:
        """What the flow is given of images (B, C, H, W) in [-1, 1] without a draw."""
        return x if self.levels is None else bin_centres(x, self.levels)

    def draw(self, x: Tensor, *key: int) -> Tensor:
        """Images under one draw, from a random stream of its own for each key."""
        if self.std == self.std:
            return add_noise(self.clean(x), self.std, generator(*key))
        assert self.levels is not None
        return dequantize(x, self.levels, generator(*key))

    def views(self, x: Tensor, seed: int = 0) -> Iterator[Tensor]:
        """The images without noise, or under one draw after the other."""
        if not self.draws:
            yield self.clean(x)
        for number in range(self.draws):
            yield self.draw(x, seed, number)

    @property
    def words(self) -> str:
        """For a protocol."""
        if not self.draws:
            return "clean images" if self.levels is None else f"centres of the {self.levels} bins"
        count = f"{self.draws} draw{'s' if self.draws > 1 else ''} of"
        return f"{count} gaussian noise, sigma {self.std:g}" if self.std == self.std else f"{count} uniform noise"

    @property
    def columns(self) -> dict[str, Any]:
        """Protocol columns draws and noise_std of a table."""
        return {"draws": self.draws, "noise_std": self.std}


def read_noise(run: Run | TarFlow, draws: int | None = None, noise_std: float | None = None) -> ReadNoise:
    """The noise of a reading: what is given, and the run's own `config.read` for what is not; clean images for a bare flow.

    Args:
        draws: None is the run's own number, or one if another `noise_std` > 0 is given and the run has none.
        noise_std: sigma; None is the run's own, by default that of the training. 0 is no noise.

    Raises: LabError for numbers out of range, or draws for a bare flow of uniform noise, whose levels are not known.
    """
    flow, own = (run.flow, run.config.read) if isinstance(run, Run) else (run, ReadConfig())
    levels = levels_of(run) if flow.config.noise == "uniform" else None
    if noise_std is not None:
        noise_std = real_number("noise_std", noise_std)
    if draws is None:  # another sigma alone is one draw of it at least
        draws = max(own.draws, int(noise_std is not None))
    draws = whole_number("draws", draws)
    std = own.noise_std if noise_std is None else noise_std
    if std == 0 or draws == 0:
        return ReadNoise(0, 0.0, levels)
    if std is None and flow.config.noise == "uniform":
        if levels is None:
            raise LabError("this flow was trained with uniform noise: say noise_std to average over draws, or give its run")
        return ReadNoise(draws, float("nan"), levels)
    std = flow.config.noise_std if std is None else std
    return ReadNoise(draws if std else 0, std, levels)
