"""Things of one kind by name: the kit's own, one file each, and those that a user or an installed package adds."""

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from typing import Generic, TypeVar

from rrepa_lab.errors import LabError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Named values of one kind.

    A name stands for what `register` added; else for what the module `<folder>.<name>` adds when it is imported; else for
    what an installed package adds by an entry point `<name>` of the group `rrepa_lab.<kind>`, with spaces as underscores.
    A family stands for all names `<family>:<rest>`, whose value it makes from the rest.

    Args:
        kind: what the values are, for messages: "data set".
        folder: package with one module for each of the kit's own values, if any; dashes of a name are underscores there.
        order: names of its own that come first, in this order.

    Example:
        >>> shapes = Registry("shape")
        >>> shapes.register("round")(len) is len, shapes["round"] is len
        (True, True)
        >>> _ = shapes.family("polygon")(lambda corners: f"{corners} corners")
        >>> shapes["polygon:5"]
        '5 corners'
    """

    def __init__(self, kind: str, folder: str | None = None, order: Sequence[str] = ()) -> None:
        self.kind, self.folder, self.group = kind, folder, f"rrepa_lab.{kind.replace(' ', '_')}"
        self.order = tuple(order)
        self._values: dict[str, T] = {}
        self._families: dict[str, Callable[[str], T]] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Add what is decorated, under this name; LabError if another value has it."""

        def add(value: T) -> T:
            if self._values.setdefault(name, value) is not value:
                raise LabError(f"there is a {self.kind} {name!r} already: choose another name")
            return value

        return add

    def family(self, name: str) -> Callable[[Callable[[str], T]], Callable[[str], T]]:
        """Add the family that is decorated: a function from what follows the colon of a name to its value.

        It may raise LabError for what it does not take. A module or entry point of the family's name may add it.
        """

        def add(make: Callable[[str], T]) -> Callable[[str], T]:
            if self._families.setdefault(name, make) is not make:
                raise LabError(f"there is a family of {self.kind}s {name!r} already: choose another name")
            return make

        return add

    def __getitem__(self, name: str) -> T:
        """The value of this name; LabError with the nearest names if there is none."""
        self.check(name)
        family, colon, rest = name.partition(":")
        if colon and name not in self._values:
            self._values[name] = self._families[family](rest)
        self._load(name)
        if name not in self._values:
            raise LabError(f"the {self.kind} {name!r} is a family: give {name}:<which>")
        return self._values[name]

    def check(self, name: str) -> str:
        """The name itself; LabError with the nearest names if nothing has it. A module is imported for a family alone."""
        if name not in self:
            raise unknown(self.kind, name, self.names())
        return name

    def __contains__(self, name: str) -> bool:
        family, colon, rest = name.partition(":")
        if colon and name not in self._values:
            self._load(family)
            return bool(rest) and family in self._families
        return name in self._values or name in self._modules or name in self._points

    def _load(self, name: str) -> None:
        """Import the module or entry point of this name, if it has one that was not imported."""
        if name in self._values or name in self._families:
            return
        if name in self._modules:
            import_module(f"{self.folder}.{self._modules[name]}")
        elif name in self._points:
            found = self._points[name].load()
            if name not in self._families:  # which importing it may have added
                self._values[name] = found

    def names(self) -> list[str]:
        """All names: the kit's own, then the others, each in alphabetical order but for `order`."""
        own = [*self.order, *sorted(self._modules.keys() - {*self.order})]
        return [*own, *sorted({*self._values, *self._points} - {*own})]

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Name -> module in the kit's own folder, none of which is imported for this."""
        if self.folder is None:
            return {}
        stems = [path.name.removesuffix(".py") for path in files(self.folder).iterdir() if path.name.endswith(".py")]
        return {stem.replace("_", "-"): stem for stem in stems if not stem.startswith("_")}

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        """Name -> entry point of an installed package."""
        return {point.name: point for point in entry_points(group=self.group)}
