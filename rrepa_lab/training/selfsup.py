"""Training a small vision encoder without labels, so that alignment never sees one.

Two views of each image are pulled together against all other images of the batch (NT-Xent of SimCLR, arXiv 2002.05709); the
feature of an image is the mean over its patches. Views of digits are small rotations, shifts, scalings, shears and noise, those
of photographs random crops, mirror images and colours.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.align.encoder import Encoder
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.checks import LARGEST_SEED
from rrepa_lab.config import Config
from rrepa_lab.data.augment import PHOTO_VIEWS, Views, random_view
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.decoded import prepare
from rrepa_lab.data.images import Batch, ImageSet
from rrepa_lab.data.loaders import SeededBatches, generator, seeded, stream
from rrepa_lab.data.splits import class_names, read_split
from rrepa_lab.data.subset import limited, subset_words
from rrepa_lab.errors import LabError
from rrepa_lab.files import check_writable, write_atomically, write_text
from rrepa_lab.readers import read_json, validate
from rrepa_lab.runs.names import CARD, CONFIG, WEIGHTS
from rrepa_lab.runs.presets import DIGITS_VIT
from rrepa_lab.training.fit import FitReport, FitSettings, minimize

STRIDE = 4  # pixels of a patch, of the encoder for photographs
# the stem and the first two stages of a ResNet; timm builds four, of which the last two are as small as can be and not used
PHOTO_CNN = EncoderConfig(
    model="resnet10t", weights="random", image_size=32, layer=2,
    args={"channels": [64, 128, 8, 8], "stem_width": 16, "stem_type": "deep"},
)  # fmt: skip
PHOTO_TRAINING: Mapping[str, Any] = {"steps": 2000, "batch": 128, "weight_decay": 1e-4, "decoupled": True, "loss_layer": 3}
OFF = {"crop": 1.0, "jitter": 1.0}  # values of views at which a change is left out; 0 of the others
KNN_IMAGES = 5000  # of each split, at most, whose neighbours are looked for
BATCH = 256  # images that are encoded at once


class EncoderTrainConfig(Config):
    """How the encoder is trained; the defaults give the bundled one, and `encoder_recipe` those for other data sets."""

    data: DataConfig = DataConfig()
    encoder: EncoderConfig = DIGITS_VIT
    steps: int = Field(1200, ge=1, description="batches, each of which gives one update of the weights")
    batch: int = Field(256, ge=2, description="images of a step, of each of which two views are drawn")
    lr: float = Field(2e-3, gt=0, description="peak; linear warm-up over a twentieth of the steps, then a cosine to 0")
    weight_decay: float = Field(0.05, ge=0)
    temperature: float = Field(0.2, gt=0, description="of the contrastive softmax")
    decoupled: bool = Field(False, description="leave the positive pair out of the denominator of the loss (arXiv 2110.06848)")
    loss_layer: int | None = Field(None, description="layer of the model whose features the loss takes; null: encoder.layer")
    views: Views = Views()
    seed: int = Field(0, ge=0, le=LARGEST_SEED)

    @model_validator(mode="after")
    def _colour(self) -> Self:
        if self.views.colours and self.data.channels != 3:
            raise ValueError(
                f"views.saturation, hue and grey change colours, and data.channels is {self.data.channels}: set them to 0, "
                "or data.channels=3"
            )
        if self.encoder.channels == 1 and self.data.channels == 3:
            raise ValueError("encoder.channels is 1, and data.channels is 3: set encoder.channels=3")
        return self


class EncoderFile(EncoderTrainConfig):
    """config.json of an encoder's folder: the recipe, and what came of it (None in files of version 0.1)."""

    fingerprint: str | None = Field(None, description="of the training images")
    images: int | None = Field(None, description="training images")
    loss: float | None = Field(None, description="of the last step, nats")
    scores: list[dict[str, Any]] = Field([], description="the table of `knn_table`; empty for images without classes")

    @property
    def recipe(self) -> EncoderTrainConfig:
        """The settings alone."""
        return EncoderTrainConfig.from_dict({name: self.to_dict()[name] for name in EncoderTrainConfig.model_fields})


def encoder_recipe(data: DataConfig) -> EncoderTrainConfig:
    """The settings for a data set: a small vision Transformer for digits and other grey images, a small CNN for colour ones.

    The CNN sees images of 32 pixels at most, to which larger ones are resized, and has 8x8 patches of these: all sizes take
    about the same time (encoder.image_size gives finer grids). The recipe for colour was chosen on a part of CIFAR-10's
    training images that was set aside.

    Raises: LabError for an image size that does not fit.

    Example:
        >>> encoder_recipe(DataConfig(name="cifar10", image_size=32, channels=3)).encoder.model
        'resnet10t'
    """
    size = data.image_size
    if data.name == "digits":
        return EncoderTrainConfig(data=data)
    if data.channels == 1:
        if size % 8:
            raise LabError(f"an encoder of 8x8 patches takes an image size that 8 divides, not {size}")
        vit = DIGITS_VIT.override({"image_size": size, "args.patch_size": size // 8})
        return EncoderTrainConfig(data=data, encoder=vit)
    if size < 32 and (size % STRIDE or size < 4 * STRIDE):
        raise LabError(
            f"an encoder of {STRIDE}-pixel patches takes an image size that {STRIDE} divides, 16 or more, not {size}"
        )
    encoder = PHOTO_CNN.override({"image_size": min(size, PHOTO_CNN.image_size)})
    return EncoderTrainConfig(data=data, encoder=encoder, views=PHOTO_VIEWS, **PHOTO_TRAINING)


def check_folder(out: Path | str) -> None:
    """LabError where an encoder cannot be written to a folder: it holds one already, or cannot be made or written."""
    if (Path(out) / WEIGHTS).exists():
        raise LabError(f"{out} already holds an encoder: choose another --out")
    check_writable(Path(out) / WEIGHTS)


def train_encoder(config: EncoderTrainConfig, out: Path | str) -> Iterator[FitReport]:
    """Train, yielding every step; at the end `out` holds model.safetensors (bfloat16) and config.json (`EncoderFile`).

    Views depend on the seed and the step alone. A model with batch normalization is trained on the statistics of both views
    of a batch together.

    Raises: LabError for a folder that cannot be written or holds an encoder, images that are not at hand, and an encoder
        that cannot be made.
    """
    check_folder(out)
    images = prepare(read_split(config.data, "train"))
    start: dict[str, Any] = {"weights": f"random:{config.seed}"} if config.encoder.weights == "random" else {}
    if config.loss_layer is not None:
        start["layer"] = config.loss_layer
    encoder = Encoder(config.encoder.override(start))
    with seeded(config.seed):
        head = nn.Sequential(nn.Linear(encoder.dim, 256), nn.ReLU(), nn.Linear(256, 64))
    model = encoder.model.requires_grad_(True).train()
    if any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
        model.to(memory_format=torch.channels_last)  # convolutions of a CPU are faster with it
    batches = SeededBatches(len(images), config.batch, config.seed, 0, config.steps)

    def loss_of(step: int, batch: Batch) -> Tensor:
        draw = generator(config.seed, 2, step)
        views = torch.cat([random_view(batch.x, config.views, draw) for _ in range(2)])
        return nt_xent(head(encoder.map(views).mean(dim=(2, 3))), config.temperature, config.decoupled)

    settings = FitSettings(config.steps, config.lr, config.weight_decay, warmup=config.steps // 20)
    report = None
    for report in minimize([*model.parameters(), *head.parameters()], stream(images, batches), loss_of, settings):
        yield report
    assert report is not None
    weights = {name: _stored(value) for name, value in model.eval().state_dict().items()}
    write_atomically(Path(out) / WEIGHTS, lambda path: save_file(weights, path))
    found = {"fingerprint": images.fingerprint, "images": len(images), "loss": report.loss}
    _write(Path(out), EncoderFile.from_dict(config.to_dict() | found))


def _stored(value: Tensor) -> Tensor:
    """Weights in bfloat16; counters as they are."""
    return (value.to(torch.bfloat16) if value.is_floating_point() else value).contiguous()


def _write(folder: Path, about: EncoderFile) -> None:
    write_text(folder / CONFIG, json.dumps(about.to_dict(), indent=2) + "\n")


def nt_xent(features: Tensor, temperature: float, decoupled: bool = False) -> Tensor:
    """Contrastive loss of (2B, d) features, rows i and i + B being views of one image; nats, averaged over rows.

    Args:
        decoupled: the sum over all other rows leaves the partner of a row out, which suits small batches (decoupled
            contrastive learning, arXiv 2110.06848).
    """
    features = F.normalize(features, dim=1)
    count = len(features)
    logits = (features @ features.T / temperature).fill_diagonal_(-torch.inf)
    rows = torch.arange(count)
    partner = (rows + count // 2) % count
    if not decoupled:
        return F.cross_entropy(logits, partner)
    others = logits.clone()
    others[rows, partner] = -torch.inf
    return (others.logsumexp(dim=1) - logits[rows, partner]).mean()


def knn_table(
    encoder: Encoder, data: DataConfig, neighbours: int = 5, limit: int = KNN_IMAGES, layers: Sequence[int] = ()
) -> pd.DataFrame:
    """k-NN accuracy on the test split (neighbours from the training split, cosine) of the encoder's mean patch
    features, of raw pixels, and of the same encoder untrained (seed 0): one row each.

    Args:
        limit: images of either split, at most; class-balanced, seed 0.
        layers: other layers of the encoder, a row for each: "encoder, layer 3".

    Returns: columns features, knn_accuracy, k, n_train, n_test, images (which of the splits, in words).

    Raises: LabError for pictures without labels.
    """
    untrained = Encoder(encoder.config.override({"weights": "random:0"}))
    splits = {split: read_split(data, split) for split in ("train", "test")}
    train, test = (limited(images, limit) for images in splits.values())
    if not train.classes:
        raise LabError("k-NN accuracy needs classes: these pictures have no class folders")
    words = [f"{split} {subset_words(min(limit, len(images)), len(images))}" for split, images in splits.items()]
    read_by: dict[str, Callable[[Tensor], Tensor]] = {
        "encoder": _pooled(encoder), "raw pixels": lambda x: x.flatten(1), "untrained encoder": _pooled(untrained)
    }  # fmt: skip
    for layer in layers:
        read_by[f"encoder, layer {layer}"] = _pooled(Encoder(encoder.config.override({"layer": layer})))
    rows = []
    for name, read in read_by.items():
        known, asked = _features(train, read), _features(test, read)
        accuracy = _knn_accuracy(known, asked, train.labels, test.labels, neighbours)
        rows.append(
            {
                "features": name, "knn_accuracy": accuracy, "k": neighbours, "n_train": len(train), "n_test": len(test),
                "images": "; ".join(words),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _pooled(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """Images (B, C, H, W) -> mean patch features (B, E)."""
    return lambda x: encoder(x).mean(dim=1)


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


def encoder_scores(folder: Path, config: EncoderTrainConfig) -> pd.DataFrame:
    """The table of `knn_table` of the weights in a folder, with a row for the layer of the loss where it is another one."""
    encoder = Encoder(config.encoder.override({"weights": str(folder / WEIGHTS)}))
    other = config.loss_layer
    layers = [] if other is None or other == config.encoder.layer else [other]
    return knn_table(encoder, config.data, layers=layers)


def score_encoder(folder: Path) -> EncoderFile:
    """Measure the k-NN accuracy of a trained encoder, and write it to config.json and to card.md beside the weights.

    Images without classes have none: the card says so.
    """
    about = read_encoder(folder)
    scores = encoder_scores(folder, about).to_dict("records") if class_names(about.data) else []
    about = EncoderFile.from_dict(about.to_dict() | {"scores": scores})
    _write(folder, about)
    write_text(folder / CARD, _card(about))
    return about


def read_encoder(folder: Path) -> EncoderFile:
    """What config.json of an encoder's folder says; LabError where it is missing or damaged."""
    return validate(EncoderFile, read_json(folder / CONFIG), str(folder / CONFIG), stored=True)


def _card(about: EncoderFile) -> str:
    data, encoder, views = about.data, about.encoder, about.views
    picture = f"{data.channels}x{data.image_size}x{data.image_size}"
    layer = "" if encoder.layer == -1 else f", features of layer {encoder.layer}"
    changes = ", ".join(f"{name} {value:g}" for name, value in views.to_dict().items() if value != OFF.get(name, 0))
    loss = "SimCLR, decoupled (arXiv 2110.06848)" if about.decoupled else "SimCLR"
    scores = "No k-NN accuracy: the images have no classes."
    if about.scores:
        table = pd.DataFrame(about.scores).drop(columns="images").to_markdown(index=False, floatfmt=".4f")
        scores = f"""k-NN accuracy on the test split, neighbours from the training split, cosine, features averaged over
patches:

{table}

Images: {about.scores[0]["images"]}."""
    return f"""# An encoder of {data.name}, trained without labels

{encoder.model} of timm with {encoder.args}{layer}, weights in bfloat16.

Trained on the {about.images} images of the training split of {data.name}, {picture}, fingerprint {about.fingerprint}.

{loss}: {about.steps} steps of {about.batch} images, lr {about.lr:g}, weight decay {about.weight_decay:g}, temperature
{about.temperature:g}, seed {about.seed}; last loss {about.loss:.3f} nats. Views: {changes or "the image itself"}.

{scores}

All settings: config.json.
"""
