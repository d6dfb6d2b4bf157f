"""A refactor changes no result: outputs of today against those stored in tests/golden/values (written by golden/write.py)."""

import pytest
from golden.store import CASES, FOLDER, moved, path

SHOWN = 12


@pytest.mark.parametrize("case", CASES)
def test_nothing_moved(case):
    lines = moved(case)
    more = f"\n... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    assert not lines, f"{len(lines)} values of {case!r} moved:\n" + "\n".join(lines[:SHOWN]) + more


def test_stored_values_are_small_and_belong_to_a_case():
    assert set(FOLDER.glob("*.json")) == {path(case) for case in CASES}
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2**20
