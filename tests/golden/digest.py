"""Outputs as a few plain JSON numbers, and the comparison of those of today with the stored ones.

A large array is kept as its shape, norm, sum and 16 products with fixed random vectors of length 1: whatever number of it
changes, these change too. A table is kept column by column; a column of text by which rows share a text, so that other words
change nothing while other rows do.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

SMALL = 16  # numbers of an array that is kept as it is
DIRECTIONS = 16  # of the random vectors that a larger one is multiplied with
STORED_NAMES: dict[str, str] = {
    "n_noise_samples": "draws"
}  # columns that were renamed: name today -> name in the stored values

ADDED = {"data", "space"}  # columns that came later, of one value in all of these tables


class Tolerance(NamedTuple):
    """How far a number may be from the stored one: by atol + rtol * its size (of a large array: see `_size`)."""

    rtol: float
    atol: float


# Float64 from end to end. Another processor or BLAS sums in another order, which moves the 13th digit; a mistake moves more.
EXACT = Tolerance(1e-8, 1e-10)
# Float64 of float32 inputs: features of the teacher, initial weights, noise of `rl.sample`; they differ in the 7th digit.
MIXED = Tolerance(1e-5, 1e-6)
# Float32 from end to end.
SINGLE = Tolerance(1e-4, 1e-5)
# Ten optimizer steps in float32: rounding of one step enters the weights of the next.
TRAINED = Tolerance(2e-4, 1e-5)


class Count(NamedTuple):
    """Images that were classified correctly: one at the boundary between two classes may change sides by rounding."""

    right: int
    of: int


def digest(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Nested mappings of arrays, tables, numbers and text as a flat mapping: name -> plain JSON values."""
    return {name: _entry(value) for name, value in _flat(values, "")}


def differences(stored: Mapping[str, dict[str, Any]], found: Mapping[str, dict[str, Any]], tolerance: Tolerance) -> list[str]:
    """One line for each value that moved, appeared or is gone: its name, from what, to what, and by how much it may."""
    lines = [f"{name}: stored, but no longer computed" for name in stored if name not in found]
    for name, entry in found.items():
        if name not in stored:
            lines.append(f"{name}: computed, but not stored")
        else:
            lines += [f"{name}{line}" for line in _moved(stored[name], entry, tolerance)]
    return lines


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, pd.DataFrame):
        yield f"{name}/rows", len(value)
        value = {STORED_NAMES.get(str(column), str(column)): value[column] for column in value if column not in ADDED}
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name}/{key}" if name else str(key))
    else:
        yield name, value


def _entry(value: Any) -> dict[str, Any]:
    if isinstance(value, Count):
        return {"right": value.right, "of": value.of}
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, pd.Series) and not pd.api.types.is_numeric_dtype(value):
        value = pd.factorize(value, use_na_sentinel=False)[0]  # the first text is 0, the next new one 1, ...
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    array = np.asarray(value, dtype=np.float64)
    entry: dict[str, Any] = {"shape": list(array.shape)}
    if array.size <= SMALL:
        return entry | {"numbers": [_plain(number) for number in array.flatten()]}
    missing = np.isnan(array)
    if missing.any():  # nothing to multiply with: their places are part of the values
        entry["missing"] = [int(place) for place in missing.flatten().nonzero()[0]]
    array = np.nan_to_num(array.flatten(), nan=0.0)
    vectors = np.random.default_rng(array.size).standard_normal((DIRECTIONS, array.size))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    along = [_plain(number) for number in vectors @ array]
    return entry | {"norm": _plain(float(np.linalg.norm(array))), "sum": _plain(float(array.sum())), "along": along}


def _plain(number: float) -> float | None:
    """12 digits, more than any tolerance; None for nan, which JSON does not have."""
    return None if math.isnan(number) else float(f"{number:.12g}")


def _moved(stored: dict[str, Any], found: dict[str, Any], tolerance: Tolerance) -> Iterator[str]:
    if "right" in stored and "right" in found:
        if stored["of"] != found["of"] or abs(stored["right"] - found["right"]) > 1:
            yield f": from {stored['right']} of {stored['of']} to {found['right']} of {found['of']} images, 1 may differ"
        return
    for part in sorted(stored.keys() | found.keys()):
        old, new = stored.get(part), found.get(part)
        if part in ("numbers", "along") and old and new and len(old) == len(new):
            for place, (before, after) in enumerate(zip(old, new, strict=True)):
                line = _number_moved(before, after, tolerance.atol + tolerance.rtol * _size(part, before, found))
                yield from (f" {part}[{place}]{text}" for text in line)
        elif part in ("norm", "sum") and isinstance(old, float) and isinstance(new, float):
            line = _number_moved(old, new, tolerance.atol + tolerance.rtol * _size(part, old, found))
            yield from (f" {part}{text}" for text in line)
        elif old != new:
            yield f" {part}: from {old!r} to {new!r}"


def _number_moved(before: float | None, after: float | None, allowed: float) -> list[str]:
    """Nothing, or one text."""
    if before is None or after is None:
        return [] if before is after else [f": from {before!r} to {after!r}"]
    by = after - before
    return [] if abs(by) <= allowed else [f": from {before!r} to {after!r}, by {by:.2g}, {allowed:.2g} is allowed"]


def _size(part: str, before: float | None, entry: dict[str, Any]) -> float:
    """What rtol multiplies.

    If each number of an array moves by rtol of their root mean square r, its norm moves by at most rtol times the norm, its sum
    by at most rtol * n * r, and the product with a random vector of length 1 by about rtol * r.
    """
    if part == "numbers":
        return abs(before or 0.0)
    root = math.sqrt(math.prod(entry["shape"]))
    return float(entry["norm"]) * {"norm": 1.0, "sum": root, "along": 1 / root}[part]
