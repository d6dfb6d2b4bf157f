"""Numbers that are not finite (NaN, infinite): found where they arise, and named by row, block and likely cause."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from rrepa_lab.errors import LabError
from rrepa_lab.flow.condition import UNGUIDED, Guidance

FEW = 6  # rows that a message lists


class HasWeights(Protocol):
    """A module with named tensors."""

    def state_dict(self) -> dict[str, Any]:
        """Name -> tensor."""
        ...


class NotFiniteError(LabError):
    """A result holds numbers that are not finite; `rows` of the batch do, first on the image side of block `block`."""

    def __init__(self, message: str, rows: Sequence[int] = (), block: int | None = None) -> None:
        super().__init__(message)
        self.rows, self.block = list(rows), block


def rows_not_finite(x: Tensor) -> list[int]:
    """Rows of (B, ...) that hold NaN or infinite numbers."""
    fine = x.detach().isfinite().flatten(1).all(dim=1)
    return (~fine).nonzero()[:, 0].tolist()


def check_rows(x: Tensor, what: str) -> None:
    """LabError that names the rows of (B, ...) which hold NaN or infinite numbers; one reduction where all is well."""
    if not bool(x.detach().isfinite().all()):
        rows = rows_not_finite(x)
        raise LabError(f"{what} must be finite, but row {listed(rows)} of {len(x)} holds NaN or infinite numbers")


def bad_tensors(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinite numbers."""
    return [name for name, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]


def cause(module: HasWeights, guidance: Guidance = UNGUIDED) -> str:
    """What is most likely wrong, and what to do about it."""
    bad = bad_tensors(module.state_dict())
    if bad:
        return f"the weights are not finite ({bad[0]}): load or train the run again"
    if guidance.scale:
        cooled = "" if guidance.temperature == 1.0 else f" at temperature {guidance.temperature:g}"
        return f"guidance {guidance.scale:g}{cooled} is the likely cause: lower it"
    return "the input is too far from what the flow was trained on, or its training diverged"


def listed(rows: Sequence[object]) -> str:
    """ "0, 3, 7", with the rest counted."""
    text = ", ".join(map(str, rows[:FEW]))
    return text if len(rows) <= FEW else f"{text} and {len(rows) - FEW} more"
