"""Training a small vision encoder without labels, so that alignment on digits never sees one.

Two views of each image, drawn by small rotations, shifts, scalings, shears and noise, are pulled together against
all other images of the batch (NT-Xent of SimCLR, arXiv 2002.05709); the feature of an image is the mean over its patches.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.align.encoder import Encoder, EncoderConfig
from rrepa_lab.config import Config
from rrepa_lab.data.datasets import DataConfig, load_split, whole
from rrepa_lab.data.loaders import SeededBatches, generator, seeded, stream
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_atomically, write_text
from rrepa_lab.training.schedule import learning_rate

DIGITS_VIT = EncoderConfig(
    model="vit_tiny_patch16_224",
    weights="random",
    image_size=8,
    channels=1,
    args={"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4, "class_token": False, "global_pool": "avg"},
)


class EncoderTrainConfig(Config):
    """How the encoder is trained; the defaults give the bundled one."""

    data: DataConfig = DataConfig()
    encoder: EncoderConfig = DIGITS_VIT
    steps: int = Field(1200, ge=1)
    batch: int = Field(256, ge=2)
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    temperature: float = Field(0.2, gt=0, description="of the contrastive softmax")
    degrees: float = Field(15.0, ge=0, description="largest rotation of a view")
    shift: float = Field(1.0, ge=0, description="largest shift of a view, pixels")
    scale: float = Field(0.15, ge=0, description="largest relative change of size of a view")
    shear: float = Field(0.2, ge=0, description="largest shear of a view")
    noise_std: float = Field(0.1, ge=0)
    seed: int = 0


class EncoderReport(NamedTuple):
    """One step of encoder training."""

    step: int
    steps: int
    loss: float  # nats


def train_encoder(config: EncoderTrainConfig, out: Path | str) -> Iterator[EncoderReport]:
    """Train, yielding every step; at the end `out` holds model.safetensors (bfloat16) and config.json."""
    images = load_split(config.data, "train")
    with seeded(config.seed):
        encoder = Encoder(config.encoder)
        head = nn.Sequential(nn.Linear(encoder.dim, 256), nn.ReLU(), nn.Linear(256, 64))
    model = encoder.model.requires_grad_(True)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    batches = SeededBatches(len(images), config.batch, config.seed, 0, config.steps)
    for step, batch in enumerate(stream(images, batches)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.lr, warmup=config.steps // 20)
        draw = generator(config.seed, 2, step)
        views = torch.cat([view(batch.x, config, draw) for _ in range(2)])
        loss = nt_xent(head(encoder.map(views).mean(dim=(2, 3))), config.temperature)
        if not math.isfinite(loss.item()):
            raise LabError(f"encoder loss is {loss.item()} at step {step + 1}: lower lr")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield EncoderReport(step + 1, config.steps, loss.item())
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    write_atomically(Path(out) / "model.safetensors", lambda path: save_file(weights, path))
    write_text(Path(out) / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def view(x: Tensor, config: EncoderTrainConfig, draw: torch.Generator) -> Tensor:
    """One random view of each image (B, C, H, W): an affine change of its own, and noise; outside is background (-1)."""

    def within(limit: float) -> Tensor:
        return (torch.rand(len(x), generator=draw) * 2 - 1) * limit

    angle, shear = within(math.radians(config.degrees)), within(config.shear)
    size_x, size_y = 1 + within(config.scale), 1 + within(config.scale)
    # affine_grid measures in half images, so a pixel is 2 / W
    shift_x, shift_y = within(config.shift * 2 / x.shape[3]), within(config.shift * 2 / x.shape[2])
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos * size_x, shear - sin, shift_x, sin, cos * size_y, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1
    return moved + config.noise_std * torch.randn(x.shape, generator=draw)


def nt_xent(features: Tensor, temperature: float) -> Tensor:
    """Contrastive loss of (2B, d) features, rows i and i + B being views of one image; nats, averaged over rows."""
    features = F.normalize(features, dim=1)
    count = len(features)
    logits = (features @ features.T / temperature).fill_diagonal_(-torch.inf)
    partner = (torch.arange(count) + count // 2) % count
    return F.cross_entropy(logits, partner)


def knn_table(encoder: Encoder, data: DataConfig, neighbours: int = 5) -> pd.DataFrame:
    """k-NN accuracy on the test split (neighbours from the training split, cosine) of the encoder's mean patch
    features, of raw pixels, and of the same encoder untrained (seed 0): one row each.
    """
    from sklearn.neighbors import KNeighborsClassifier

    with seeded(0):
        untrained = Encoder(encoder.config.override({"weights": "random"}))
    train, test = (whole(load_split(data, split)) for split in ("train", "test"))
    rows = []
    for name, read in {
        "encoder": lambda x: encoder(x).mean(dim=1),
        "raw pixels": lambda x: x.flatten(1),
        "untrained encoder": lambda x: untrained(x).mean(dim=1),
    }.items():
        classifier = KNeighborsClassifier(neighbours, metric="cosine").fit(read(train.x).numpy(), train.y.numpy())
        accuracy = float(classifier.score(read(test.x).numpy(), test.y.numpy()))
        rows.append(
            {"features": name, "knn_accuracy": accuracy, "k": neighbours, "n_train": len(train.y), "n_test": len(test.y)}
        )
    return pd.DataFrame(rows)
