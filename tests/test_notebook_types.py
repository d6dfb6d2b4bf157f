"""The types of a notebook's parameters are parsed, and nothing of a notebook runs before a kernel does."""

import subprocess  # so that Popen is among the classes that hostile text looks for

import nbformat
import pytest

from rrepa_lab.batch.notebook import parse_type, read_notebook
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError


@pytest.mark.parametrize(
    ("text", "kind"),
    [("int", int), ("list", list), ("int | None", int | None), ("list[int]", list[int]), ("dict[str, float]", dict[str, float]),
     ("list[list[int]] | None", list[list[int]] | None), ("None", None)],
)  # fmt: skip
def test_types_are_read(text, kind):
    assert parse_type(text) == kind


HOSTILE = [
    "[].__class__.__base__.__subclasses__()", "().__class__", "(lambda: 1)()", "list[__import__('os').system('true')]",
    "int if True else str", "object", "str.format", "type", "eval", "int()", "'int'", "1", "[int]", "int, str", "list[int",
    "(int := str)", "list[int, str]", "{**{}}", "f'{1}'", "int" + " | int" * 5000, "list[" * 80 + "int" + "]" * 80,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_anything_else_is_refused_without_being_evaluated(text):
    with pytest.raises((ValueError, SyntaxError)):
        parse_type(text)


@pytest.mark.parametrize("place", ["annotation", "comment", "default"])
def test_a_notebook_runs_nothing_before_a_kernel(tmp_path, capsys, place):
    assert subprocess.Popen in object.__subclasses__()
    proof = tmp_path / "proof"
    call = f"[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', {str(proof)!r}])"
    line = {
        "annotation": f"x: {call} = 1  # a parameter",
        "comment": f"x = 1  # type: {call} # a parameter",
        "default": f"x: int = {call}  # a parameter",
    }[place]
    cell = nbformat.v4.new_code_cell(f'{line}\nout_dir: str = ""  # where to')
    cell.metadata["tags"] = ["parameters"]
    about = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    book = tmp_path / "book.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=about), book)
    message = ""
    try:
        read_notebook(book)
    except LabError as error:
        message = str(error)
    assert "\n" not in message
    assert main(["batch", str(book), "--grid", "x=1,2", "--dry-run"]) in (0, 2)
    capsys.readouterr()
    assert not proof.exists()
