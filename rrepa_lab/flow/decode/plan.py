"""How a flow is decoded: the settings of a call, and what was found fastest for a flow on a kind of device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.config import Config
from rrepa_lab.errors import unknown

METHODS = ("auto", "sequential", "cached", "jacobi")
PRECISIONS = ("float32", "bfloat16")


class DecodePlan(Config):
    """How a flow is decoded fastest on one kind of device, found by `rl.calibrate` and kept with the run."""

    device: str = Field("cpu", description="cpu or cuda")
    windows: list[int] = Field([], description="jacobi: tokens in a window of each block, block 1 first")
    upto: int = Field(0, ge=0, description="auto: jacobi up to so many images times branches of the guidance, above it cached")


@dataclass(frozen=True)
class Decoding:
    """The settings of decoding; all give the same images, to the tolerance.

    Args:
        method: "sequential" is the plain token loop, the only one that is differentiable; "cached" the same with memory and
            branches managed; "jacobi" iterates on windows of tokens until they converge; "auto" is sequential where a
            gradient is wanted, else the faster of the two others by the plan.
        tolerance: of jacobi, the largest `InverseOutput.error` that is accepted; 1e-5, in float64 1e-10, if None.
        precision: of the matrix products of cached and jacobi, float32 or bfloat16; with bfloat16 the error is measured
            and reported.
        batch: images decoded at once; as many as fit into the free memory if None.
        plan: of this flow and device; without one, auto is cached, and a window has an eighth of the tokens.

    Raises: LabError for an unknown method or precision, a tolerance or batch out of range.

    Example:
        >>> Decoding("jacobi", tolerance=1e-6).method
        'jacobi'
    """

    method: str = "auto"
    tolerance: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    batch: int | None = None
    plan: DecodePlan | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("decoding method", self.method, METHODS)
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.batch is not None:
            whole_number("batch", self.batch, 1)
        if self.tolerance is not None:
            real_number("tolerance", self.tolerance, above=True)

    @classmethod
    def of(cls, value: "str | Decoding", plan: DecodePlan | None = None) -> "Decoding":
        """A method's name, or all settings; with this plan where they bring none."""
        settings = value if isinstance(value, Decoding) else cls(value)
        return settings if settings.plan is not None or plan is None else replace(settings, plan=plan)

    def tolerance_in(self, dtype: torch.dtype) -> float:
        """The tolerance, or its default in this dtype."""
        return default_tolerance(dtype) if self.tolerance is None else self.tolerance

    def choose(self, device: str, rows: int) -> str:
        """The method that decodes so many images times branches without a gradient: auto goes by the plan."""
        if self.method != "auto":
            return self.method
        plan = self.plan
        return "jacobi" if plan is not None and plan.device == device and rows <= plan.upto else "cached"

    def windows(self, method: str, blocks: int, tokens: int) -> list[int]:
        """Tokens in a window of each block, block 1 first."""
        if method == "cached":
            return [1] * blocks
        if self.plan is not None and len(self.plan.windows) == blocks:
            return [min(window, tokens) for window in self.plan.windows]
        return [max(8, tokens // 8)] * blocks


def default_tolerance(dtype: torch.dtype) -> float:
    """The largest error of a number of the image that jacobi accepts in this dtype, images being in [-1, 1]."""
    return 1e-10 if dtype == torch.float64 else 1e-5


class BlockReport(NamedTuple):
    """The argument of a progress callback, after each block."""

    block: int  # the block just done, from N down to 1
    blocks: int
    images: int  # decoded at once
    iterations: int  # passes of the Transformer
    method: str


Progress = Callable[[BlockReport], object]
