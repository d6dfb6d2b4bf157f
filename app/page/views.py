"""A tab's view as a value: what the sidebar and the controls of a tab say, by name, and its form in links.

Each tab declares a frozen dataclass that extends `View` by one field for each of its controls. The names of the fields
connect everything else: a control is filed under the name of its field, drawings and code take the whole view, and a link
has one parameter for each field.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any, TypeVar, get_origin
from urllib.parse import urlencode

import gradio as gr
from gradio.components import Component
from server.runs import DEFAULT_OTHER, DEFAULT_RUN, NO_RUN
from server.settings import LARGEST_SEED

from rrepa_lab.errors import LabError

NO_OTHER = "nothing"  # the value of `compare` in links where no second run is shown
LINK = "link"  # key of the metadata of a field


class SeedError(LabError):
    """The seed of the sidebar is missing or out of range. `panels.describing` reports it once for the open tab."""


@dataclass(frozen=True)
class View:
    """The values of the sidebar; the view of a tab adds its controls.

    Fields have a default and one of the types str, int, float, bool and tuple[str, ...]; fields that only handlers write
    may have any type. The parameter of a link is called like the field, with "-" for "_"; see `linked_as` and UNLINKED.
    """

    run: str = DEFAULT_RUN
    other: str = DEFAULT_OTHER  # NO_RUN for none
    seed: int = 0  # in [0, LARGEST_SEED]


V = TypeVar("V", bound=View)
UNLINKED: dict[str, Any] = {LINK: None}  # metadata of a field that links leave out: handlers write it, not a visitor


def linked_as(parameter: str) -> dict[str, Any]:
    """Metadata of a field whose parameter in links has another name, because links of earlier versions are kept."""
    return {LINK: parameter}


def own_fields(view: type[View]) -> dict[str, Field[Any]]:
    """The fields that a tab's view adds to the sidebar, by name."""
    shared = {one.name for one in fields(View)}
    return {one.name: one for one in fields(view) if one.name not in shared}


def link_parameters(view: type[View]) -> dict[str, str]:
    """Parameter in links -> name of the field, for a tab's own fields."""
    names = {name: one.metadata.get(LINK, name.replace("_", "-")) for name, one in own_fields(view).items()}
    return {parameter: name for name, parameter in names.items() if parameter is not None}


def make_view(view: type[V], values: Mapping[str, Any]) -> V:
    """A view from the values of components, by name of the field; fields without a value have their default.

    Raises: SeedError for a seed that is empty or out of range.
    """
    given = {one.name: _converted(one, values[one.name]) for one in fields(view) if one.name in values}
    return view(**given)


def _converted(one: Field[Any], value: Any) -> Any:
    """The value with the type of its field; the default for an emptied control."""
    if one.name == "seed":
        return checked_seed(value)
    if one.name == "other":
        return value or NO_RUN
    if value is None:
        return one.default
    if one.type in (int, float):
        return one.type(value)
    return tuple(value) if get_origin(one.type) is tuple and isinstance(value, list) else value


def checked_seed(seed: float | None) -> int:
    """The seed of the sidebar; SeedError if its field is empty or out of range."""
    if seed is None:
        raise SeedError("the seed is empty: give a whole number from 0 on")
    if not 0 <= seed <= LARGEST_SEED:
        raise SeedError(f"the seed must be a whole number from 0 to {LARGEST_SEED}, not {seed:g}")
    return int(seed)


# --- links ------------------------------------------------------------------------------------------------------------


def query_of(tab: str, view: View) -> str:
    """The query of the link to a view, "?tab=...&run=...&compare=...&seed=..." and a parameter for each control."""
    shared = {"tab": tab, "run": view.run, "compare": view.other or NO_OTHER, "seed": view.seed}
    own = {parameter: to_text(getattr(view, name)) for parameter, name in link_parameters(type(view)).items()}
    return f"?{urlencode(shared | own)}"


def to_text(value: Any) -> str:
    """A value as a link has it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "|".join(map(str, value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def from_text(control: Component, text: str) -> Any:
    """The value of a control from a link; ValueError if the text has the wrong type. See `check` for its range."""
    if isinstance(control, gr.Checkbox):
        if text not in ("yes", "no"):
            raise ValueError(text)
        return text == "yes"
    if isinstance(control, gr.Slider | gr.Number):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(text)
        return int(value) if value.is_integer() else value
    if isinstance(control, gr.CheckboxGroup) or getattr(control, "multiselect", False):
        return text.split("|") if text else []
    return text


def check(control: Component, value: Any) -> None:
    """ValueError or gr.Error if a visitor could not have set this value."""
    control.preprocess(value)
