"""A parameterized notebook read without running it: its parameters with their types, and what identifies its code."""

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Union

from pydantic import TypeAdapter, ValidationError

from rrepa_lab import __version__
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.places import bundled

OUT_DIR = "out_dir"  # the parameter through which a batch tells a notebook where to write
_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict, "None": None}
LONGEST_TYPE = 200


class Parameter(NamedTuple):
    """A line of the parameters cell: `name: kind = default  # help`."""

    name: str
    kind: str
    default: Any
    help: str

    def check(self, value: Any) -> Any:
        """The value, whole numbers as float where a float is wanted; LabError if it is of another type."""
        try:
            return TypeAdapter(parse_type(self.kind)).validate_python(value, strict=True)
        except ValidationError:
            raise LabError(f"{self.name} takes {self.kind} ({self.help}), not {json.dumps(value)}") from None

    def parse(self, text: str) -> Any:
        """A value typed on the command line: as it stands for a str, else JSON."""
        if self.kind == "str":
            return text
        try:
            return self.check(json.loads(text))
        except ValueError:
            raise LabError(f"{self.name} takes {self.kind} ({self.help}), not {text!r}") from None


def parse_type(text: str) -> Any:
    """A type from its name: str, int, float, bool, list, dict, None, unions of them, and list[...] and dict[...].

    The text of a notebook is parsed and looked up in a table; nothing of it is evaluated. Raises: ValueError for all else.
    """
    if len(text) > LONGEST_TYPE:
        raise ValueError(f"a type of {len(text)} characters")
    return _type_of(ast.parse(text.strip(), mode="eval").body)


def _type_of(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name) if name in _TYPES:
            return _TYPES[name]
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_type_of(left), _type_of(right)]  # noqa: UP007
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return list[_type_of(item)]  # type: ignore[misc]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, item])):
            return dict[_type_of(key), _type_of(item)]  # type: ignore[misc]
    raise ValueError(f"{ast.unparse(node)} is not among {', '.join(_TYPES)}")


@dataclass(frozen=True)
class Notebook:
    """A notebook with its parameters by name; `code` is the source of its code cells, in order."""

    path: Path
    parameters: dict[str, Parameter]
    code: list[str]

    @property
    def name(self) -> str:
        """The file's name without .ipynb."""
        return self.path.stem

    def parameter(self, name: str) -> Parameter:
        """By name; LabError for one it does not have, or that a batch sets itself."""
        if name == OUT_DIR:
            raise LabError(f"{OUT_DIR} is chosen by the batch for every cell of the grid: leave it out")
        if name not in self.parameters:
            raise unknown(f"parameter of {self.name}", name, [known for known in self.parameters if known != OUT_DIR])
        return self.parameters[name]

    def check(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters but out_dir, defaults filled in; LabError for a misspelt name or a value of another type."""
        given = {name: self.parameter(name).check(value) for name, value in values.items()}
        defaults = {name: parameter.default for name, parameter in self.parameters.items() if name != OUT_DIR}
        return defaults | given

    def key(self, values: Mapping[str, Any]) -> str:
        """Hash of code, parameters and package version: two runs with the same key would do the same."""
        about = [__version__, self.name, self.code, sorted(values.items())]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def find_notebook(name: str | Path, beside: Path | None = None) -> Path:
    """A notebook by its path, from here or from the folder `beside`, or by the bundled one's name; LabError if none."""
    text = str(name)
    places = [Path(text), *([beside / text] if beside else []), bundled("notebooks") / f"{text.removesuffix('.ipynb')}.ipynb"]
    for path in places:
        if path.is_file():
            return path
    raise unknown("notebook", text, sorted(path.stem for path in bundled("notebooks").glob("*.ipynb")))


def read_notebook(path: Path) -> Notebook:
    """Read a notebook; LabError if it is none, or its parameters cell is missing or says too little."""
    import nbformat
    import papermill

    try:
        cells = nbformat.read(path, as_version=4).cells
    except FileNotFoundError:
        raise LabError(f"no notebook at {path}") from None
    except Exception as error:
        raise LabError(f"{path} is not a notebook ({type(error).__name__})") from None
    if not any("parameters" in cell.metadata.get("tags", []) for cell in cells):
        raise LabError(f"{path} has no cell tagged 'parameters', so nothing of it can be varied: tag the one with its settings")
    inspected = papermill.inspect_notebook(str(path)).values()
    parameters = {one["name"]: _parameter(path, one) for one in inspected}
    if OUT_DIR not in parameters:
        raise LabError(f"{path} has no parameter {OUT_DIR}: str, through which a batch tells it where to write")
    return Notebook(path, parameters, [cell.source for cell in cells if cell.cell_type == "code"])


def _parameter(path: Path, inspected: Mapping[str, str]) -> Parameter:
    name, kind = inspected["name"], inspected["inferred_type_name"]
    try:
        TypeAdapter(parse_type(kind))
        default = ast.literal_eval(inspected["default"])
    except Exception:
        line = f"{name}: int = 0  # what it is"
        raise LabError(
            f"{path}: parameter {name} needs a type ({', '.join(_TYPES)}) and a plain default, as in {line!r}"
        ) from None
    if kind == "None":
        raise LabError(f"{path}: parameter {name} has no type: write {name}: {type(default).__name__} = {default!r}")
    return Parameter(name, kind, default, inspected["help"])
