"""Samples of a run as a set of pictures: drawn when they are read, the same whatever the batch and the process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rrepa_lab.analysis.features import cycled_labels
from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.data.fingerprint import digest
from rrepa_lab.data.loaders import generator
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.adm import picture_writer
from rrepa_lab.evaluation.networks.contract import ByteRule, to_bytes
from rrepa_lab.evaluation.protocols import LabelRule
from rrepa_lab.files import check_writable
from rrepa_lab.flow.condition import Guidance
from rrepa_lab.flow.decode.plan import Decoding
from rrepa_lab.processes import gather, is_main
from rrepa_lab.runs.run import Run
from rrepa_lab.sampling.sample import SamplesNotFiniteError, sample, seed_range


@dataclass(frozen=True)
class Sampling:
    """Which samples of a run are scored.

    Args:
        n: how many; 0 for none.
        seed: of the first; sample i is drawn from seed + i.
        guidance: as in `rl.sample`.
        denoise, strength: the last step, see `rl.sample`.
        method: of decoding.

    Raises: LabError for a number out of range.

    Example:
        >>> import rrepa_lab as rl
        >>> table = rl.evaluate_samples(rl.load("digits-reverse"), rl.Sampling(80, guidance=1.0))
        >>> table.metric[0], float(table.guidance[0])
        ('FD[digits]', 1.0)
    """

    n: int = 2000
    seed: int = 0
    guidance: float | Guidance = 0.0
    denoise: bool = True
    strength: float = 1.0
    method: str | Decoding = "auto"

    def __post_init__(self) -> None:
        whole_number("samples", self.n)
        if self.n == 1:
            raise LabError("samples must be at least 2: a score compares their spread with that of real pictures")
        seed_range(self.seed, max(self.n, 1))
        Guidance.of(self.guidance)
        real_number("strength", self.strength)

    @classmethod
    def of(cls, value: "int | Sampling", seed: int = 0) -> "Sampling":
        """All settings, or a number of samples alone."""
        return value if isinstance(value, Sampling) else cls(value, seed)

    @property
    def rule(self) -> Guidance:
        """The guidance."""
        return Guidance.of(self.guidance)


@dataclass
class RunSamples:
    """The samples of a run, labels by a rule: classes in turn, or each drawn at random from the seed."""

    run: Run
    sampling: Sampling
    rule: LabelRule = "in turn"
    finish: str = field(default="", init=False)  # what the last step was, known after the first batch
    method: str = field(default="", init=False)  # of decoding

    @property
    def words(self) -> str:
        """For a protocol: "2000 samples, unguided, denoised, labels in turn, seeds 0..1999"."""
        n, first, rule = self.sampling.n, self.sampling.seed, self.sampling.rule
        guided = f"guidance {rule.scale:g}{', annealed' if rule.annealed else ''}" if rule.scale else "unguided"
        parts = (f"{n} samples", guided, self.finish, self._label_words, f"seeds {first}..{first + n - 1}")
        return ", ".join(filter(None, parts))

    @property
    def brief(self) -> str:
        """The same without what has columns of its own: "2000 samples, labels in turn"."""
        return f"{self.sampling.n} samples, {self._label_words}"

    @property
    def _label_words(self) -> str:
        if not self.run.flow.config.classes:
            return "no labels"
        return "labels in turn" if self.rule == "in turn" else "labels at random"

    @property
    def sha256(self) -> str:
        """Of the settings: the pictures are not made for it."""
        return digest(self.run.name, self.words)

    @property
    def labels(self) -> Tensor:
        """(n,) int64; -1 for a flow without classes."""
        classes, n = self.run.flow.config.classes, self.sampling.n
        if self.rule == "in turn" or not classes:
            return cycled_labels(self.run, n)
        return torch.randint(classes, (n,), generator=generator(self.sampling.seed, 5))

    def __len__(self) -> int:
        return self.sampling.n

    def batch(self, rows: Tensor) -> Tensor:
        """Samples (B, C, H, W) in [-1, 1] of these rows.

        Raises: LabError where samples overflow; it says how many.
        """
        how = self.sampling
        seeds, labels = seed_range(how.seed, how.n), self.labels
        chosen = [seeds[row] for row in rows.tolist()]
        try:
            made = sample(
                self.run, chosen, labels[rows].tolist(), how.guidance, denoise=how.denoise, strength=how.strength,
                method=how.method,
            )  # fmt: skip
        except SamplesNotFiniteError as error:
            raise LabError(f"no score: {error}") from error
        self.finish, self.method = made.finish, made.method
        return made.images


@dataclass
class SavedPictures:
    """A set whose pictures are also written to a file when they are read; see `saving`."""

    pictures: RunSamples
    bytes_rule: ByteRule
    array: np.ndarray  # (n, H, W, C) uint8, a file that all processes map

    @property
    def words(self) -> str:
        """Of the set."""
        return self.pictures.words

    @property
    def sha256(self) -> str:
        """Of the set."""
        return self.pictures.sha256

    @property
    def labels(self) -> Tensor:
        """Of the set."""
        return self.pictures.labels

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, rows: Tensor) -> Tensor:
        """The pictures of these rows."""
        x = self.pictures.batch(rows)
        self.array[rows.numpy()] = to_bytes(x, self.bytes_rule).cpu().permute(0, 2, 3, 1).numpy()
        return x


@contextmanager
def saving(pictures: RunSamples, path: Path | str, rule: ByteRule) -> Iterator[SavedPictures]:
    """Within it the samples that are read are kept beside `path`; at the end they are there as a .npz file in ADM's layout.

    Args:
        rule: how floats become bytes; "none" rounds.

    Raises: LabError where the file cannot be written.
    """
    path = Path(path).expanduser()
    check_writable(path)
    c, h, w = pictures.run.space.picture_shape
    raw = path.with_name(f".{path.name}.raw")

    def make() -> None:
        if is_main():
            np.lib.format.open_memmap(raw, "w+", np.uint8, (len(pictures), h, w, c)).flush()

    gather(make)
    try:
        array = np.lib.format.open_memmap(raw, "r+")
        yield SavedPictures(pictures, "rounded" if rule == "none" else rule, array)
        array.flush()
        gather(lambda: None)  # all have written
        if is_main():
            labels = pictures.labels if pictures.run.flow.config.classes else None
            with picture_writer(path, len(pictures), (c, h, w), labels) as write:
                for part in torch.arange(len(pictures)).split(1024):
                    write(torch.from_numpy(np.array(array[part.numpy()])).permute(0, 3, 1, 2))
    finally:
        if is_main():
            raw.unlink(missing_ok=True)
