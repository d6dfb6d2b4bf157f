"""The bundled evaluator of digits as a feature network: a small supervised network that is not the teacher."""

from typing import Any

import torch
from torch import Tensor

from rrepa_lab.data.config import DataConfig
from rrepa_lab.evaluation.evaluator import load_evaluator
from rrepa_lab.evaluation.networks.contract import ByteRule, Features, spatial_part, to_bytes
from rrepa_lab.evaluation.networks.encoder import grey
from rrepa_lab.files import sha256
from rrepa_lab.paths import assets


class BundledEvaluator:
    """64 features before the class scores, scaled to mean squared length 1; 4 channels of the 4 x 4 map of a convolution.

    It reads floats: digits have 17 levels.
    """

    resize = "none"
    bytes: ByteRule = "none"
    labels = True

    def __init__(self, data: DataConfig) -> None:
        self.name, self.model = data.name, load_evaluator(data)
        self.channels = data.channels
        path = assets() / "evaluators" / data.name / "model.safetensors"
        self.sha256, self.words = sha256(path)[:16], f"bundled evaluator of {data.name}, trained with labels"
        with torch.no_grad():
            example = self(torch.zeros(1, data.channels, data.image_size, data.image_size))
        assert example.spatial is not None
        self.dim, self.spatial_dim = example.pooled.shape[1], example.spatial.shape[1]

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        """Features of pictures (B, C, H, W)."""
        x = to_bytes(pictures, self.bytes).float()
        if x.shape[1] == 3 and self.channels == 1:
            x = grey(x)
        return Features(self.model.features(x), spatial_part(self.model.early(x), 4), self.model(x))

    def to(self, device: Any) -> "BundledEvaluator":
        """Move it; returns itself."""
        self.model.to(device)
        return self
