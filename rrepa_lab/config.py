"""What every configuration shares: frozen, typed, JSON in and out, unknown keys refused in one line."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, ValidationInfo, model_validator

from rrepa_lab.errors import LabError, LabWarning, unknown

T = TypeVar("T")
ONE, SEVERAL = "(one)", "(several)"  # stand in the places of pydantic's errors; they are no names of settings
# a setting that is one thing or a list of them; an error is that of the form that was given
OneOrSeveral = Annotated[
    Annotated[T, Tag(ONE)] | Annotated[list[T], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(lambda value: SEVERAL if isinstance(value, list) else ONE),
]


class Config(BaseModel):
    """Base of the configurations, each of which stands beside the code it configures."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}  # name of a setting in version 0.1 -> its name now

    @model_validator(mode="before")
    @classmethod
    def _present_names(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, Mapping):
            return values
        for old in cls.renamed.keys() & values.keys():
            if cls.renamed[old] in values:
                raise ValueError(f"{old} and {cls.renamed[old]} are one setting: give {cls.renamed[old]} alone")
            _warn_renamed(old, cls.renamed[old], info)
        return {cls.renamed.get(key, key): value for key, value in values.items()}

    @classmethod
    def implied(cls, name: str, value: Any) -> dict[str, Any]:
        """The settings that a new value of a setting brings along in `override`; those that are given too win."""
        return {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], stored: bool = False) -> Self:
        """Build from plain JSON values.

        Args:
            stored: they were written by the kit itself, so that names of version 0.1 are taken without a hint.

        Raises: LabError in one line, naming the key in dotted form, for an unknown key or a wrong value.
        """
        try:
            return cls.model_validate(values, context={"stored": stored})
        except ValidationError as error:
            raise _first_problem(cls, error) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, complete, such that `from_dict` gives an equal configuration back."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """The same values under dotted keys, "train.steps"."""
        return _flat(self.to_dict())

    def override(self, settings: Mapping[str, Any]) -> Self:
        """A copy with dotted keys replaced: `config.override({"train.steps": 200})`, checked as a whole."""
        values = self.to_dict()
        for path, value in settings.items():
            *parents, last = path.split(".")
            node: Any = values
            owner: type[Config] = type(self)
            for name in parents:
                child = _child(node, name)
                if not isinstance(child, dict | list):
                    raise unknown("setting", path, _flat(values))
                node, owner = child, owner if isinstance(node, list) else _class_of(owner, name)
            if isinstance(node, list):
                raise LabError(f"{path}: {'.'.join(parents)} is a list of {len(node)}: say which, {'.'.join(parents)}.0.{last}")
            if last in owner.renamed:
                present = owner.renamed[last]
                _warn_renamed(path, ".".join([*parents, present]))
                last = present
            if last not in node:
                raise unknown("setting", path, _flat(values))
            for other, brought in owner.implied(last, value).items():
                if ".".join([*parents, other]) not in settings:
                    node[other] = brought
            node[last] = value
        return self.from_dict(values)


def _child(node: Any, name: str) -> Any:
    """A part of plain values: of an object by its name, of a list by its number from 0."""
    if isinstance(node, list):
        return node[int(name)] if name.isdecimal() and int(name) < len(node) else None
    return node.get(name)


def _warn_renamed(old: str, new: str, info: ValidationInfo | None = None) -> None:
    if info is None or not (info.context or {}).get("stored"):
        warnings.warn(
            f"the setting {old} is called {new} now; the old name is read in this version only", LabWarning, stacklevel=2
        )


def _class_of(owner: type[Config], field: str) -> type[Config]:
    """The class of a nested configuration; the base class for plain values."""
    found = owner.model_fields.get(field)
    return next((kind for kind in _parts(found.annotation) if issubclass(kind, Config)), Config) if found else Config


def _parts(annotation: Any) -> Iterator[type]:
    """The classes that an annotation is made of."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _first_problem(cls: type[Config], error: ValidationError) -> LabError:
    problem = error.errors()[0]
    place = [part for part in problem["loc"] if part not in (ONE, SEVERAL)]
    path = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        return unknown("setting", path, _fields(cls, place[:-1]))
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    named = isinstance(given, (str, int, float, list, tuple, bool)) and repr(given) not in message
    shown = f" (got {given!r})" if named else ""
    return LabError(f"{path}: {message}{shown}" if path else message)


def _fields(cls: type[Config], parents: Sequence[int | str]) -> list[str]:
    for name in parents:
        cls = cls if isinstance(name, int) else _class_of(cls, name)
    prefix = "".join(f"{name}." for name in parents)
    return [prefix + name for name in cls.model_fields]
