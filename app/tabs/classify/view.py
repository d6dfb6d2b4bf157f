"""The view of the tab "Classify"."""

from dataclasses import dataclass, field

from page.views import UNLINKED, View, linked_as
from tabs.classify.input import OwnPicture
from tabs.classify.results import ANY, METHODS, STEPS


@dataclass(frozen=True)
class ClassifyView(View):
    """What the tab shows."""

    index: int = field(default=3, metadata=linked_as("image"))  # row of the test split
    step: int = STEPS  # of gradient ascent
    method: str = field(default=next(iter(METHODS)), metadata=linked_as("by"))  # of the answers over the test split
    of: str = ANY  # class of the images in the gallery
    taken_for: str = field(default=ANY, metadata=linked_as("said"))  # their answer
    mistakes: bool = True
    picture: OwnPicture | None = field(default=None, metadata=UNLINKED)


IMAGE = ("index", "picture")  # the fields that choose the image
ANSWERS = ("method", "of", "taken_for", "mistakes")  # those that choose answers over the test split
