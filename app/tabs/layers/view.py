"""The view of the tab "Layers"."""

from dataclasses import dataclass, field

from page.views import UNLINKED, View, linked_as
from server.shipped import SEEDS
from tabs.layers.studies import SHIPPED_STUDY, STRATEGIES, Choice

PART_NAMES = ("strategy", "blocks", "layer", "rest")  # of PARTS, in the fields of the view


@dataclass(frozen=True)
class LayersView(View):
    """What the tab shows: a table of all layers above, two settings of a study, A and B, below."""

    metric: str = "linear_accuracy"
    direction: str = field(default="forward", metadata=linked_as("read"))
    source: str = SEEDS
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    study: str = SHIPPED_STUDY
    a_strategy: str = "reverse"
    a_blocks: str = "3,4"
    a_layer: str = "2"
    a_rest: str = ""
    b_strategy: str = "detach"
    b_blocks: str = "1,2,3,4"
    b_layer: str = "2"
    b_rest: str = ""
    measurements: int = field(default=0, metadata=UNLINKED)  # made on the page; a new one draws the table again

    def choice(self, letter: str) -> Choice:
        """The setting "a" or "b", a value for each of PARTS."""
        return tuple(getattr(self, f"{letter}_{part}") for part in PART_NAMES)

    @property
    def choices(self) -> tuple[Choice, Choice]:
        """The settings A and B."""
        return self.choice("a"), self.choice("b")


TABLE = ("metric", "direction", "source", "strategies", "measurements")  # the fields that choose the table
CHOICES = tuple(f"{letter}_{part}" for letter in "ab" for part in PART_NAMES)
