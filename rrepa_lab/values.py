"""Values as people write them: numbers, booleans and none in the spelling of JSON, Python or YAML 1.2, and YAML files."""

import json
import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from rrepa_lab.errors import LabError

LARGEST_NODES = 100_000  # values of one document, those behind aliases counted each time
LARGEST_RANGE = 100_000  # numbers of "0..9"
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 and Python.

    PyYAML follows YAML 1.1, in which 1e-3 and .5e1 are text, `no` and `on` are booleans, 010 is eight, and 1:30 is ninety.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and key.tag != f"{_TAG}merge" and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_SCALARS = {  # tag: pattern, and what it can begin with
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|None|", "~nN"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        rf"[-+]?(?:{_DIGITS}\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": ("<<", "<"),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _starts = [*_first, ""] if _name == "null" else [*_first]
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _starts)


def load_yaml(text: str) -> Any:
    """The plain values of a YAML document: dict, list, str, int, float, bool, None.

    Raises: LabError in one line, with the line of the text, for what is no YAML, a key that is given twice, a document that
        contains itself, or one of more than 100,000 values.
    """
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise LabError(_one_line(error)) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, set())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise LabError(_one_line(error)) from None
    except (ValueError, OverflowError) as error:  # a number of thousands of digits, a date that does not exist
        raise LabError(str(error).splitlines()[0]) from None
    except RecursionError:
        raise LabError("it is nested too deeply") from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Values in a node, those behind an alias counted each time; LabError for too many, or a node inside itself."""
    if id(node) in above:
        raise LabError("it contains itself")
    if id(node) not in known:
        above.add(id(node))
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count(part, known, above) for part in parts)
        above.discard(id(node))
    if known[id(node)] > LARGEST_NODES:
        raise LabError(f"it holds more than {LARGEST_NODES:,} values")
    return known[id(node)]


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())[:200]
    return problem if mark is None else f"line {mark.line + 1}: {problem}"


def read_value(text: str) -> Any:
    """A value from the command line: a number, boolean, none, list or object as JSON, Python or YAML write it, else the text.

    NaN and infinity are numbers here: what takes the value says which numbers it takes.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    plain = text.strip()
    if plain in ("nan", "inf", "-inf"):
        return float(plain)
    if not re.match(r"[-+.0-9\[{~tTfFnN]", plain) or "#" in plain or (": " in plain and plain[0] not in "[{"):
        return text
    try:
        value = load_yaml(plain)
    except LabError:
        return text
    return text if isinstance(value, str) else value


def number_range(text: str, name: str = "a range") -> list[int]:
    """ "0..9" (both ends included) or "3" as integers; none where the first is above the last.

    Raises: ValueError for anything else; LabError for more than 100,000 numbers.
    """
    low, dots, high = text.partition("..")
    if not dots:
        return [int(low)]
    numbers = range(int(low), int(high) + 1)
    if len(numbers) > LARGEST_RANGE if numbers.stop - numbers.start < 2**62 else True:
        raise LabError(f"{name}: {text.strip()[:60]} holds more than {LARGEST_RANGE:,} numbers")
    return list(numbers)


def finite(value: Any) -> bool:
    """Whether no number in a value, or in the lists and objects it holds, is NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(finite(one) for one in value.values())
    return all(finite(one) for one in value) if isinstance(value, (list, tuple)) else True
