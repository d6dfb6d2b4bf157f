"""The evaluator of samples on digits: a small supervised network that is not the teacher; how it is trained and loaded."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.checks import LARGEST_SEED
from rrepa_lab.config import Config
from rrepa_lab.data.augment import Views, random_view
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.images import Batch
from rrepa_lab.data.loaders import SeededBatches, generator, seeded, stream
from rrepa_lab.data.splits import read_split
from rrepa_lab.data.subset import whole
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_atomically, write_text
from rrepa_lab.paths import assets
from rrepa_lab.readers import read_json
from rrepa_lab.training.fit import FitReport, FitSettings, minimize

FEATURES = 64
SCALED = 5000  # class-balanced images whose mean length is set to 1, at most
PART = 512  # images in one pass


class EvaluatorConfig(Config):
    """How the evaluator is trained; the defaults give the bundled one."""

    data: DataConfig = DataConfig()
    steps: int = Field(800, ge=1)
    batch: int = Field(128, ge=1)
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    views: Views = Views(degrees=8, shift=0.5, scale=0.08, shear=0.1, noise_std=0.05)
    seed: int = Field(0, ge=0, le=LARGEST_SEED)


class Evaluator(nn.Module):
    """Two convolutions and two linear layers; features are the 64 numbers before the class scores, times `scale`."""

    scale: Tensor

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(64 * ((size + 1) // 2) ** 2, FEATURES), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> class scores (B, K)."""
        return self.head(self.body(x))

    def early(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> the map of the second convolution (B, 64, H / 2, W / 2)."""
        return self.body[:4](x)

    def features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> (B, 64), of mean squared length 1 on the training split (5,000 of a larger one)."""
        return self.body(x) * self.scale


def train_evaluator(config: EvaluatorConfig, out: Path | str) -> Iterator[FitReport]:
    """Train on the training split with labels, mildly augmented; at the end `out` holds model.safetensors and config.json."""
    images = read_split(config.data, "train")
    with seeded(config.seed):
        model = Evaluator(config.data.channels, config.data.image_size, len(images.classes))
    batches = SeededBatches(len(images), config.batch, config.seed, 0, config.steps)

    def loss_of(step: int, batch: Batch) -> Tensor:
        return F.cross_entropy(model(random_view(batch.x, config.views, generator(config.seed, 2, step))), batch.y)

    settings = FitSettings(config.steps, config.lr, config.weight_decay, warmup=20)
    yield from minimize(model.parameters(), stream(images, batches), loss_of, settings)
    with torch.no_grad():
        model.scale = model.features(whole(images, min(len(images), SCALED)).x).square().sum(dim=1).mean().rsqrt()
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    write_atomically(Path(out) / "model.safetensors", lambda path: save_file(weights, path))
    about = {"classes": len(images.classes), "config": config.to_dict()}
    write_text(Path(out) / "config.json", json.dumps(about, indent=2) + "\n")


def load_evaluator(data: DataConfig) -> Evaluator:
    """The bundled evaluator for a data set; LabError where there is none."""
    folder = assets() / "evaluators" / data.name
    if not folder.is_dir():
        raise LabError(f"no evaluator is bundled for {data.name!r}: Fréchet distances can be measured on digits only")
    about = read_json(folder / "config.json")
    model = Evaluator(data.channels, data.image_size, about["classes"])
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model.eval().requires_grad_(False)


def find_evaluator(data: DataConfig) -> Evaluator | None:
    """The evaluator of these data, where one is bundled."""
    try:
        return load_evaluator(data)
    except LabError:
        return None


def accuracy(model: Evaluator, data: DataConfig, split: str = "test") -> float:
    """Accuracy of the evaluator on a split."""
    images = read_split(data, split)
    parts = [range(start, min(start + PART, len(images))) for start in range(0, len(images), PART)]
    with torch.no_grad():
        right = [(model(x).argmax(dim=1) == y).float() for x, y in map(images.__getitems__, parts)]
    return float(torch.cat(right).mean())
