"""Where the stored values are, and how those of today are computed."""

import json
from pathlib import Path
from typing import Any

import torch

from golden import functions, trained
from golden.digest import differences, digest

CASES = functions.CASES | trained.CASES
FOLDER = Path(__file__).parent / "values"


def path(case: str) -> Path:
    """The file of a case."""
    return FOLDER / f"{case.replace(', ', '-').replace(' ', '-')}.json"


def compute(case: str) -> dict[str, dict[str, Any]]:
    """The values of today; with one thread, since the order of a sum depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return digest(CASES[case][0]())
    finally:
        torch.set_num_threads(threads)


def moved(case: str) -> list[str]:
    """What differs between today and the stored values, one line each."""
    if not path(case).is_file():
        return [f"{path(case).name} is missing: python tests/golden/write.py {case!r} writes it"]
    return differences(json.loads(path(case).read_text()), compute(case), CASES[case][1])


def write(case: str) -> None:
    """Store the values of today, one a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in compute(case).items()]
    FOLDER.mkdir(exist_ok=True)
    path(case).write_text("{\n" + ",\n".join(lines) + "\n}\n")
