"""Encoders by what a user types: a named teacher, a bundled one, or the folder of a training."""

from pathlib import Path

from rrepa_lab.align.named import BUNDLED, NAMED
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.errors import LabError
from rrepa_lab.paths import assets
from rrepa_lab.runs.names import CONFIG, WEIGHTS
from rrepa_lab.training.selfsup import read_encoder


def encoder_by_name(name: str) -> EncoderConfig:
    """A named teacher, bundled:<name>, or the folder that a training of an encoder wrote.

    Raises: LabError if there is no encoder of this name.
    """
    if name in NAMED and not Path(name).exists():
        return EncoderConfig(model=name)
    folder = encoder_folder(name)
    weights = name if name.startswith(BUNDLED) else str((folder / WEIGHTS).absolute())
    return read_encoder(folder).encoder.override({"weights": weights})


def encoder_folder(name: str) -> Path:
    """The folder of an encoder, by bundled:<name> or its path; LabError where there is none."""
    folder = assets() / "encoders" / name.removeprefix(BUNDLED) if name.startswith(BUNDLED) else Path(name).expanduser()
    if not (folder / CONFIG).is_file():
        raise LabError(
            f"no encoder at {folder}: give bundled:digits, bundled:cifar10 or a folder written by rrepa-lab encoder train"
        )
    return folder
