"""The Inception network of FID, sFID and IS: torch-fidelity's conversion of the TensorFlow graph of 2015-12-05.

Its resize is TensorFlow 1's bilinear one, to 299 pixels, without antialiasing, on bytes. The weights are a file of this
machine; nothing is downloaded.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rrepa_lab.align.weights import read_tensors
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.networks.contract import ByteRule, Features, spatial_part, to_bytes
from rrepa_lab.files import sha256
from rrepa_lab.paths import cache_root

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
VARIABLE = "RREPA_INCEPTION"  # names a file of weights
PUBLISHED = "6726825d"  # how the SHA-256 of the published file begins
SPATIAL_LAYER = "Mixed_6d.branch1x1"  # "mixed_6/conv" of the TensorFlow graph: 192 channels of 17x17


class Inception:
    """FID's network: 2,048 pooled features, 2,023 of an early map (17 x 17 x 7), 1,008 class scores without bias.

    Args:
        weights: the file; by default $RREPA_INCEPTION, then the kit's cache, then torch's.

    Raises: LabError without torch-fidelity or the file, with where it is to be had and where it goes, and for a file of other
        tensors.
    """

    name = "inception"
    dim, spatial_dim = 2048, 17 * 17 * 7
    resize = "TF1 bilinear to 299, no antialiasing"
    bytes: ByteRule = "truncated"
    labels = False

    def __init__(self, weights: Path | str | None = None) -> None:
        path = find_weights(weights)
        self.sha256 = sha256(path)[:16]
        published = self.sha256.startswith(PUBLISHED)
        self.words = f"InceptionV3 2015-12-05, {'as published' if published else f'other weights, {path.name}'}"
        self.model = _model(path)
        self._early: Tensor | None = None
        self.model.get_submodule(SPATIAL_LAYER).register_forward_hook(self._keep)

    def _keep(self, _: Any, __: Any, output: Tensor) -> None:
        self._early = output

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        """Features of pictures (B, 3 or 1, H, W)."""
        x = to_bytes(pictures, "truncated")
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        pooled, logits = self.model(x)
        assert self._early is not None
        early, self._early = spatial_part(self._early).float(), None
        return Features(pooled, early, logits)

    def to(self, device: Any) -> "Inception":
        """Move it; returns itself."""
        self.model.to(device)
        return self


def places() -> list[Path]:
    """Where the weights are looked for, in this order."""
    named = os.environ.get(VARIABLE)
    return [
        *([Path(named).expanduser()] if named else []),
        cache_root() / FILE,
        Path(torch.hub.get_dir()) / "checkpoints" / FILE,
    ]


def find_weights(path: Path | str | None = None) -> Path:
    """The file of weights; LabError that says what to download and where it goes."""
    tried = [Path(path).expanduser()] if path else places()
    for place in tried:
        if place.is_file():
            return place
    where = f"there is none at {tried[0]}" if path or VARIABLE in os.environ else f"download {URL} to {cache_root() / FILE}"
    raise LabError(
        f"FID, sFID and IS need the weights of Inception: {where} (91 MiB), or name the file: ${VARIABLE}=FILE; without them "
        "--protocol encoder compares features of an encoder at hand"
    )


def _model(path: Path) -> Any:
    if importlib.util.find_spec("torch_fidelity") is None:
        raise LabError('FID, sFID and IS need torch-fidelity: pip install "rrepa-lab[metrics]"')
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        read_tensors(path)  # as tensors alone: torch-fidelity would execute what a pickle holds
        return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    except LabError as error:
        raise LabError(f"{path}: {error}") from None
    except (RuntimeError, TypeError, KeyError) as error:  # tensors of another network
        reason = str(error).strip().splitlines()[0]
        raise LabError(f"{path} does not hold the weights of Inception ({reason}): download {URL}") from None
