"""Runs on disk: which there are, and how one is loaded by name, directory or Hub id."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rrepa_lab.align.projector import Projectors, stored_dims
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.decode.plan import DecodePlan
from rrepa_lab.flow.finite import bad_tensors
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.paths import assets, runs_root
from rrepa_lab.readers import MIB, MissingFileError, check_file, read_json, validate
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.describe import summary
from rrepa_lab.runs.hub import fetch
from rrepa_lab.runs.names import BEST, CARD, CONFIG, ENCODER, FORMAT, PLAN, PUBLISHED
from rrepa_lab.runs.run import Run, modules

LARGEST_CONFIG = 16 * 2**20  # bytes of a config.json
CHECKPOINTS = ("best", "last")


class RunInfo(NamedTuple):
    """A line of `available()`.

    Example:
        >>> import rrepa_lab as rl
        >>> [info.strategy for info in rl.available() if info.name == "digits-detach"]
        ['detach']
    """

    name: str
    strategy: str
    data: str
    summary: str
    directory: Path


def available() -> list[RunInfo]:
    """Bundled runs, then the local ones below ./runs (or $RREPA_RUNS), by name.

    Example:
        >>> "digits-reverse" in [info.name for info in available()]
        True
    """
    found: dict[str, RunInfo] = {}
    for root in (assets() / "runs", runs_root()):
        for path in sorted(root.glob("*/config.json")):
            name = path.parent.name
            try:
                config, _ = read_config(path.parent)
            except LabError:
                continue  # a folder that is being written, or of another program
            found.setdefault(name, RunInfo(name, config.align.strategy, config.data.words, summary(config), path.parent))
    return list(found.values())


def pick_device(name: str) -> torch.device:
    """ "cpu", "cuda", "cuda:1", or "auto" for cuda where there is one; LabError for what this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise LabError(f"device {name} asked for, but this torch sees {torch.cuda.device_count()} GPUs; try --device cpu")
    return torch.device(name)


@torch.inference_mode(False)  # its weights may be needed in a graph later
def load(name: str | Path, device: str = "cpu", checkpoint: str = "best", revision: str | None = None) -> Run:
    """A fresh run by bundled or local name, run directory, or Hugging Face Hub id ("owner/name", "owner/name@revision").

    Args:
        checkpoint: "best" takes the weights that were best on the validation split where the run kept them
            (`train.keep`), else the last ones; "last" always takes the last ones.
        revision: of a run on the Hub: a branch, a tag or a commit; the newest by default.

    Raises: LabError when there is no such run, its files are truncated or do not belong together, or its weights hold NaN or
        infinite numbers.

    Example:
        >>> run = load("digits-reverse")
        >>> run.flow.config.blocks, run.config.align.taps
        (4, ['block.3.layer.2', 'block.4.layer.2'])
    """
    where = pick_device(device)
    if checkpoint not in CHECKPOINTS:
        raise unknown("checkpoint", checkpoint, CHECKPOINTS)
    directory = _find(name, revision)
    config, classes = read_config(directory)
    path = directory / (BEST if checkpoint == "best" and (directory / BEST).is_file() else "model.safetensors")
    shapes, step = _read_header(path)
    with torch.device("meta"):  # sizes that are not those of the weights take no memory
        _check_shapes(modules(*_unfilled(config, shapes)), shapes, path)
    flow, projectors = _unfilled(config, shapes)
    run = Run(flow, config, classes, projectors, step, directory, _read_plan(directory / PLAN), read_fingerprints(directory))
    _fill(modules(run.flow, run.projectors), _read_weights(path), path)
    run.flow.eval().requires_grad_(False)
    run.projectors.eval().requires_grad_(False)
    return run.to(where)


def _find(name: str | Path, revision: str | None = None) -> Path:
    text = str(name)
    for directory in (assets() / "runs" / text, Path(text), runs_root() / text):
        if (directory / CONFIG).is_file():
            if revision is not None:
                raise LabError(f"{directory} is on this machine: a revision ({revision}) is one of a run on the Hub")
            return directory
    if isinstance(name, Path) or Path(text).exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        if Path(text).exists():
            raise LabError(f"{text} is not a run directory: it has no config.json")
        raise unknown("run", text, [info.name for info in available()])
    repo_id, _, tag = text.partition("@")
    if tag and revision is not None and tag != revision:
        raise LabError(f"{text} names the revision {tag}, and revision is {revision}: give one of them")
    return _download(repo_id, tag or revision)


def _download(repo_id: str, revision: str | None) -> Path:
    """The folder of a run of the Hub in this machine's cache. Its configuration comes first: what is no run stays there."""
    try:
        directory = fetch(repo_id, [CONFIG], revision)
    except LabError as error:
        known = ", ".join(info.name for info in available())
        raise LabError(f"no run {repo_id!r} on this machine (there are {known}), and {error}") from error
    if not (directory / CONFIG).is_file():
        raise LabError(f"{repo_id} on the Hub is no rrepa_lab run: it has no {CONFIG}")
    try:
        read_config(directory)
    except LabError as error:
        raise LabError(f"{repo_id} on the Hub is no rrepa_lab run: {error}") from None
    return fetch(repo_id, [*PUBLISHED, f"{ENCODER}/*", CARD, "README.md"], directory.name)


def read_config(directory: Path) -> tuple[RunConfig, list[str]]:
    """Configuration and class names of a run directory; LabError for whatever else its config.json may be."""
    path = directory / "config.json"
    about = read_json(path, LARGEST_CONFIG)
    if not {"format", "classes", "config"} <= set(about):
        raise LabError(f"{path} is not the configuration of an rrepa_lab run")
    if about["format"] not in range(1, FORMAT + 1):
        raise LabError(f"{path} has format {str(about['format'])[:40]}; this version reads formats 1 to {FORMAT}")
    classes = about["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise LabError(f"{path}: classes must be a list of names")
    config = validate(RunConfig, about["config"], str(path), stored=True)
    if config.flow.classes < 0:
        raise LabError(f"{path}: flow.classes is {config.flow.classes}, and a trained flow has a number of classes")
    if config.flow.classes > 0 and len(classes) != config.flow.classes:
        raise LabError(f"{path} names {len(classes)} classes, and its flow has {config.flow.classes}")
    return config, classes


def read_fingerprints(directory: Path) -> dict[str, str]:
    """Split -> fingerprint of the images that a run was trained with, from its config.json; none of older runs."""
    stored = read_json(directory / "config.json", LARGEST_CONFIG).get("data")
    pairs = stored.items() if isinstance(stored, dict) else ()
    return {str(split): value for split, value in pairs if isinstance(value, str)}


def _read_plan(path: Path) -> DecodePlan | None:
    try:
        return validate(DecodePlan, read_json(path, MIB), str(path))
    except MissingFileError:
        return None
    except LabError as error:
        raise LabError(f"{error}; delete the file, or calibrate anew: rrepa-lab bench plan") from None


def _unfilled(config: RunConfig, shapes: dict[str, tuple[int, ...]]) -> tuple[TarFlow, Projectors]:
    """Flow and projectors of a configuration; how many numbers the projectors give is that of their tensors on file."""
    dims = stored_dims(shapes, config.align.projector)
    return TarFlow(config.flow), Projectors.of(config.align, config.flow, dims)


def _read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of the tensors of a safetensors file by name, and the step they were taken at; the tensors are not read."""
    try:
        check_file(path)
    except MissingFileError:
        raise LabError(f"{path} is missing: the run has no weights yet") from None
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return shapes, int((file.metadata() or {}).get("step", 0))
    except (SafetensorError, OSError, ValueError) as error:
        raise LabError(f"{path} is damaged or no safetensors file: {error}") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LabError(f"{path} is damaged or no safetensors file: {error}") from None


def _check_shapes(module: nn.Module, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """LabError unless the file holds every tensor of the module in its shape, and no other."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name, shape in expected.items():
        if name not in shapes:
            raise LabError(f"{path} has no {name}: it belongs to another configuration")
        if shapes[name] != shape:
            raise LabError(f"{path}: {name} is {shapes[name]} on file, but its config builds {shape}")
    extra = sorted(set(shapes) - set(expected))
    if extra:
        raise LabError(f"{path} holds {extra[0]}, which its config does not build")


def _fill(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    expected = module.state_dict()
    bad = bad_tensors(weights)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise LabError(f"{path}: {bad[0]}{more} holds NaN or infinite numbers: nothing can be computed with it, train it again")
    module.load_state_dict({name: value.to(expected[name].dtype) for name, value in weights.items()})
