"""The cosine of each aligned layer with the teacher beside its floors, see `align.floors`."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.align.encoder import Encoder
from rrepa_lab.align.floors import TargetMeans
from rrepa_lab.align.projector import similarity as cosine
from rrepa_lab.align.target import match_grid
from rrepa_lab.analysis.features import Reading, image_set
from rrepa_lab.data.images import Batch, ImageSet
from rrepa_lab.data.loaders import stream
from rrepa_lab.errors import LabError
from rrepa_lab.flow.taps import Taps
from rrepa_lab.measurements.columns import about, place
from rrepa_lab.runs.run import Run


def teacher_means(run: Run, encoder: Encoder, images: ImageSet, batch: int = 256) -> TargetMeans:
    """The sums over an image set, clean, on the grid of the run's tokens."""
    means = TargetMeans(run.flow.config.classes)
    for target, y in _targets(run, encoder, images, batch):
        means.add(target, y)
    return means


def _targets(run: Run, encoder: Encoder, images: ImageSet, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    chunks = [part.tolist() for part in torch.arange(len(images)).split(batch)]
    for x, y in stream(images, chunks, 0):
        yield match_grid(encoder(x.to(run.device)), encoder.grid, run.flow.config.side), y


@torch.no_grad()
def teacher_floors(
    run: Run,
    split: str = "test",
    limit: int | None = None,
    *,
    taps: Taps | None = None,
    noise_std: float | None = None,
    train: ImageSet | Batch | None = None,
    data: ImageSet | Batch | None = None,
    seed: int = 0,
    batch: int = 256,
) -> pd.DataFrame:
    """The cosine of each aligned layer with the teacher beside what is reached without reading the image.

    Rows of each tap, all in cosines averaged over patches and images:

    | metric                    | the target is compared with                                                      |
    |---------------------------|----------------------------------------------------------------------------------|
    | floor_position            | the best constant for its position                                               |
    | floor_label_position      | the best constant for its position and the image's class                         |
    | cosine                    | the projected feature of the layer, the flow reading the image with its label    |
    | cosine_without_label      | the same without the label                                                       |
    | above_floor               | cosine - floor_label_position (without classes: cosine - floor_position)         |
    | above_floor_without_label | cosine_without_label - floor_position                                            |

    The constants come from the training split. If that is the split that is scored, each image is left out of its own.

    Args:
        split, limit, data: which images are scored; `limit` bounds the training images too.
        taps: layers that have a projector; by default all aligned ones.
        noise_std: sigma of Gaussian noise on the images the flow reads; the teacher reads them clean. By default that of
            the training (0 for a flow trained with uniform noise).
        train: images instead of the run's training split.
        seed: of the noise.

    Returns: columns run, strategy, train_seed, tap, block, layer, module_path, metric, value, unit, split, n, n_train,
        noise_std, seed, device. For a flow without classes: floor_position, cosine and above_floor.

    Raises: LabError for a run without an encoder, or a tap without a projector.
    """
    encoder = run.encoder()
    wanted = run.flow.resolve(run.projectors.taps if taps is None else taps)
    missing = [tap.name for tap in wanted if tap.name not in run.projectors.taps]
    if missing or not wanted:
        has = ", ".join(run.projectors.taps) or "none"
        raise LabError(f"run {run.name!r} has no projector for {missing[0] if missing else 'any layer'} (it has: {has})")
    config = run.flow.config
    std = (config.noise_std if config.noise == "gaussian" else 0.0) if noise_std is None else noise_std
    fitting, scored = image_set(run, "train", train, limit), image_set(run, split, data, limit)
    means = teacher_means(run, encoder, fitting, batch)
    own = split == "train" and train is None and data is None
    names = [tap.name for tap in wanted]
    found: dict[tuple[str, str], list[Tensor]] = {}
    for fed in (True, False) if config.classes else (False,):
        how = Reading(noise_std=std, feed_label=fed, seed=seed, batch=batch)
        for part in how.real(run, names, scored):
            target = match_grid(encoder(part.x.to(run.device)), encoder.grid, config.side)
            floor = means.floor(target, part.y, own)
            for name in names:
                near = cosine(run.projectors.project(name, part.states[name]), target).cpu()
                known = {"cosine" if fed or not config.classes else "cosine_without_label": near}
                known |= {"floor_label_position": floor.label_position} if fed else {"floor_position": floor.position}
                for metric, value in known.items():
                    found.setdefault((name, metric), []).append(value)
    rows: list[dict[str, Any]] = []
    for tap in wanted:
        mean = {metric: float(torch.cat(parts).double().mean()) for (name, metric), parts in found.items() if name == tap.name}
        mean["above_floor"] = mean["cosine"] - mean["floor_label_position" if config.classes else "floor_position"]
        if config.classes:
            mean["above_floor_without_label"] = mean["cosine_without_label"] - mean["floor_position"]
        at = about(run) | place(tap)
        rows += [at | {"metric": metric, "value": mean[metric], "unit": "cosine"} for metric in _METRICS if metric in mean]
    n: dict[str, Any] = {"split": split if data is None else "given images", "n": len(scored), "n_train": len(fitting)}
    return pd.DataFrame(rows).assign(**n, noise_std=std, seed=seed, device=str(run.device))


_METRICS = (
    "floor_position", "floor_label_position", "cosine", "cosine_without_label", "above_floor", "above_floor_without_label",
)  # fmt: skip
