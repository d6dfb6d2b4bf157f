"""An encoder of the kit as a feature network: any teacher, named, of timm, or trained here."""

from typing import Any

from torch import Tensor

from rrepa_lab.align.encoder import Encoder, make_teacher
from rrepa_lab.align.facts import teacher_words
from rrepa_lab.align.teacher import EncoderConfig, Teacher
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.networks.contract import SPATIAL_CHANNELS, ByteRule, Features, spatial_part, to_bytes, to_floats


class EncoderNetwork:
    """Pooled features: the mean over patches of the encoder's layer. Spatial ones: 7 channels of the grid of a middle layer.

    Args:
        name: in the names of metrics.
        config: of the encoder; its `image_size` is the size of the input.
        download: whether weights that are not on this machine may be fetched.
    """

    bytes: ByteRule = "rounded"
    labels = False

    def __init__(self, name: str, config: EncoderConfig, download: bool = True) -> None:
        self.name, self.teacher = name, make_teacher(config, download)
        self.config: EncoderConfig = self.teacher.config
        self.early = _early(self.teacher, download)
        self.words = teacher_words(self.config)
        size = self.config.image_size
        how = getattr(self.teacher, "interpolation", "")
        self.resize = f"{how}, antialiased, to {size}" if how else f"the encoder's own, to {size}"
        self.sha256 = str(getattr(self.teacher, "fingerprint", ""))
        self.dim = self.teacher.dim
        self.spatial_dim = 0
        if self.early is not None:
            rows, columns = self.early.grid
            self.spatial_dim = rows * columns * min(SPATIAL_CHANNELS, self.early.dim)

    def __call__(self, pictures: Tensor) -> Features:
        """Features of pictures (B, C, H, W)."""
        x = to_floats(to_bytes(pictures, self.bytes))
        if x.shape[1] == 3 and self.config.channels == 1:
            x = grey(x)
        pooled = self.teacher(x).mean(dim=1)
        if self.early is None:
            return Features(pooled)
        rows, columns = self.early.grid
        return Features(pooled, spatial_part(self.early(x).transpose(1, 2).unflatten(2, (rows, columns))))

    def to(self, device: Any) -> "EncoderNetwork":
        """Move it; returns itself."""
        self.teacher.to(device)
        if self.early is not None:
            self.early.to(device)
        return self


def _early(teacher: Teacher, download: bool) -> Teacher | None:
    """The same encoder read at the layer in the middle of its depth; None for a teacher that is not of timm."""
    if not isinstance(teacher, Encoder):
        return None
    depth = teacher.depth
    return make_teacher(teacher.config.override({"layer": (depth + 1) // 2}), download) if depth > 1 else None


def grey(x: Tensor) -> Tensor:
    """Colour pictures of grey (B, 3, H, W) as (B, 1, H, W); LabError where the channels differ."""
    if not bool((x == x[:, :1]).all()):
        raise LabError("these pictures have colours, and the network reads grey ones")
    return x[:, :1]
