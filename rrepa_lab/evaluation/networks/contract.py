"""The protocol of a feature network, and the rule by which floats become bytes."""

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rrepa_lab.errors import LabError

ByteRule = Literal["rounded", "truncated", "none"]
SPATIAL_CHANNELS = 7  # of an early layer's map that sFID takes, as ADM's evaluator does (arXiv 2105.05233, its code)


class Features(NamedTuple):
    """What a network finds in pictures; on its device, float32."""

    pooled: Tensor  # (B, d): FID and its kind, kernel distance, precision and recall
    spatial: Tensor | None = None  # (B, s): sFID, some channels of an early map, rows, columns, then channels
    logits: Tensor | None = None  # (B, K): scores of the network's own classes, without bias for Inception


class FeatureNetwork(Protocol):
    """Pictures in, features out.

    Attributes:
        name: in the names of metrics, FD[<name>].
        words: weights, on what they were trained.
        sha256: the first 16 hex digits of the SHA-256 of the weights (of weights and preprocessing for the kit's encoders).
        dim, spatial_dim: d and s; s is 0 for a network without an early map.
        resize: how pictures come to the size of its input, in words.
        bytes: whether floats become bytes first, and by which rule.
        labels: whether its classes are those of the data.
    """

    name: str
    words: str
    sha256: str
    dim: int
    spatial_dim: int
    resize: str
    bytes: ByteRule
    labels: bool

    def __call__(self, pictures: Tensor) -> Features:
        """Features of pictures (B, C, H, W), bytes, or floats in [-1, 1]; each depends on its own picture alone."""
        ...

    def to(self, device: Any) -> "FeatureNetwork":
        """Move it; returns itself."""
        ...


def to_bytes(x: Tensor, rule: ByteRule) -> Tensor:
    """Floats in [-1, 1] as bytes 0..255: (x + 1) * 127.5, clipped, then rounded or truncated; bytes as they are.

    "none" leaves floats as they are, and makes floats of bytes.

    Raises: LabError for NaN or infinite pixels.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 0.5, 2.0])
        >>> to_bytes(x, "rounded").tolist(), to_bytes(x, "truncated").tolist()
        ([0, 128, 191, 255], [0, 127, 191, 255])
    """
    if x.dtype == torch.uint8:
        return to_floats(x) if rule == "none" else x
    bad = len(x) - int(x.isfinite().flatten(1).all(dim=1).sum()) if x.ndim > 1 else int((~x.isfinite()).sum())
    if bad:
        raise LabError(f"{bad} of {len(x)} pictures hold pixels that are not finite")
    if rule == "none":
        return x
    scaled = ((x + 1) * 127.5).clamp(0, 255)
    return (scaled.round() if rule == "rounded" else scaled).to(torch.uint8)


def to_floats(x: Tensor) -> Tensor:
    """Bytes 0..255 as floats in [-1, 1]; floats as they are."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def spatial_part(maps: Tensor, channels: int = SPATIAL_CHANNELS) -> Tensor:
    """The first channels of maps (B, C, h, w) as (B, h * w * channels), channels last: the order of ADM's reference files."""
    return maps[:, :channels].permute(0, 2, 3, 1).flatten(1)
