"""What every configuration shares: frozen, typed, JSON in and out, unknown keys refused in one line."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from rrepa_lab.errors import LabError, unknown


class Config(BaseModel):
    """Base of the configurations, each of which stands beside the code it configures."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain JSON values.

        Raises: LabError in one line, naming the key in dotted form, for an unknown key or a wrong value.
        """
        try:
            return cls.model_validate(values)
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
            node = values
            for name in parents:
                child = node.get(name)
                if not isinstance(child, dict):
                    raise unknown("setting", path, _flat(values))
                node = child
            if last not in node:
                raise unknown("setting", path, _flat(values))
            node[last] = value
        return self.from_dict(values)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _first_problem(cls: type[Config], error: ValidationError) -> LabError:
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return unknown("setting", path, _fields(cls, problem["loc"][:-1]))
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = f" (got {given!r})" if isinstance(given, (str, int, float, list, tuple, bool)) else ""
    return LabError(f"{path}: {message}{shown}" if path else message)


def _fields(cls: type[Config], parents: Sequence[int | str]) -> list[str]:
    for name in parents:
        field = cls.model_fields.get(str(name))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Config)):
            return []
        cls = field.annotation
    prefix = "".join(f"{name}." for name in parents)
    return [prefix + name for name in cls.model_fields]
