"""The run directory of a training: whether it may be used, the lock on it, and the room for checkpoints."""

import shutil
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

from rrepa_lab.data.layout import first_names
from rrepa_lab.data.splits import class_names, load_split, splits
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.files import remove_leftovers
from rrepa_lab.runs.config import RunConfig, complete
from rrepa_lab.runs.store import load, read_fingerprints
from rrepa_lab.runs.store import read_config as _read_config
from rrepa_lab.training.state import NAME as STATE
from rrepa_lab.training.state import Checkpoint

LOCK = ".lock"


def take(out: Path, lock: FileLock) -> None:
    """Make the run directory, lock it for this training, and clear what a killed one left behind; LabError if it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        what = "is being trained by another process: wait for its end, or choose another --out"
        raise LabError(f"{out} {what}") from None
    except OSError as error:
        raise LabError(f"{out} cannot be written to: {error.strerror or error}") from None
    remove_leftovers(out)


def check_space(out: Path, need: int) -> None:
    """LabError if fewer than `need` bytes are free where `out` lies."""
    free = shutil.disk_usage(out).free
    if need > free:
        raise LabError(f"{out}: checkpoints need {need / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free there")


UNBOUND = ("data.cache", "data.cache_limit", "data.download", "train.parallel", "train.accumulate")


def resumes(config: RunConfig, classes: list[str], out: Path, resume: bool | str) -> bool:
    """Whether this call goes on with the run in `out`.

    A folder in which no step was taken (the training was killed before its first checkpoint was whole, or the disk was
    full) counts as empty.

    Raises: LabError for a folder of something else, a run that may not be overwritten, and other settings or classes.
    """
    if out.exists() and not out.is_dir():
        raise LabError(f"{out} is a file: choose another --out")
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.exists() else set()
    if not names:
        if resume is True and not (out / LOCK).exists():
            raise LabError(f"nothing to resume: {out} holds no run")
        return False
    if STATE not in names and not _is_run(out):
        raise LabError(f"{out} is not empty and holds no run: choose another --out")
    if _last_step(out) == 0:
        return False
    if not resume:
        raise LabError(f"{out} already holds a run: --resume goes on with it, or choose another --out")
    state = Checkpoint.load(out / STATE, lazily=True)
    old_config, old_classes = (
        (RunConfig.from_dict(state.config, stored=True), state.classes) if state.config else _read_config(out)
    )
    # version 0.1 stored relative paths and blocks as they were given
    old, new = complete(old_config, old_classes).flat(), config.flat()
    # the noise of a reading trains nothing, nor does how pictures are kept, and the state knows with whose weights it began
    for key in (key for key in [*old, *new] if key.split(".")[0] not in ("read", "init") and key not in UNBOUND):
        if old.get(key) != new.get(key):
            change = f"{key} was {old.get(key)}, now {new.get(key)}"
            raise LabError(f"{out} was trained with another configuration ({change}): resume {out / 'config.json'}")
    if old_classes != classes:
        now = f"the data now have {first_names(classes)}"
        raise LabError(f"{out} was trained with the classes {first_names(old_classes)}; {now}")
    return True


def divided(config: RunConfig, out: Path) -> RunConfig:
    """The configuration with the division of an image folder into splits: that of the run in `out`, or a new one.

    It is kept with the run: pictures that are added later join a split by their hash, and none moves to another.
    """
    bounds = list(config.data.bounds)
    if not bounds and _is_run(out):
        bounds = _read_config(out)[0].data.bounds
    if not bounds and hasattr(config.data.set, "bounds"):
        bounds = config.data.set.bounds(config.data, class_names(config.data))
    return config.model_copy(update={"data": config.data.model_copy(update={"bounds": bounds})})


def warn_of_other_images(config: RunConfig, out: Path) -> None:
    """Warn (LabWarning) where the run in `out` began with other images than those at hand."""
    if not _is_run(out):
        return
    classes, known = _read_config(out)[1], read_fingerprints(out)
    for split in splits(config.data):
        images = load_split(config.data, split, classes)
        if images.fingerprint != known.get(split, images.fingerprint):
            what = f"the {split} images at hand ({len(images)}) are not those that {out} began with"
            warnings.warn(f"{what}: the resumed training is that of no one set of images", LabWarning, stacklevel=2)


def _is_run(out: Path) -> bool:
    try:
        _read_config(out)
    except LabError:
        return False
    return True


def _last_step(out: Path) -> int | None:
    """Steps that the training in `out` took; None where that cannot be read."""
    try:
        if (out / STATE).exists():
            return Checkpoint.load(out / STATE, lazily=True).step
        return load(out).step if (out / "model.safetensors").exists() else 0
    except LabError:
        return None
