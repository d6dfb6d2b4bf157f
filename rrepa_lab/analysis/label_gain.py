"""What a label is worth as its weight grows, exactly and to first order."""

import pandas as pd
import torch
from torch import Tensor

from rrepa_lab.analysis.label_scores import LabelMask, gradient_scores
from rrepa_lab.analysis.noise import NoiseSamples
from rrepa_lab.checks import whole_number
from rrepa_lab.errors import LabError
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.runs.run import Run


@torch.no_grad()
def label_gain(
    run: Run | FlowModel,
    x: Tensor,
    classes: Tensor,
    points: int = 11,
    *,
    noise: int | NoiseSamples | None = None,
    batch: int = 256,
) -> pd.DataFrame:
    """What a label is worth as its weight grows: log p(x | (1 - w) uniform + w class) - log p(x), in nats, and to first order.

    The first order is the tangent at w = 0, w times K times the gradient score: which the one-step rule uses. At w = 1
    the exact gains differ from one class to another as Bayes' log posteriors do. Both start from 0.

    Args:
        x: images (B, C, H, W) in [-1, 1].
        classes: ids (B, M) of M classes for each image.
        points: weights from 0 to 1.
        noise: as in `classify`; log p is averaged over the samples.

    Returns: columns image (row), class (id), weight, kind ("exact" or "first order"), value, n_noise_samples, noise_std:
        B * M * points * 2 rows.

    Raises: LabError for a flow without classes, no images, ids out of range, or less than two points.
    """
    masked = LabelMask(run, x, None, noise, batch)
    count, points = masked.flow.config.classes, whole_number("points", points)
    classes = torch.as_tensor(classes).to(masked.x.device)
    if points < 2 or classes.ndim != 2 or not bool(((classes >= 0) & (classes < count)).all()) or len(classes) != len(x):
        raise LabError(f"label_gain wants classes (B, M) in 0..{count - 1} for {len(x)} images, and at least two points")
    w = torch.linspace(0, 1, points, dtype=masked.x.dtype, device=masked.x.device)
    corner = torch.eye(count, dtype=masked.x.dtype, device=masked.x.device)[classes]  # (B, M, K)
    weights = (1 - w)[:, None] / count + w[:, None] * corner[:, :, None]  # (B, M, S, K)
    exact, slopes = [], []
    for view in masked.views():
        images = view.repeat_interleave(classes.shape[1] * points, dim=0)
        pairs = zip(images.split(masked.batch), weights.flatten(0, 2).split(masked.batch), strict=True)
        exact.append(torch.cat([masked.log_prob(image, weight) for image, weight in pairs]).view(*classes.shape, points))
        slopes.append(count * gradient_scores(masked, view).gather(1, classes))
    mean, slope = torch.stack(exact).mean(dim=0), torch.stack(slopes).mean(dim=0)
    masked.check(mean.flatten(1))
    kinds = {"exact": mean - mean[..., :1], "first order": slope[..., None] * w}
    columns = {
        "image": torch.arange(len(x)).repeat_interleave(classes.shape[1] * points),
        "class": classes.flatten().repeat_interleave(points),
        "weight": w.repeat(classes.numel()),
    }
    rows = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    parts = [rows.assign(kind=kind, value=gain.flatten().cpu().numpy()) for kind, gain in kinds.items()]
    return pd.concat(parts, ignore_index=True).assign(**masked.noise.columns)
