"""The tabs of the page, by name, in their order; each is a module with NAME, TITLE and `build(sidebar) -> Tab`."""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

MODULES = {
    "reverse-path": "tabs.reverse_path",
    "layers": "tabs.layers.tab",
    "intervene": "tabs.intervene.tab",
    "classify": "tabs.classify.tab",
    "samples": "tabs.samples",
    "map": "tabs.map.tab",
    "training": "tabs.training.tab",
}


def load(names: Sequence[str] = ()) -> list[ModuleType]:
    """The tabs of these names, in the order of the page; all by default."""
    return [import_module(module) for name, module in MODULES.items() if not names or name in names]
