"""The schema of the tidy tables: one row a measurement, every column by one name, of one type, with one meaning.

A column says which run was measured, where, what was found, or under which protocol. Tables of different instruments can be
concatenated; two rows are comparable where their protocol columns agree.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd

from rrepa_lab.errors import LabError, unknown

Kind = Literal["text", "integer", "number", "flag"]
Role = Literal["run", "place", "found", "protocol", "item"]


class Column(NamedTuple):
    """A column of a table."""

    kind: Kind
    role: Role  # run: which run; place: where in the flow; found: a measurement; protocol: how; item: which image, class or bin
    meaning: str


def _columns(role: Role, **columns: tuple[Kind, str]) -> dict[str, Column]:
    return {name.rstrip("_"): Column(kind, role, meaning) for name, (kind, meaning) in columns.items()}


COLUMNS: dict[str, Column] = (
    _columns(
        "run",
        run=("text", "name of the run"), strategy=("text", "align.strategy"), train_seed=("integer", "train.seed"),
        data=("text", "the data set a run was trained on, with the fingerprint of its training images where the run has it"),
        encoder=("text", "encoder of the alignment, or of a row of tap encoder: weights, what these were trained on"),
        space=("text", "what the flow models: pixels, or a kind of latents with the shape and a fingerprint"),
        weight=("number", "lambda"), source=("text", "folder or file a measurement comes from"),
    )
    | _columns(
        "place",
        tap=("text", "address of a state, or pixels, encoder, or nothing"), block=("integer", "from 1; 0 for all or none"),
        layer=("integer", "from 1; 0 for a block's tokens"), module_path=("text", "in PyTorch's own counting from 0"),
        group=("text", "of parameters"), parameters=("integer", "how many numbers a group holds"),
    )
    | _columns(
        "found",
        metric=("text", "see measurements.metrics"), value=("number", "in `unit`"), unit=("text", "of value"),
        standard_error=("number", "over images"), n=("integer", "images, samples or pairs the value is taken over"),
        sd=("number", "sample standard deviation over training seeds"), seeds=("integer", "training seeds"),
        train_seeds=("integer", "training seeds"), floor=("number", "value reached without the image"),
        above_floor=("number", "value - floor"), floor_of=("text", "what the floor's constants depend on"),
        best_tap=("text", "the layer that was best on the images it was chosen on"),
        gap=("number", "largest difference of a state between the directions"), spread=("number", "sd of a state"),
        relative_gap=("number", "gap / spread"), round_trip_error=("number", "largest, of the images"),
        gradient_norm=("number", "of the alignment loss in a group"), cosine=("number", "between two vectors"),
        cosine_with_exact=("number", "of a gradient with that of reverse-exact"),
        relative_error=("number", "distance from the exact gradient by its norm"),
        explained=("number", "part of the variance on the axes"), c1=("number", "coordinate"), c2=("number", "coordinate"),
        c3=("number", "coordinate"), seconds=("number", "median"), fastest=("number", "seconds"), slowest=("number", "seconds"),
        ratio=("number", "of times in one round, median"), error=("number", "largest difference of a pixel"),
        seconds_per_image=("number", "median"), interval=("text", "of low and high: over what, and how"),
        chosen=("flag", "by the rule of the function"),
        sigma_max=("number", "largest singular value of dz/dx"), sigma_min=("number", "smallest singular value of dz/dx"),
        condition=("number", "sigma_max / sigma_min"), logdet=("number", "log |det dz/dx|, nats"),
        dims=("integer", "numbers of an image, the rows of dz/dx"),
    )
    | _columns(
        "protocol",
        split=("text", "train, val, test, or what was given"), direction=("text", "forward or reverse"),
        label_fed=("text", "own or none"), guidance=("number", "weight"), annealed=("flag", "guidance"),
        temperature=("number", "of guidance"), n_noise_samples=("integer", "on images, averaged over"),
        noise_std=("number", "sigma on images; nan for uniform noise"), pool=("text", "mean or all"),
        probe=("text", "what was fitted"), n_train=("integer", "images it was fitted on"), other=("text", "compared with"),
        other_tap=("text", "of the other"), neighbours=("integer", "k"), method=("text", "of the function"),
        blocks=("text", "that were given the label"), steps=("integer", "of gradient ascent"), step_size=("number", "of it"),
        refinements=("integer", "Jacobi steps"), batch=("integer", "images in a batch"), seed=("integer", "of the measurement"),
        denoise=("flag", "last step of sampling"), strength=("number", "of it"), finish=("text", "what it was"),
        network=("text", "whose features are compared: weights, what these were trained on"),
        network_sha256=("text", "its first 16 hex digits, of the weights, of an encoder with the preprocessing"),
        reference=("text", "what samples are compared with"), reference_sha256=("text", "of its pictures, or of the file"),
        n_reference=("integer", "pictures of it; 0 where a file does not say it"), features=("integer", "numbers of a feature"),
        labels=("text", "of the samples: in turn, at random"), resize=("text", "of pictures to the size of the network"),
        bytes=("text", "how floats become bytes: rounded, truncated, none"), decoding=("text", "method that inverts the flow"),
        dtype=("text", "of the weights, of moments"), device=("text", "cpu, cuda:0"), protocol=("text", "the rest, in words"),
    )
    | _columns(
        "item",
        image=("integer", "row of an image or seed of a sample"), label=("text", "class"), class_=("text", "true class"),
        predicted=("text", "class"), runner_up=("text", "class"), right=("flag", "predicted is class"),
        margin=("number", "best score minus second best"), confidence=("number", "probability of the prediction"),
        accuracy=("number", "of a class or bin"), count=("integer", "images"), low=("number", "of a bin or an interval"),
        high=("number", "of a bin or an interval"), query=("integer", "row"), rank=("integer", "from 1"),
        gain_of=("text", "split"), curvature_of=("text", "split"), effect=("text", "exchange"), kind=("text", "of a curve"),
    )
)  # fmt: skip


def check(table: pd.DataFrame) -> pd.DataFrame:
    """The table itself; LabError for a column that is not in COLUMNS or of another type.

    Example:
        >>> check(pd.DataFrame({"metric": ["cka"], "value": [0.5], "n": [360]})).shape
        (1, 3)
    """
    for name in table.columns:
        if name not in COLUMNS:
            raise unknown("column of a table", name, COLUMNS)
        if not _is(COLUMNS[name].kind, table[name]):
            raise LabError(f"column {name} is {table[name].dtype}, and should hold {COLUMNS[name].kind}s")
    return table


def arrange(table: pd.DataFrame, first: Sequence[str]) -> pd.DataFrame:
    """The columns of COLUMNS that a table has, `first` in front; a text that a row does not have is empty.

    Example:
        >>> rows = [{"value": 1.0, "metric": "cka"}, {"value": 2.0, "metric": "cka", "unit": "nats"}]
        >>> table = arrange(pd.DataFrame(rows), ["metric"])
        >>> table.columns.tolist(), table.unit.tolist()
        (['metric', 'value', 'unit'], ['', 'nats'])
    """
    front = [name for name in first if name in table]
    table = table[[*front, *(name for name in COLUMNS if name in table and name not in front)]]
    texts = [str(name) for name in table if COLUMNS[str(name)].kind == "text"]
    return table.assign(**{name: table[name].fillna("") for name in texts})


def _is(kind: Kind, values: "pd.Series[Any]") -> bool:
    types = pd.api.types
    if kind == "number":
        return types.is_numeric_dtype(values) and not types.is_bool_dtype(values)
    if kind == "integer":  # a column with gaps is float
        return types.is_integer_dtype(values) or (types.is_float_dtype(values) and bool((values.dropna() % 1 == 0).all()))
    return types.is_bool_dtype(values) if kind == "flag" else not types.is_numeric_dtype(values)
