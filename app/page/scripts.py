"""The JavaScript and CSS of the page, from the files of `static`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parent.parent / "static"


def script(name: str, **values: Any) -> str:
    """The JavaScript of a file, from its first line that is no comment.

    Args:
        name: of the file, without ".js".
        values: put as JSON in the place of their names, which the file has in capitals.
    """
    lines = (STATIC / f"{name}.js").read_text("utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("//"))
    for key, value in values.items():
        text = text.replace(key.upper(), json.dumps(value))
    return text


def style(name: str) -> str:
    """The CSS of a file."""
    return (STATIC / f"{name}.css").read_text("utf-8")


def when_mounted(places: Mapping[str, Sequence[str]]) -> str:
    """Wait until the element that opened holds its elements.

    Args:
        places: selector of what can open -> selectors of the elements inside that must be there.
    """
    return script("when_mounted", places=places)
