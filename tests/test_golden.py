"""A refactor changes no result: outputs of today against those stored in tests/golden/values (written by golden/write.py)."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from golden.digest import EXACT, Count, differences, digest
from golden.store import CASES, FOLDER, moved, path

import rrepa_lab as rl

SHOWN = 12


@pytest.mark.parametrize("case", CASES)
def test_nothing_moved(case):
    lines = moved(case)
    more = f"\n... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    assert not lines, f"{len(lines)} values of {case!r} moved:\n" + "\n".join(lines[:SHOWN]) + more


def test_stored_values_are_small_and_belong_to_a_case():
    assert set(FOLDER.glob("*.json")) == {path(case) for case in CASES}
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2**20


def test_every_public_function_is_called():
    sources = "".join(file.read_text() for file in Path(FOLDER).parent.glob("*.py"))
    functions = [name for name in rl.__all__ if not isinstance(getattr(rl, name), type)]
    assert [name for name in functions if f"rl.{name}(" not in sources] == []


def test_one_number_of_a_large_array_is_noticed():
    before = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[7, 7] += 1e-5
    assert differences(digest({"x": before}), digest({"x": before * (1 + 1e-10)}), EXACT) == []
    lines = differences(digest({"x": before}), digest({"x": after}), EXACT)
    assert sum(line.startswith("x along[") for line in lines) >= 8
    assert differences(digest({"x": before}), digest({"x": before.flip(0)}), EXACT)
    assert "x shape: from [20, 30] to [30, 20]" in differences(digest({"x": before}), digest({"x": before.T}), EXACT)


def test_what_a_message_says():
    old, new = digest({"a": {"b": [1.0, 2.0]}, "gone": 1.0}), digest({"a": {"b": [1.0, 2.5]}, "new": 1.0})
    assert differences(old, new, EXACT) == [
        "gone: stored, but no longer computed",
        "a/b numbers[1]: from 2.0 to 2.5, by 0.5, 2e-08 is allowed",
        "new: computed, but not stored",
    ]


def test_tables_by_column():
    table = pd.DataFrame({"tap": ["a", "a", "b"], "value": [1.0, math.nan, 3.0]})
    stored = digest({"t": table})
    assert list(stored) == ["t/rows", "t/tap", "t/value"]
    assert differences(stored, digest({"t": table.replace({"a": "first", "b": "second"})}), EXACT) == []
    assert differences(stored, digest({"t": table.assign(tap=["a", "b", "b"])}), EXACT)
    assert differences(stored, digest({"t": table.fillna(0.0)}), EXACT)


def test_one_image_may_change_sides():
    stored = digest({"accuracy": Count(50, 60)})
    assert differences(stored, digest({"accuracy": Count(51, 60)}), EXACT) == []
    assert differences(stored, digest({"accuracy": Count(52, 60)}), EXACT) == [
        "accuracy: from 50 of 60 to 52 of 60 images, 1 may differ"
    ]
