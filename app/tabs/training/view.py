"""The view of the tab "Training"."""

from dataclasses import dataclass, field

from page.views import View, linked_as
from server.runs import DEFAULT_RUN

import rrepa_lab as rl

NEW_RUN = "my-run"
_ALIGN = rl.preset(DEFAULT_RUN).align


@dataclass(frozen=True)
class TrainingView(View):
    """What the tab shows: the form of a new run, the curves of several runs, and the atlas of gradients at a layer."""

    name: str = NEW_RUN
    preset: str = DEFAULT_RUN
    blocks: tuple[str, ...] = tuple(map(str, _ALIGN.blocks))  # aligned, from 1
    layer: int = _ALIGN.pairs[0][1][0]
    weight: float = field(default=_ALIGN.weight, metadata=linked_as("lambda"))
    steps: int = 200
    more: tuple[str, ...] = ()  # runs in addition to those of the sidebar
    show: str = "nats/dim"  # key of SHOWN
    axis: str = field(default="steps", metadata=linked_as("along"))  # key of AXES
    tap: str = ""  # of the atlas; "" for the one that `training.tap_in` chooses


FORM = ("name", "preset", "blocks", "layer", "weight", "steps")
CURVES = ("more", "show", "axis")
