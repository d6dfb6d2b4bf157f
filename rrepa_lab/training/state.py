"""train_state.pt: everything a training needs to go on, in one file that is replaced at once.

The other files of a run directory (config.json, model.safetensors, best.safetensors, metrics.jsonl, card.md) are written
from it. A process that is killed between two of them leaves files of an older step; the next start writes them again.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rrepa_lab.errors import LabError
from rrepa_lab.files import write_atomically
from rrepa_lab.readers import MissingFileError, check_file

NAME = "train_state.pt"
PLAIN = ("rows", "config", "pending")  # values that are kept as text


@dataclass
class Best:
    """The weights that were best on the validation split so far."""

    step: int
    value: float  # of the metric that `train.keep` names
    weights: dict[str, Tensor]  # flow and projectors, as in model.safetensors
    since: int = 0  # validations without a better value


@dataclass
class Checkpoint:
    """The state of a training after a step, with its records up to that step."""

    step: int
    config: dict[str, Any]  # of the run; empty in a file of version 0.1
    classes: list[str]
    precision: str
    objective: dict[str, Any]
    average: dict[str, Any]
    optimizer: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    pending: list[dict[str, float]] = field(default_factory=list)  # measurements of the steps since the last report
    best: Best | None = None
    ended: bool = False  # by early stopping

    def save(self, path: Path) -> None:
        """Replace the file; LabError where that is not possible, and the old one stands."""
        best = None if self.best is None else vars(self.best)
        # plain values as text: JSON gives back exactly the numbers that metrics.jsonl and config.json hold
        values = vars(self) | {name: json.dumps(getattr(self, name)) for name in PLAIN} | {"best": best}
        write_atomically(path, lambda temporary: torch.save(values, temporary))

    @classmethod
    def load(cls, path: Path, lazily: bool = False) -> "Checkpoint":
        """Read the file; tensors and plain values alone, nothing in it is executed.

        Args:
            lazily: leave the tensors on disk, for a look at the plain values.

        Raises: LabError if it is missing, damaged or of another program.
        """
        try:
            check_file(path)  # a pipe would never end
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
            if "rows" not in values:  # version 0.1 kept weights and step alone
                values |= {"rows": "[]", "config": "{}", "classes": [], "precision": "float32"}
            if not isinstance(values.get("pending"), str):  # of versions before 0.2, by position: the next report does without
                values |= {"pending": "[]"}
            plain = {name: json.loads(values[name]) for name in PLAIN}
            best = values.get("best")
            return cls(**values | plain | {"best": None if best is None else Best(**best)})
        except MissingFileError:
            raise LabError(f"{path} is missing: this run can be used, but not resumed") from None
        except LabError:
            raise
        except Exception as error:  # torch has no exception of its own for a damaged file
            raise LabError(f"{path} is damaged or of another program ({type(error).__name__})") from error
