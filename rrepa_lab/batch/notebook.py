"""A parameterized notebook read without running it: its parameters with their types, and what identifies its code."""

import ast
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from pydantic import TypeAdapter

from rrepa_lab import __version__
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.paths import bundled
from rrepa_lab.readers import MIB, check_file
from rrepa_lab.values import finite, read_value

if TYPE_CHECKING:
    from nbformat import NotebookNode

OUT_DIR = "out_dir"  # the parameter through which a batch tells a notebook where to write
# parameters that say where files are on this machine: unless they are an axis of the grid, no part of what a cell is
PLACES = ("data_path", "space_weights")
_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict, "None": None}
LONGEST_TYPE = 200
LARGEST_NOTEBOOK = 256 * MIB
KERNEL = "python3"  # the kernel of the Python that runs the batch, for a notebook that names none


class Parameter(NamedTuple):
    """A line of the parameters cell: `name: kind = default  # help`."""

    name: str
    kind: str
    default: Any
    help: str

    def check(self, value: Any) -> Any:
        """The value, between int and float converted where that is exact; LabError for another type, NaN and infinity."""
        try:
            if not finite(value):
                raise ValueError
            return TypeAdapter(parse_type(self.kind)).validate_python(_exact(value, self.kind), strict=True)
        except (ValueError, RecursionError):  # also ValidationError
            raise LabError(f"{self.name} takes {self.kind} ({self.help}), not {_shown(value)}") from None

    def parse(self, text: str) -> Any:
        """A value typed on the command line: as it stands for a str, else a number, boolean, none or list; see `read_value`."""
        return text if self.kind == "str" else self.check(read_value(text))


def _exact(value: Any, kind: str) -> Any:
    """1e3 as an integer where no float is wanted; also inside lists and objects."""
    if isinstance(value, float) and value.is_integer() and "float" not in kind:
        return int(value)
    if isinstance(value, list):
        return [_exact(one, kind) for one in value]
    return {key: _exact(one, kind) for key, one in value.items()} if isinstance(value, dict) else value


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else " ".join(json.dumps(value, default=repr).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


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
    kernel: str = KERNEL

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
        """Hash of code, parameters and package version: two runs with the same key would do the same.

        Args:
            values: the parameters that count, see `study.cells`.
        """
        about = [__version__, self.name, self.code, sorted(values.items())]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def find_notebook(name: str | Path, beside: Path | None = None) -> Path:
    """A notebook by its path, from here or from the folder `beside`, or by the bundled one's name; LabError if none."""
    text = str(name)
    places = [Path(text), *([beside / text] if beside else []), bundled("notebooks") / f"{text.removesuffix('.ipynb')}.ipynb"]
    for path in places:
        with suppress(OSError, ValueError):  # a name too long, a null byte
            if path.is_file():
                return path
    raise unknown("notebook", text, sorted(path.stem for path in bundled("notebooks").glob("*.ipynb")))


def read_notebook(path: Path) -> Notebook:
    """Read a notebook; LabError if it is none, its kernel is not installed, or its parameters cell is missing or incomplete."""
    from papermill.translators import PythonTranslator

    node = open_notebook(path)
    tagged = [cell for cell in node.cells if "parameters" in cell.metadata.get("tags", [])]
    if not tagged:
        raise LabError(f"{path} has no cell tagged 'parameters', so nothing of it can be varied: tag the one with its settings")
    kernel = _kernel(path, node)
    try:
        inspected = [one._asdict() for one in PythonTranslator.inspect(tagged[0])]
    except Exception as error:
        raise LabError(f"{path}: the cell tagged 'parameters' cannot be read ({type(error).__name__})") from None
    parameters = {one["name"]: _parameter(path, one) for one in inspected}
    if OUT_DIR not in parameters:
        raise LabError(f"{path} has no parameter {OUT_DIR}: str, through which a batch tells it where to write")
    return Notebook(path, parameters, [cell.source for cell in node.cells if cell.cell_type == "code"], kernel)


def open_notebook(path: Path) -> "NotebookNode":
    """The cells of a notebook, with the kernel of this Python where it names none; LabError if it is no notebook."""
    import nbformat

    check_file(path, LARGEST_NOTEBOOK)
    try:
        node = nbformat.read(path, as_version=4)
        about = node.metadata.setdefault("kernelspec", nbformat.NotebookNode())
        about.setdefault("name", KERNEL)
        about.setdefault("display_name", about["name"])
        about.setdefault("language", node.metadata.get("language_info", {}).get("name", "python"))
        for cell in node.cells:
            texts = isinstance(cell.cell_type, str) and isinstance(cell.source, str)
            if not texts or not isinstance(cell.metadata.get("tags", []), list):
                raise TypeError
    except Exception as error:  # nbformat raises many kinds
        raise LabError(f"{path} is not a notebook ({type(error).__name__})") from None
    return node


def _kernel(path: Path, node: "NotebookNode") -> str:
    """Name of the installed kernel that runs the notebook."""
    from jupyter_client.kernelspec import KernelSpecManager

    name, language = str(node.metadata.kernelspec["name"]), str(node.metadata.kernelspec["language"])
    if language.lower() not in ("python", "ipython"):
        raise LabError(f"{path} is written in {language}: a batch runs Python notebooks")
    installed = sorted(KernelSpecManager().find_kernel_specs())
    if name not in installed:
        raise LabError(
            f"{path} needs the kernel {name!r}, and installed are {', '.join(installed)}: "
            f"choose one of these in Jupyter (Kernel, Change Kernel) and save the notebook"
        )
    return name


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
