"""What a batch is to do: a notebook, a grid of its parameters, and the claims that its table is held against.

On the command line, or as a YAML file:

    notebook: 03_alignment_strategies
    parameters: {quick: false}
    grid:
      - {strategy: [none], seed: 0..2}
      - {strategy: [forward, reverse], align_blocks: [[1, 2], [3, 4]], seed: 0..2}
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, field_validator

from rrepa_lab.batch.notebook import PLACES, Notebook, Parameter, find_notebook, read_notebook
from rrepa_lab.config import Config
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.paper import paper_tables, published_table
from rrepa_lab.measurements.claims import Claim
from rrepa_lab.paths import assets
from rrepa_lab.readers import MissingFileError, read_table, read_yaml
from rrepa_lab.values import number_range, read_value

if TYPE_CHECKING:
    import pandas as pd

MOST_CELLS = 10_000  # of a grid
Axis = list[Any] | str | int | float | bool


class Study(Config):
    """A batch, as a file."""

    notebook: str = Field(description="bundled name, or path from the study file or from here")
    parameters: dict[str, Any] = Field({}, description="the same for every cell of the grid")
    grid: list[dict[str, Axis]] = Field([{}], description="products of values; a list of them is put together")
    timeout: float | None = Field(None, gt=0, description="seconds that one run of the notebook may take")
    title: str = ""
    notes: str = Field("", description="protocol and remarks, for the report")
    beside: str = Field(
        "", description="a published table (paper-table-1) or a CSV file from here, shown beside the study's own"
    )
    beside_title: str = ""
    measured: str = Field(
        "", description="a CSV file beside the study file of what was measured in earlier sessions; see `batch.measured`"
    )
    also: list[str] = Field(
        [], description="study files beside this one whose measurements its claims may use too: settings measured there"
    )
    claims: list[Claim] = Field([], description="what the table is held against")

    @field_validator("grid", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, Mapping) else value


class GridCell(NamedTuple):
    """One point of the grid."""

    name: str  # "strategy=reverse,seed=0", the parameters that were given to it
    parameters: dict[str, Any]  # all but out_dir
    key: str  # see Notebook.key
    given: Mapping[str, Any] = {}  # those that the study gives and that count, without defaults of the notebook

    @property
    def folder(self) -> str:
        """Where it is kept: the name, and a hash of the parameters; an edited notebook finds its trainings again."""
        text = re.sub(r"[^A-Za-z0-9.=,-]+", "-", self.name)[:100]
        counted = {name: value for name, value in self.parameters.items() if name in self.given or name not in PLACES}
        return f"{text}-{hashlib.sha256(json.dumps(sorted(counted.items())).encode()).hexdigest()[:8]}"

    @property
    def identity(self) -> str:
        """The parameters that were given, as JSON: what a stored measurement is matched by.

        Neither the code of the notebook nor its defaults enter: a notebook with other text has the same cells.
        """
        return json.dumps(self.given, sort_keys=True, separators=(",", ":"))


def beside_table(study: Study) -> "pd.DataFrame":
    """The table that a study names to be shown beside its own, as text; LabError where it names none."""
    if not study.beside:
        raise LabError(f"study {study.title!r} names no table beside its own")
    return published_table(study.beside) if study.beside in paper_tables() else read_table(Path(study.beside), dtype=str)


def load_study(source: str | Path) -> tuple[Study, Notebook]:
    """A study from a YAML file (or the name of a bundled one, assets/studies/<name>.yaml), with its notebook.

    Raises: LabError for what is no study: unknown keys, a missing notebook, a file that is not YAML.
    """
    path = Path(source)
    if not path.is_file() and (assets() / "studies" / f"{source}.yaml").is_file():
        path = assets() / "studies" / f"{source}.yaml"
    try:
        values = read_yaml(path)
    except MissingFileError:
        raise LabError(f"no study at {path}") from None
    try:
        study = Study.from_dict(values)
    except LabError as error:
        raise LabError(f"{path}: {error}") from None
    if study.beside and study.beside not in paper_tables():
        if not (path.parent / study.beside).is_file():
            raise LabError(f"{path}: beside names {study.beside}, which is not there")
        study = study.model_copy(update={"beside": str((path.parent / study.beside).resolve())})
    for name in study.also:
        if not (path.parent / name).is_file():
            raise LabError(f"{path}: also names {name}, which is not there")
    if study.also:
        study = study.model_copy(update={"also": [str((path.parent / name).resolve()) for name in study.also]})
    if study.measured:  # it need not be there yet
        study = study.model_copy(update={"measured": str((path.parent / study.measured).resolve())})
    return study, read_notebook(find_notebook(study.notebook, path.parent))


def parse_grid(notebook: Notebook, texts: Iterable[str]) -> dict[str, list[Any]]:
    """Axes from "seed=0..2", "strategy=none,reverse" and "align_blocks=[[1,2],[3,4]]"."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, sign, values = text.partition("=")
        if not sign or not values:
            raise LabError(f"--grid takes NAME=VALUES, for example seed=0..2, not {text!r}")
        if name in grid:
            raise LabError(f"--grid {name} is given twice: put its values together, {name}=a,b")
        grid[name] = axis(notebook.parameter(name), values)
    return grid


def axis(parameter: Parameter, values: Axis) -> list[Any]:
    """The values of one axis: a list of them, one alone, or text as it is typed after --grid NAME=."""
    if isinstance(values, str):
        values = _read(parameter, values)
    if not isinstance(values, list):
        values = [values]
    if not values:
        raise LabError(f"the grid has no value for {parameter.name}")
    try:
        return [parameter.check(value) for value in values]
    except LabError as error:
        nested = parameter.kind.startswith("list") and not any(isinstance(value, list) for value in values)
        raise LabError(
            f"{error}; an axis of lists is a list of lists: {parameter.name}=[{values}]" if nested else str(error)
        ) from None


def _read(parameter: Parameter, text: str) -> list[Any]:
    if text.startswith("["):
        values = read_value(text)
        if not isinstance(values, list):
            raise LabError(f"{parameter.name}={text} is not a list")
        return values
    values = []
    for part in text.split(","):
        if ".." in part and parameter.kind == "int":
            try:
                values += number_range(part, parameter.name)
            except LabError:
                raise
            except ValueError:
                raise LabError(f"{parameter.name} takes integers such as 0..2, not {part!r}") from None
        else:
            values.append(parameter.parse(part.strip()))
    return values


def cells(study: Study, notebook: Notebook) -> list[GridCell]:
    """Every point of the grid once, in the order given.

    Raises: LabError if the grid and the parameters disagree, or it has more than 10,000 points.
    """
    grids = []
    for part in study.grid or [{}]:
        for name in part:
            if name in study.parameters:
                raise LabError(f"{name} stands in both grid and parameters: leave it out of one")
        grids.append({name: axis(notebook.parameter(name), values) for name, values in part.items()})
    count = sum(math.prod(map(len, axes.values())) for axes in grids)
    if count > MOST_CELLS:
        raise LabError(f"the grid has {count:,} cells, and a batch at most {MOST_CELLS:,}: give it fewer values")
    found: dict[str, GridCell] = {}
    for axes in grids:
        for point in product(*axes.values()):
            given = dict(zip(axes, point, strict=True))
            parameters = notebook.check(study.parameters | given)
            elsewhere = [name for name in PLACES if name not in given]
            counted = {name: value for name, value in parameters.items() if name not in elsewhere}
            key = notebook.key(counted)
            name = ",".join(f"{one}={value}".replace(" ", "") for one, value in given.items())
            chosen = {one: value for one, value in counted.items() if one in study.parameters or one in given}
            found.setdefault(key, GridCell(name or notebook.name, parameters, key, chosen))
    return list(found.values())
