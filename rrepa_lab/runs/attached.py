"""Weights that a run needs beside its own, where they are files of this machine: those of its space and of its teacher.

A run directory holds a copy of a space that the kit has trained, in `space/`. On the Hub it holds a teacher that the kit has
trained as well, in `encoder/`, of several each in `encoder/<number>/`. A run finds them there where the paths of its settings
lead nowhere. Weights of others are not copied: they have licences of their own.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

from rrepa_lab.align.named import BUNDLED, PACKAGE
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.readers import MIB, read_json
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.names import CARD, CONFIG, ENCODER, SPACE, WEIGHTS
from rrepa_lab.space.autoencoder import TRAINED_HERE, is_autoencoder, is_bundled, read_autoencoder


def local_weights(encoder: EncoderConfig) -> Path | None:
    """The file that `encoder.weights` names; None for weights that have a name."""
    named = encoder.weights == "pretrained" or encoder.weights.startswith(("random", BUNDLED, PACKAGE))
    return None if named else Path(encoder.weights).expanduser()


def encoders_of(configs: Sequence[EncoderConfig], directory: Path | None) -> list[EncoderConfig]:
    """The settings of a run's teachers; where a file is gone, with the copy in the run's directory."""
    return [_with_copy(config, directory, folder) for config, folder in zip(configs, _folders(len(configs)), strict=True)]


def _folders(count: int) -> list[str]:
    """The folders of the copies of so many teachers."""
    return [ENCODER] if count == 1 else [f"{ENCODER}/{number}" for number in range(count)]


def _with_copy(config: EncoderConfig, directory: Path | None, folder: str) -> EncoderConfig:
    path = local_weights(config)
    if path is None or directory is None or path.exists() or not (copy := directory / folder / WEIGHTS).is_file():
        return config
    return config.model_copy(update={"weights": str(copy)})


def attached(config: RunConfig, directory: Path) -> dict[str, Path]:
    """The files of teachers that go to the Hub with a run, name there -> file here; those of a space are in the directory.

    Warns (LabWarning) of a teacher whose weights are a file of somebody else: measurements of the alignment need it.

    Raises: LabError for a space without which the run cannot be used elsewhere, and that is not copied.
    """
    _check_space(config, directory)
    if not config.align.taps:
        return {}
    encoders = encoders_of(config.teachers, directory)
    each = [_encoder_files(encoder, folder) for encoder, folder in zip(encoders, _folders(len(encoders)), strict=True)]
    return {name: path for files in each for name, path in files.items()}


def _check_space(config: RunConfig, directory: Path) -> None:
    space, folder = config.space, directory / SPACE
    if space.kind not in TRAINED_HERE:
        if space.weights is not None and Path(space.weights).expanduser().exists():
            advice = "push it as a repository of its own, and set space.weights to its OWNER/NAME in the run's config.json"
            raise LabError(f"the run needs its space, and {space.weights} is a folder of this machine: {advice}")
        return
    if is_bundled(space):
        return
    if not is_autoencoder(folder):
        raise LabError(f"{directory} holds no copy of its space: load the run and save it again, with space.weights at hand")
    encoder = read_autoencoder(folder, space.kind).config.encoder
    if encoder is not None and (path := local_weights(encoder)) is not None:
        advice = "train the space with one that has a name (package:efficientnet-lite0, or a model of timm)"
        raise LabError(f"the space of the run needs the encoder {path}, a file of this machine: {advice}")


def _encoder_files(encoder: EncoderConfig, folder: str) -> dict[str, Path]:
    path = local_weights(encoder)
    if path is None:
        return {}
    if not path.is_file() or not _trained_here(path):
        what = f"the teacher's weights {path} stay on this machine: they are not of `rrepa-lab encoder train`"
        note = f"{what}; the run works without them, measurements of its alignment need encoder.weights set"
        warnings.warn(note, LabWarning, stacklevel=5)
        return {}
    return {f"{folder}/{name}": path.parent / name for name in (CONFIG, WEIGHTS, CARD) if (path.parent / name).is_file()}


def _trained_here(path: Path) -> bool:
    """Whether a weights file is one of a folder that `rrepa-lab encoder train` wrote."""
    try:
        about = read_json(path.parent / CONFIG, MIB)
    except LabError:
        return False
    return path.name == WEIGHTS and {"data", "encoder", "steps", "views"} <= about.keys()
