"""Which images a run classifies as their label, found by all processes together."""

from torch import Tensor, arange

from rrepa_lab.analysis.classify import classify
from rrepa_lab.analysis.noise import NoiseSamples, image_noise
from rrepa_lab.processes import shared
from rrepa_lab.runs.run import Run


def correct(run: Run, x: Tensor, y: Tensor, method: str = "gradient", seed: int = 0) -> Tensor:
    """Whether each image is classified as its label (B,), bool.

    Args:
        x: (B, C, H, W), as `rl.classify` takes them.
        y: (B,) labels.
        method: of `rl.classify`.
        seed: of the noise that the run's `config.read` asks for.
    """

    def of_rows(rows: Tensor) -> Tensor:
        return classify(run, x[rows], method, noise=NoiseSamples(seed=seed)).label == y[rows]

    # the noise on an image depends on its place among those that are classified together
    return shared(of_rows, len(x)) if image_noise(run).n == 0 else of_rows(arange(len(x)))
