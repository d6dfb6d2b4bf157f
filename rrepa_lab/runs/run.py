"""A run: its configuration, its weights on disk, and how to get it back.

A run directory holds config.json (everything needed to build it), model.safetensors (averaged weights and projectors after
the last step), best.safetensors (the same at the step that was best on the validation split, if `train.keep` names a metric),
metrics.jsonl, card.md, space/ (of a flow of latents, a copy of its autoencoder), scores.csv once it was evaluated,
decoding.json once it was calibrated, and train_state.pt while it can be resumed.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rrepa_lab.align.aligner import Aligner
from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.encoder import make_teacher
from rrepa_lab.align.projector import Projectors
from rrepa_lab.align.self_teacher import SelfTeacher
from rrepa_lab.align.target import Targets, check_grid
from rrepa_lab.align.teacher import Teacher
from rrepa_lab.checks import whole_number
from rrepa_lab.data.images import Batch, ImageSet
from rrepa_lab.data.loaders import seeded
from rrepa_lab.data.originals import teacher_images
from rrepa_lab.data.splits import read_split
from rrepa_lab.data.subset import whole
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.files import write_atomically, write_text
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.decode.plan import DecodePlan
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.runs.attached import attached, encoders_of
from rrepa_lab.runs.card import read_scores
from rrepa_lab.runs.config import RunConfig, complete
from rrepa_lab.runs.hub import push
from rrepa_lab.runs.model_card import CARD_PICTURES, CardPicture, model_card
from rrepa_lab.runs.names import CONFIG, ENCODER, FORMAT, PUBLISHED, SPACE, WEIGHTS
from rrepa_lab.runs.records import Records
from rrepa_lab.space.autoencoder import TRAINED_HERE, copy_autoencoder, folder_of, is_autoencoder, is_bundled
from rrepa_lab.space.config import SPACES, SpaceConfig
from rrepa_lab.space.contract import Frame, Space


@dataclass(eq=False)
class Run:
    """A flow with all that is known about it.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> run.name, run.config.align.strategy, run.space.unit, len(run.classes)
        ('digits-reverse', 'reverse', 'pixels in [-1, 1]', 10)
    """

    flow: TarFlow
    config: RunConfig
    classes: list[str]
    projectors: Projectors
    step: int = 0
    directory: Path | None = None
    plan: DecodePlan | None = None  # how it is decoded fastest, see `rl.calibrate`
    fingerprints: dict[str, str] = field(default_factory=dict, repr=False)  # split -> that of the images it was trained with
    _warned: set[str] = field(default_factory=set, repr=False)  # splits of which other images are at hand, which was said
    _encoders: list[Teacher] = field(default_factory=list, repr=False)
    _space: tuple[SpaceConfig, Frame, Space] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The name of its folder, since one configuration may have been trained several times; else `config.name`.

        A snapshot from the Hugging Face Hub lies in a folder named by a hash, and has `config.name` too.
        """
        if self.directory is None or self.directory.parent.name == "snapshots":
            return self.config.name
        return self.directory.absolute().name

    @property
    def space(self) -> Space:
        """What the flow models; its weights are loaded at the first use of them, and kept, on the run's device.

        Raises: LabError for weights that are not named. Their first use raises one where they are missing, or are not those
            that the run was trained with.
        """
        key = (self._space_config(), self.config.frame)
        if self._space is None or self._space[:2] != key:
            self._space = (*key, SPACES[key[0].kind].make(*key))
        return self._space[2].to(self.device)

    def _space_config(self) -> SpaceConfig:
        """The settings of the space; where its folder is gone, with the copy in the run's directory."""
        config, copy = self.config.space, None if self.directory is None else self.directory / SPACE
        if copy is None or config.weights is None or not is_autoencoder(copy) or folder_of(config).exists():
            return config
        return config.model_copy(update={"weights": str(copy)})

    def _save_space(self, directory: Path) -> None:
        """Copy a space that the kit has trained into the directory, so that the run can be moved; a bundled one is not."""
        config = self._space_config()
        if config.kind not in TRAINED_HERE or config.weights is None or is_bundled(config):
            return
        if not is_autoencoder(directory / SPACE):
            copy_autoencoder(folder_of(config), directory / SPACE)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.flow.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Move flow and projectors; returns the run itself."""
        self.flow.to(device)
        self.projectors.to(device)
        return self

    def encoders(self, download: bool = True) -> list[Teacher]:
        """The frozen encoders this run is aligned with, loaded on first use; LabError if it has none.

        Args:
            download: whether weights that are not on this machine may be fetched.
        """
        if not self.config.teachers:
            if self.config.align.with_self:
                raise LabError(f"run {self.name!r} is its own teacher and has no encoder: give another run or an encoder")
            raise LabError(f"run {self.name!r} has no encoder: set one, for example encoder.weights=bundled:digits")
        if not self._encoders:
            with torch.inference_mode(False):  # their weights may be needed in a graph later
                configs = encoders_of(self.config.teachers, self.directory)
                self._encoders = [make_teacher(config, download) for config in configs]
        return [encoder.to(self.device) for encoder in self._encoders]

    def encoder(self, download: bool = True, number: int = 0) -> Teacher:
        """One of `encoders`: the only one, or of several the one of this number, from 0.

        Raises: LabError as `encoders`, and for a number that there is not.
        """
        found = self.encoders(download)
        if not 0 <= number < len(found):
            raise LabError(f"run {self.name!r} has encoders 0..{len(found) - 1}, not {number}")
        return found[number]

    def aligner(self, align: AlignConfig | None = None, projectors: Projectors | None = None) -> Aligner:
        """The alignment with this run's teachers; by other settings or projectors than the run's own where they are given.

        Raises: LabError for a run without a teacher.
        """
        own = self.projectors if projectors is None else projectors
        return Aligner(self.config.align if align is None else align, own, self.targets())

    def targets(self, originals: ImageSet | None = None, flow: FlowModel | None = None) -> Targets:
        """The targets of this run's alignment.

        Args:
            originals: see `Targets`.
            flow: that a self-teacher takes its features from; by default the run's own, which has averaged weights.

        Raises: LabError for a run without a teacher, or one whose grid does not fit.
        """
        align, side = self.config.align, self.flow.config.side
        if align.with_self:
            own = SelfTeacher(self.flow if flow is None else flow, align)
            return Targets([], side, align, own=own, encode=self.space.encode)
        for teacher in self.encoders():
            check_grid(teacher, side, align)
        return Targets(self.encoders(), side, align, originals=originals)

    def reference_encoders(self) -> list[Teacher]:
        """The encoders that features are compared with; none where an unaligned run has none at hand, which is a warning.

        An unaligned run was trained without its encoder, so nothing is downloaded for it. LabError as `encoders` for others.
        """
        if not self.config.teachers:
            return []
        if self.config.align.taps:
            return self.encoders()
        try:
            return self.encoders(download=False)
        except LabError as error:
            warnings.warn(f"{self.name} is not aligned, and its encoder is left out: {error}", LabWarning, stacklevel=2)
            return []

    def reference_encoder(self) -> Teacher | None:
        """The first of `reference_encoders`, None where there is none."""
        found = self.reference_encoders()
        return found[0] if found else None

    def images(self, split: str = "test") -> ImageSet:
        """A split of the run's data, read as it is needed; labels count the run's own classes, by name.

        Warns once (LabWarning) where they are not the images that the run was trained with.
        """
        found = read_split(self.config.data, split, self.classes)
        known = self.fingerprints.get(split)
        if known is not None and found.fingerprint != known and split not in self._warned:
            self._warned.add(split)
            what = f"the {split} images at hand ({len(found)}, fingerprint {found.fingerprint}) are not those that {self.name}"
            advice = "numbers on them cannot be compared with its records; rrepa-lab data describe says what is there"
            warnings.warn(f"{what} was trained with ({known}): {advice}", LabWarning, stacklevel=2)
        return found

    @property
    def data_words(self) -> str:
        """The data set, with the fingerprint of the training images where it is known: "cifar10 3590ee6ebd5c339d"."""
        return " ".join(filter(None, (self.config.data.name, self.fingerprints.get("train"))))

    def teacher_images(self, split: str, images: ImageSet) -> ImageSet:
        """Images of a split as the teacher sees them, in the same rows; see `data.teacher_size`."""
        return teacher_images(self.config.data, split, images, self.classes)

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
        self._save_space(directory)
        self.save_weights(directory / "model.safetensors", self.weights(), self.step, dtype)

    def save_config(self, directory: Path) -> None:
        """Write config.json alone, atomically."""
        about = {"format": FORMAT, "classes": self.classes, "config": self.config.to_dict()}
        if self.fingerprints:
            about["data"] = self.fingerprints
        write_text(directory / "config.json", json.dumps(about, indent=2) + "\n")

    def weights(self) -> dict[str, Tensor]:
        """The tensors of flow and projectors by name, as model.safetensors holds them."""
        return modules(self.flow, self.projectors).state_dict()

    @staticmethod
    def save_weights(path: Path, weights: dict[str, Tensor], step: int, dtype: torch.dtype = torch.float32) -> None:
        """Write tensors of `weights` in `dtype`, with the step they were taken at, atomically."""
        stored = {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()}
        metadata = {"step": str(step)}  # one key: safetensors writes several in any order, and the bytes would differ
        write_atomically(path, lambda temporary: save_file(stored, temporary, metadata))

    def push(self, repo_id: str, private: bool = True, *, samples: int = 16, license: str = "unknown") -> str:
        """Upload the saved run to the Hugging Face Hub in one commit, with a model card; returns its address.

        Uploaded are the files that `rl.load` and a reader need (`runs.names.PUBLISHED`), never the state for resuming. The
        card has facts, scores with their protocol if the run was evaluated (`rrepa-lab evaluate RUN --save`), and a picture
        of samples. `rl.load(repo_id)` gives the same run back. Autoencoder and teacher go along where the kit has trained them;
        config.json goes as it is, with the paths of data and weights on this machine.

        Args:
            repo_id: "owner/name".
            private: of a repository that is made by this; one that exists keeps what it is.
            samples: images of that picture, drawn here and now; 0 for none.
            license: of the weights, for the card, by the Hub's identifiers: "mit", "cc-by-nc-4.0".

        Raises: LabError for a run that is not saved, a space of others in a folder of this machine, no token, a name or a
            login that the Hub refuses, and no network.
        """
        if self.directory is None:
            raise LabError("only a saved run can be pushed: call run.save(directory) and rl.load(directory) first")
        files: dict[str, Path | bytes] = {name: path for name in PUBLISHED if (path := self.directory / name).is_file()}
        if CONFIG not in files or WEIGHTS not in files:
            raise LabError(f"{self.directory} is no saved run: it lacks {CONFIG if CONFIG not in files else WEIGHTS}")
        files |= attached(self.config, self.directory)
        pictures = self._pictures(whole_number("samples", samples))
        files |= {name: one.png for name, one in pictures.items()}
        scores = read_scores(self.directory)
        card = model_card(self, repo_id, license, Records(self.directory).table(), scores, pictures)
        files["README.md"] = card.encode()
        replaces = [*PUBLISHED, f"{ENCODER}/", *(f"{name}.png" for name in CARD_PICTURES.names())]
        return push(repo_id, files, replaces, private, f"{self.name}, step {self.step}")

    def _pictures(self, count: int) -> dict[str, CardPicture]:
        """The pictures of the model card by file name; one that cannot be drawn is a warning."""
        found: dict[str, CardPicture] = {}
        for name in CARD_PICTURES.names() if count else ():
            try:
                found[f"{name}.png"] = CARD_PICTURES[name](self, count)
            except LabError as error:
                warnings.warn(f"the card has no picture of {name}: {error}", LabWarning, stacklevel=3)
        return found


def flow_of(source: Run | FlowModel) -> FlowModel:
    """The flow of a run, or the flow itself."""
    return source.flow if isinstance(source, Run) else source


def modules(flow: TarFlow, projectors: Projectors) -> nn.ModuleDict:
    """Flow and projectors as one module, with the tensor names of model.safetensors."""
    return nn.ModuleDict({"flow": flow, "projectors": projectors})


def check_names(runs: Sequence[Run]) -> None:
    """LabError if two of the runs have one name: their measurements could not be distinguished."""
    first: dict[str, Run] = {}
    for run in runs:
        other = first.setdefault(run.name, run)
        if other is not run:
            where = " and ".join(str(one.directory or "a run that is not saved") for one in (other, run))
            raise LabError(f"two of the runs are called {run.name!r} ({where}): rename the folder of one")


def build(config: RunConfig, classes: list[str]) -> Run:
    """A fresh run with weights drawn from config.train.seed; the global random state is left as it was."""
    config = complete(config, classes)
    encoders = [make_teacher(one) for one in config.teachers] if config.align.taps else []
    for encoder in encoders:
        check_grid(encoder, config.flow.side, config.align)
    with seeded(config.train.seed):
        flow = TarFlow(config.flow)
        dims = [encoder.dim for encoder in encoders] or [config.flow.width if config.align.with_self else 1]
        projectors = Projectors.of(config.align, config.flow, dims)
    return Run(flow, config, classes, projectors, _encoders=encoders)
