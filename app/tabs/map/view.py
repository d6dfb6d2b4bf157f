"""The view of the tab "Map", and the maps that it asks for."""

from dataclasses import dataclass, field

from page.views import UNLINKED, View, linked_as
from server.runs import pair
from tabs.map.data import REAL, MapView
from tabs.trajectories import tap_in

PCA, UMAP = "PCA", "UMAP"


@dataclass(frozen=True)
class FeatureMapView(View):
    """What the tab shows."""

    images: str = field(default=REAL, metadata=linked_as("read"))  # or CONDITIONAL, UNCONDITIONAL
    method: str = PCA
    block: int = 3
    layer: int = 2
    image: int = 0
    neighbours: int = 15  # of UMAP
    distance: float = 0.1  # of UMAP
    fitted: View | None = field(default=None, metadata=UNLINKED)  # the last view whose UMAPs were fitted


IMAGE = ("images", "block", "layer", "image")  # the fields that choose the picked image


def map_views(view: FeatureMapView) -> list[MapView]:
    """The maps to show, one for each run."""
    return [
        MapView(name, run, view.images, view.seed, tap_in(run, view.block, view.layer))
        for name, run in pair(view.run, view.other).items()
    ]
