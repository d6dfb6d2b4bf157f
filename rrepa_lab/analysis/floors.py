"""The cosine of each aligned layer with the teacher beside its floors, see `align.floors`."""

from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.align.floors import TargetMeans
from rrepa_lab.align.target import Targets
from rrepa_lab.analysis.features import FeatureProtocol, Images, image_set, teacher_set
from rrepa_lab.analysis.noise import NoiseSamples
from rrepa_lab.data.images import Batch, ImageSet
from rrepa_lab.data.loaders import stream
from rrepa_lab.errors import LabError
from rrepa_lab.flow.taps import Taps
from rrepa_lab.measurements.columns import about, place
from rrepa_lab.runs.run import Run


def teacher_means(run: Run, targets: Targets, images: ImageSet, batch: int = 256) -> TargetMeans:
    """The sums over an image set, clean, on the grid of the run's tokens."""
    means = TargetMeans(run.flow.config.classes, targets.dims)
    chunks = [part.tolist() for part in torch.arange(len(images)).split(batch)]
    for x, y in stream(images, chunks, 0):
        means.add(targets(x.to(run.device)), y)
    return means


@torch.no_grad()
def teacher_floors(
    run: Run,
    images: Images | None = None,
    *,
    taps: Taps | None = None,
    noise_std: float | None = None,
    train: ImageSet | Batch | None = None,
    seed: int = 0,
    batch: int = 256,
) -> pd.DataFrame:
    """The cosine of each aligned layer with the teacher beside what is reached without reading the image.

    Rows of each tap, all in cosines averaged over patches and images:

    | metric                    | the target is compared with                                                      |
    |---------------------------|----------------------------------------------------------------------------------|
    | floor_position            | the best constant for its position                                               |
    | floor_label_position      | the best constant for its position and the image's class                         |
    | cosine                    | the projected feature of the layer, of the image with its label    |
    | cosine_without_label      | the same without the label                                                       |
    | above_floor               | cosine - floor_label_position (without classes: cosine - floor_position)         |
    | above_floor_without_label | cosine_without_label - floor_position                                            |

    The constants come from the training split. If that is the split that is scored, each image is left out of its own.

    Args:
        images: which are scored; their limit bounds the training images too.
        taps: layers that have a projector; by default all aligned ones.
        noise_std: sigma of Gaussian noise on the flow's images; the teacher's are clean. By default that of
            the training (0 for a flow trained with uniform noise).
        train: images instead of the run's training split.
        seed: of the noise.

    Returns: columns run, strategy, data, space, encoder, train_seed, tap, block, layer, module_path, metric, value, unit,
        split, n, n_train, noise_std, seed, device. For a flow without classes: floor_position, cosine and above_floor.

    Raises: LabError for a run without an encoder, or a tap without a projector.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.teacher_floors(rl.load("digits-reverse"), rl.Images(limit=50), taps="block.3.layer.2")
        >>> table.query("metric == 'cosine'").value.item() > table.query("metric == 'floor_position'").value.item()
        True
    """
    scored_images = Images() if images is None else images
    aligner, config = run.aligner(), run.flow.config
    wanted = run.flow.resolve(run.projectors.taps if taps is None else taps)
    missing = [tap.name for tap in wanted if tap.name not in run.projectors.taps]
    if missing or not wanted:
        has = ", ".join(run.projectors.taps) or "none"
        raise LabError(f"run {run.name!r} has no projector for {missing[0] if missing else 'any layer'} (it has: {has})")
    std = (config.noise_std if config.noise == "gaussian" else 0.0) if noise_std is None else noise_std
    fitting = image_set(run, Images("train", train, scored_images.limit))
    scored = image_set(run, scored_images)
    assert aligner.targets is not None
    means = teacher_means(run, aligner.targets, teacher_set(run, Images("train", train), fitting), batch)
    own = scored_images.split == "train" and train is None and scored_images.data is None
    how = FeatureProtocol(noise=NoiseSamples(std=std), seed=seed, batch=batch)
    shown = teacher_set(run, scored_images, scored)
    found = _cosines(run, [tap.name for tap in wanted], how, (scored, shown), means, own)
    rows: list[dict[str, Any]] = []
    for tap in wanted:
        mean = {metric: float(torch.cat(parts).double().mean()) for (name, metric), parts in found.items() if name == tap.name}
        mean["above_floor"] = mean["cosine"] - mean["floor_label_position" if config.classes else "floor_position"]
        if config.classes:
            mean["above_floor_without_label"] = mean["cosine_without_label"] - mean["floor_position"]
        at = about(run) | place(tap)
        rows += [at | {"metric": metric, "value": mean[metric], "unit": "cosine"} for metric in _METRICS if metric in mean]
    split = scored_images.split if scored_images.data is None else "given images"
    n: dict[str, Any] = {"split": split, "n": len(scored), "n_train": len(fitting)}
    return pd.DataFrame(rows).assign(**n, noise_std=std, seed=seed, device=str(run.device))


def _cosines(
    run: Run, names: list[str], how: FeatureProtocol, images: tuple[ImageSet, ImageSet], means: TargetMeans, own: bool
) -> dict[tuple[str, str], list[Tensor]]:
    """(tap, metric) -> cosines (B,) of each batch, with the label and without it.

    Args:
        images: as the flow sees them, and as the teacher does.
        means: sums of the training targets; own: whether the images are among them.
    """
    aligner, classes = run.aligner(), run.flow.config.classes
    found: dict[tuple[str, str], list[Tensor]] = {}
    for fed in (True, False) if classes else (False,):
        for part in replace(how, feed_label=fed).real(run, names, images[0], originals=images[1]):
            target = aligner.target(part.for_teacher.to(run.device))
            floor = means.floor(target, part.y, own)
            for name in names:
                near = aligner.similarity(name, part.states[name], target).cpu()
                known = {"cosine" if fed or not classes else "cosine_without_label": near}
                known |= {"floor_label_position": floor.label_position} if fed else {"floor_position": floor.position}
                for metric, value in known.items():
                    found.setdefault((name, metric), []).append(value)
    return found


_METRICS = (
    "floor_position", "floor_label_position", "cosine", "cosine_without_label", "above_floor", "above_floor_without_label",
)  # fmt: skip
