"""A run: its configuration, its weights on disk, and how to get it back.

A run directory holds config.json (everything needed to build it), model.safetensors (averaged weights and projectors after
the last step), best.safetensors (the same at the step that was best on the validation split, if `train.keep` names a metric),
metrics.jsonl, card.md, scores.csv once it was evaluated, decoding.json once it was calibrated, and train_state.pt while it
can be resumed.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rrepa_lab.align.encoder import Encoder, EncoderConfig
from rrepa_lab.align.projector import Projectors
from rrepa_lab.align.strategies import AlignConfig
from rrepa_lab.analysis.read_config import ReadConfig
from rrepa_lab.config import Config
from rrepa_lab.data.datasets import Batch, DataConfig, ImageSet, class_names, load_split, whole
from rrepa_lab.data.loaders import seeded
from rrepa_lab.errors import LabError, LabWarning, unknown
from rrepa_lab.files import write_atomically, write_text
from rrepa_lab.flow.decoding import DecodePlan
from rrepa_lab.flow.finite import bad_tensors
from rrepa_lab.flow.taps import Tap
from rrepa_lab.flow.tarflow import FlowConfig, TarFlow
from rrepa_lab.places import assets, runs_root
from rrepa_lab.readers import MIB, MissingFileError, check_file, read_json, validate
from rrepa_lab.training.settings import TrainConfig

FORMAT = 1
LARGEST_CONFIG = 16 * 2**20  # bytes of a config.json
CHECKPOINTS = ("best", "last")
BEST = "best.safetensors"  # the weights that were best on the validation split, where `train.keep` asks for them
PLAN = "decoding.json"  # how it is decoded fastest, see `sampling.calibrate`


class RunConfig(Config):
    """Everything that defines a run."""

    name: str = Field("unnamed", pattern=r"^[A-Za-z0-9][\w.-]*$", description="how the run is called")
    data: DataConfig = DataConfig()
    flow: FlowConfig = FlowConfig()
    align: AlignConfig = AlignConfig()
    encoder: EncoderConfig | None = Field(None, description="the frozen teacher; needed by every strategy but none")
    train: TrainConfig = TrainConfig()
    read: ReadConfig = ReadConfig()
    origin: str = Field("", description="where the weights come from, if they were not trained here; `train` then says nothing")

    @property
    def fingerprint(self) -> str:
        """The name with a hash of all settings, "digits-reverse-1a2b3c4d": a folder for this configuration alone."""
        return f"{self.name}-{hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:8]}"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key in ("image_size", "channels"):
            if getattr(self.data, key) != getattr(self.flow, key):
                raise ValueError(f"flow.{key} is {getattr(self.flow, key)} but data.{key} is {getattr(self.data, key)}")
        align, flow = self.align, self.flow
        if align.strategy != "none":
            if not align.blocks:
                raise ValueError(f"align.strategy is {align.strategy!r} but align.blocks is empty")
            if self.encoder is None:
                raise ValueError(f"align.strategy is {align.strategy!r} but there is no encoder")
        for what, given, most in (("blocks", align.blocks, flow.blocks), ("layers", align.layers, flow.layers)):
            if align.strategy != "none" and not all(number < 0 or 1 <= number <= most for number in given):
                raise ValueError(f"align.{what} {given} must lie in 1..{most}")
        return self


def complete(config: RunConfig, classes: Sequence[str] | None = None) -> RunConfig:
    """The configuration with everything that depends on its data and sizes filled in, as a training stores it.

    flow.classes of -1 becomes the number of classes of the data; blocks and layers to be aligned that count from the end
    count from 1; data.path is absolute.

    Args:
        classes: the class names; by default those of the data, whose folder is then listed.

    Raises: LabError for another number of classes than the data have, and for data that are not there.
    """
    data, flow = config.data, config.flow
    names = class_names(data) if classes is None else classes
    if flow.classes == -1:
        flow = flow.model_copy(update={"classes": len(names)})
    elif flow.classes not in (0, len(names)):
        raise LabError(f"flow.classes is {flow.classes}, but {data.name} has {len(names)} classes")
    if data.name == "folder" and data.path is not None:
        data = data.model_copy(update={"path": str(data.root)})
    align = config.align.counted(flow.blocks, flow.layers)
    return config.model_copy(update={"data": data, "flow": flow, "align": align})


@dataclass(eq=False)
class Run:
    """A flow with all that is known about it."""

    flow: TarFlow
    config: RunConfig
    classes: list[str]
    projectors: Projectors
    step: int = 0
    directory: Path | None = None
    _encoder: Encoder | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The name of its folder, since one configuration may have been trained several times; else `config.name`.

        A snapshot from the Hugging Face Hub lies in a folder named by a hash, and has `config.name` too.
        """
        if self.directory is None or self.directory.parent.name == "snapshots":
            return self.config.name
        return self.directory.absolute().name

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.flow.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Move flow and projectors; returns the run itself."""
        self.flow.to(device)
        self.projectors.to(device)
        return self

    def encoder(self, download: bool = True) -> Encoder:
        """The frozen encoder this run is aligned with, loaded on first use; LabError if it has none.

        Args:
            download: whether weights that are not on this machine may be fetched.
        """
        if self.config.encoder is None:
            raise LabError(f"run {self.name!r} has no encoder: set one, for example encoder.weights=bundled:digits")
        if self._encoder is None:
            with torch.inference_mode(False):  # its weights may be needed in a graph later
                self._encoder = Encoder(self.config.encoder, download)
        return self._encoder.to(self.device)

    def reference_encoder(self) -> Encoder | None:
        """The encoder that features are compared with; None where an unaligned run has none at hand, which is a warning.

        An unaligned run was trained without its encoder, so nothing is downloaded for it. LabError as `encoder` for others.
        """
        if self.config.encoder is None:
            return None
        if self.config.align.taps:
            return self.encoder()
        try:
            return self.encoder(download=False)
        except LabError as error:
            warnings.warn(f"{self.name} is not aligned, and its encoder is left out: {error}", LabWarning, stacklevel=2)
            return None

    def images(self, split: str = "test") -> ImageSet:
        """A split of the run's data, read as it is needed; labels count the run's own classes, by name."""
        return load_split(self.config.data, split, self.classes)

    def data(self, split: str = "test", limit: int | None = None, seed: int = 0) -> Batch:
        """Images (n, C, H, W) in [-1, 1] and labels (n,) of a split, on the run's device.

        With a `limit` below their number, a class-balanced subset drawn with this seed (`data.subset`).
        """
        x, y = whole(self.images(split), limit, seed)
        return Batch(x.to(self.device), y.to(self.device))

    def save(self, directory: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors, each atomically, weights in `dtype`."""
        directory = Path(directory)
        self.save_config(directory)
        self.save_weights(directory / "model.safetensors", self.weights(), self.step, dtype)

    def save_config(self, directory: Path) -> None:
        """Write config.json alone, atomically."""
        about = {"format": FORMAT, "classes": self.classes, "config": self.config.to_dict()}
        write_text(directory / "config.json", json.dumps(about, indent=2) + "\n")

    def weights(self) -> dict[str, Tensor]:
        """The tensors of flow and projectors by name, as model.safetensors holds them."""
        return self._modules().state_dict()

    @staticmethod
    def save_weights(path: Path, weights: dict[str, Tensor], step: int, dtype: torch.dtype = torch.float32) -> None:
        """Write tensors of `weights` in `dtype`, with the step they were taken at, atomically."""
        stored = {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()}
        metadata = {"step": str(step)}  # one key: safetensors writes several in any order, and the bytes would differ
        write_atomically(path, lambda temporary: save_file(stored, temporary, metadata))

    def push(self, repo_id: str, private: bool = True) -> str:
        """Upload the run directory to the Hugging Face Hub (needs a login and network); returns its address."""
        if self.directory is None:
            raise LabError("only a saved run can be pushed: call run.save(directory) and rl.load(directory) first")
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=self.directory, ignore_patterns=["train_state.pt", ".*"])
        except Exception as error:
            reason = str(error).strip().splitlines()[:1]
            raise LabError(
                f"could not push to {repo_id!r} ({type(error).__name__}: {''.join(reason)}); logged in? hf auth login"
            ) from error
        return str(url)

    def _modules(self) -> nn.Module:
        return _modules(self.flow, self.projectors)


def check_names(runs: Sequence[Run]) -> None:
    """LabError if two of the runs have one name: their measurements could not be told apart."""
    first: dict[str, Run] = {}
    for run in runs:
        other = first.setdefault(run.name, run)
        if other is not run:
            where = " and ".join(str(one.directory or "a run that is not saved") for one in (other, run))
            raise LabError(f"two of the runs are called {run.name!r} ({where}): rename the folder of one")


def build(config: RunConfig, classes: list[str]) -> Run:
    """A fresh run with weights drawn from config.train.seed; the global random state is left as it was."""
    config = complete(config, classes)
    encoder = Encoder(config.encoder) if config.align.taps and config.encoder is not None else None
    with seeded(config.train.seed):
        flow = TarFlow(config.flow)
        dim = encoder.dim if encoder else 1
        projectors = Projectors(config.align.taps, config.flow.width, config.align.projector_width, dim)
    return Run(flow, config, classes, projectors, _encoder=encoder)


class RunInfo(NamedTuple):
    """A line of `available()`."""

    name: str
    strategy: str
    data: str
    summary: str
    directory: Path


def available() -> list[RunInfo]:
    """Bundled runs, then the local ones below ./runs (or $RREPA_RUNS), by name."""
    found: dict[str, RunInfo] = {}
    for root in (assets() / "runs", runs_root()):
        for path in sorted(root.glob("*/config.json")):
            name = path.parent.name
            try:
                config, _ = _read_config(path.parent)
            except LabError:
                continue  # a folder that is being written, or of another program
            found.setdefault(name, RunInfo(name, config.align.strategy, config.data.name, _summary(config), path.parent))
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
def load(name: str | Path, device: str = "cpu", checkpoint: str = "best") -> Run:
    """A fresh run by bundled or local name, run directory, or Hugging Face Hub id ("owner/name").

    Args:
        checkpoint: "best" takes the weights that were best on the validation split where the run kept them
            (`train.keep`), else the last ones; "last" always takes the last ones.

    Raises: LabError when there is no such run, its files are truncated or do not belong together, or its weights hold NaN or
        infinite numbers.
    """
    where = pick_device(device)
    if checkpoint not in CHECKPOINTS:
        raise unknown("checkpoint", checkpoint, CHECKPOINTS)
    directory = _find(name)
    config, classes = _read_config(directory)
    path = directory / (BEST if checkpoint == "best" and (directory / BEST).is_file() else "model.safetensors")
    shapes, step = _read_header(path)
    with torch.device("meta"):  # sizes that are not those of the weights take no memory
        _check_shapes(_modules(*_unfilled(config, shapes)), shapes, path)
    flow, projectors = _unfilled(config, shapes)
    run = Run(flow, config, classes, projectors, step, directory)
    _fill(run._modules(), _read_weights(path), path)
    run.flow.plan = _read_plan(directory / PLAN)
    run.flow.eval().requires_grad_(False)
    run.projectors.eval().requires_grad_(False)
    return run.to(where)


def _find(name: str | Path) -> Path:
    text = str(name)
    for directory in (assets() / "runs" / text, Path(text), runs_root() / text):
        if (directory / "config.json").is_file():
            return directory
    if isinstance(name, Path) or Path(text).exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        if Path(text).exists():
            raise LabError(f"{text} is not a run directory: it has no config.json")
        raise unknown("run", text, [info.name for info in available()])
    return _download(text)


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    files = ["config.json", "model.safetensors", BEST, "metrics.jsonl", "card.md", "scores.csv", PLAN]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=files))
    except Exception as error:
        known = ", ".join(info.name for info in available())
        reason = type(error).__name__
        raise LabError(f"no run {repo_id!r} here, and the Hub did not give it ({reason}); local runs: {known}") from error


def _read_config(directory: Path) -> tuple[RunConfig, list[str]]:
    """Configuration and class names of a run directory; LabError for whatever else its config.json may be."""
    path = directory / "config.json"
    about = read_json(path, LARGEST_CONFIG)
    if not {"format", "classes", "config"} <= set(about):
        raise LabError(f"{path} is not the configuration of an rrepa_lab run")
    if about["format"] != FORMAT:
        raise LabError(f"{path} has format {str(about['format'])[:40]}; this version reads format {FORMAT}")
    classes = about["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise LabError(f"{path}: classes must be a list of names")
    config = validate(RunConfig, about["config"], str(path))
    if config.flow.classes < 0:
        raise LabError(f"{path}: flow.classes is {config.flow.classes}, and a trained flow has a number of classes")
    if config.flow.classes > 0 and len(classes) != config.flow.classes:
        raise LabError(f"{path} names {len(classes)} classes, and its flow has {config.flow.classes}")
    return config, classes


def _read_plan(path: Path) -> DecodePlan | None:
    try:
        return validate(DecodePlan, read_json(path, MIB), str(path))
    except MissingFileError:
        return None
    except LabError as error:
        raise LabError(f"{error}; delete the file, or calibrate anew: rrepa-lab bench plan") from None


def _unfilled(config: RunConfig, shapes: dict[str, tuple[int, ...]]) -> tuple[TarFlow, Projectors]:
    """Flow and projectors of a configuration; how many numbers the projectors give is that of their tensors on file."""
    dims = {shape[0] for key, shape in shapes.items() if key.startswith("projectors.") and key.endswith(".4.bias") and shape}
    projectors = Projectors(config.align.taps, config.flow.width, config.align.projector_width, max(dims, default=1))
    return TarFlow(config.flow), projectors


def _modules(flow: TarFlow, projectors: Projectors) -> nn.Module:
    return nn.ModuleDict({"flow": flow, "projectors": projectors})


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


def _summary(config: RunConfig) -> str:
    flow = config.flow
    size = f"{flow.blocks} blocks x {flow.layers} layers, width {flow.width}"
    if config.origin:
        return f"{size}, imported"
    if config.align.strategy == "none":
        return f"{size}, not aligned, {config.train.steps} steps"
    return f"{size}, {config.align.strategy} {config.align.place}, {config.train.steps} steps"


def describe_config(config: RunConfig) -> dict[str, Any]:
    """The facts a reader asks for first: sizes, parameters, aligned taps with their module paths."""
    flow, align = config.flow, config.align.counted(config.flow.blocks, config.flow.layers)
    with torch.device("meta"):
        known = flow.model_copy(update={"classes": max(0, flow.classes)})
        parameters = sum(p.numel() for p in TarFlow(known).parameters())
    facts: dict[str, Any] = {
        "name": config.name,
        "data": config.data.name,
        "image": "x".join(map(str, flow.image_shape)),
        "tokens": flow.tokens,
        "token_size": flow.token_size,
        "flow": f"{flow.blocks} blocks x {flow.layers} layers, width {flow.width}",
        "parameters": parameters,
        "noise": f"gaussian, sigma {flow.noise_std}" if flow.noise == "gaussian" else "uniform dequantization",
        "strategy": align.strategy,
    }
    if config.encoder is not None and align.taps:
        facts["aligned"] = [f"{name} ({Tap.parse(name).module_path})" for name in align.taps]
        facts["lambda"] = align.weight
        facts["encoder"] = f"{config.encoder.model}, {config.encoder.weights}"
    if config.origin:
        return facts | {"origin": config.origin}
    return facts | {"steps": config.train.steps, "batch": config.train.batch, "lr": config.train.lr, "seed": config.train.seed}
