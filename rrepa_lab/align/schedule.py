"""How the weight of the alignment changes with the step; `align.schedule` names it.

| schedule    | factor of lambda                                                                                   |
|-------------|----------------------------------------------------------------------------------------------------|
| constant    | 1                                                                                                  |
| until:STEP  | 1 before STEP, then 0: the features are no longer computed (HASTE, arXiv 2505.16792)               |
| cosine      | from 1 at the first step to 0 at the end, half a cosine                                            |
| warmup:STEP | rises in equal parts to 1 at STEP                                                                  |
"""

import math
import re
from typing import NamedTuple

FORMS = "constant, cosine, until:STEP or warmup:STEP"
_FORM = re.compile(r"(constant|cosine)|(until|warmup):(\d{1,12})")


class Schedule(NamedTuple):
    """A schedule; `step` is the number after the colon, 0 for those without one."""

    kind: str
    step: int = 0

    def factor(self, step: int, steps: int) -> float:
        """The factor of lambda at a step of 0..steps-1.

        Example:
            >>> [Schedule.parse("warmup:4").factor(step, 100) for step in (0, 1, 3, 50)]
            [0.25, 0.5, 1.0, 1.0]
        """
        match self.kind:
            case "until":
                return float(step < self.step)
            case "warmup":
                return min(1.0, (step + 1) / self.step)
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * step / steps))
            case _:
                return 1.0

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """From text; ValueError for any other, and for a step of 0."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no schedule: give {FORMS}")
        plain, kind, step = found.groups()
        if kind and not int(step):
            raise ValueError(f"{text}: the step must be 1 at least")
        return cls(plain) if plain else cls(kind, int(step))
