"""Training a small vision encoder without labels, so that alignment on digits never sees one.

Two views of each image, drawn by small rotations, shifts, scalings, shears and noise, are pulled together against
all other images of the batch (NT-Xent of SimCLR, arXiv 2002.05709); the feature of an image is the mean over its patches.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.align.encoder import Encoder
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.checks import LARGEST_SEED
from rrepa_lab.config import Config
from rrepa_lab.data.augment import Views, random_view
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.decoded import prepare
from rrepa_lab.data.images import Batch, ImageSet
from rrepa_lab.data.loaders import SeededBatches, generator, seeded, stream
from rrepa_lab.data.splits import read_split
from rrepa_lab.data.subset import limited, subset_words
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_atomically, write_text
from rrepa_lab.runs.presets import DIGITS_VIT
from rrepa_lab.training.fit import FitReport, FitSettings, minimize

KNN_IMAGES = 5000  # of each split, at most, whose neighbours are looked for
BATCH = 256  # images that are encoded at once


class EncoderTrainConfig(Config):
    """How the encoder is trained; the defaults give the bundled one."""

    data: DataConfig = DataConfig()
    encoder: EncoderConfig = DIGITS_VIT
    steps: int = Field(1200, ge=1)
    batch: int = Field(256, ge=2)
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    temperature: float = Field(0.2, gt=0, description="of the contrastive softmax")
    views: Views = Views()
    seed: int = Field(0, ge=0, le=LARGEST_SEED)


def encoder_of_folder(path: str | Path, image_size: int = 32) -> EncoderTrainConfig:
    """Settings for the pictures of an image folder, in colour: a small vision Transformer with 8x8 patches an image.

    Raises: LabError for an image size that 8 does not divide.
    """
    if image_size % 8 or image_size < 8:
        raise LabError(f"an encoder of 8x8 patches takes an image size that 8 divides, not {image_size}")
    return EncoderTrainConfig().override(
        {
            "data.name": "folder", "data.path": str(Path(path).expanduser().absolute()),
            "data.image_size": image_size, "data.channels": 3,
            "encoder.image_size": image_size, "encoder.channels": 3, "encoder.args.patch_size": image_size // 8,
        }
    )  # fmt: skip


def train_encoder(config: EncoderTrainConfig, out: Path | str) -> Iterator[FitReport]:
    """Train, yielding every step; at the end `out` holds model.safetensors (bfloat16) and config.json."""
    images = prepare(read_split(config.data, "train"))
    start = {"weights": f"random:{config.seed}"} if config.encoder.weights == "random" else {}
    encoder = Encoder(config.encoder.override(start))
    with seeded(config.seed):
        head = nn.Sequential(nn.Linear(encoder.dim, 256), nn.ReLU(), nn.Linear(256, 64))
    model = encoder.model.requires_grad_(True)
    batches = SeededBatches(len(images), config.batch, config.seed, 0, config.steps)

    def loss_of(step: int, batch: Batch) -> Tensor:
        draw = generator(config.seed, 2, step)
        views = torch.cat([random_view(batch.x, config.views, draw) for _ in range(2)])
        return nt_xent(head(encoder.map(views).mean(dim=(2, 3))), config.temperature)

    settings = FitSettings(config.steps, config.lr, config.weight_decay, warmup=config.steps // 20)
    yield from minimize([*model.parameters(), *head.parameters()], stream(images, batches), loss_of, settings)
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    write_atomically(Path(out) / "model.safetensors", lambda path: save_file(weights, path))
    write_text(Path(out) / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def nt_xent(features: Tensor, temperature: float) -> Tensor:
    """Contrastive loss of (2B, d) features, rows i and i + B being views of one image; nats, averaged over rows."""
    features = F.normalize(features, dim=1)
    count = len(features)
    logits = (features @ features.T / temperature).fill_diagonal_(-torch.inf)
    partner = (torch.arange(count) + count // 2) % count
    return F.cross_entropy(logits, partner)


def knn_table(encoder: Encoder, data: DataConfig, neighbours: int = 5, limit: int = KNN_IMAGES) -> pd.DataFrame:
    """k-NN accuracy on the test split (neighbours from the training split, cosine) of the encoder's mean patch
    features, of raw pixels, and of the same encoder untrained (seed 0): one row each.

    Args:
        limit: images of either split, at most; class-balanced, seed 0.

    Returns: columns features, knn_accuracy, k, n_train, n_test, images (which of the splits, in words).

    Raises: LabError for pictures without labels.
    """
    untrained = Encoder(encoder.config.override({"weights": "random:0"}))
    splits = {split: read_split(data, split) for split in ("train", "test")}
    train, test = (limited(images, limit) for images in splits.values())
    if not train.classes:
        raise LabError("k-NN accuracy needs classes: these pictures have no class folders")
    words = [f"{split} {subset_words(min(limit, len(images)), len(images))}" for split, images in splits.items()]
    rows = []
    for name, read in {
        "encoder": lambda x: encoder(x).mean(dim=1),
        "raw pixels": lambda x: x.flatten(1),
        "untrained encoder": lambda x: untrained(x).mean(dim=1),
    }.items():
        known, asked = _features(train, read), _features(test, read)
        accuracy = _knn_accuracy(known, asked, train.labels, test.labels, neighbours)
        rows.append(
            {
                "features": name, "knn_accuracy": accuracy, "k": neighbours, "n_train": len(train), "n_test": len(test),
                "images": "; ".join(words),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _features(images: ImageSet, read: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, d), on the CPU, of batches of images: a whole split of pictures need not fit into memory."""
    starts = range(0, len(images), BATCH)
    with torch.no_grad():
        return torch.cat(
            [read(images.__getitems__(range(start, min(start + BATCH, len(images)))).x).cpu().float() for start in starts]
        )


def _knn_accuracy(train: Tensor, test: Tensor, known: Tensor, right: Tensor, neighbours: int) -> float:
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(neighbours, metric="cosine").fit(train.numpy(), known.numpy())
    return float(classifier.score(test.numpy(), right.numpy()))


def write_encoder_card(folder: Path, config: EncoderTrainConfig, loss: float, scores: pd.DataFrame) -> None:
    """Write card.md beside an encoder's weights; scores are the table of `knn_table`."""
    text = f"""# An encoder of {config.data.name}, trained without labels

{config.encoder.model} of timm with {config.encoder.args}, weights in bfloat16.

SimCLR on the training split: {config.steps} steps of {config.batch} images, seed {config.seed}; last loss {loss:.3f} nats.

k-NN accuracy on the test split, neighbours from the training split, cosine, features averaged over patches:

{scores.drop(columns="images").to_markdown(index=False, floatfmt=".4f")}

Images: {scores["images"].iloc[0]}.

All settings: config.json.
"""
    write_text(folder / "card.md", text)
