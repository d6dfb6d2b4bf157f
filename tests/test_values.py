"""Values and files that people write: numbers in every spelling, YAML without traps, and notebooks with their kernel."""

import math

import nbformat
import pytest
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.batch.notebook import read_notebook
from rrepa_lab.batch.study import cells, load_study
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError
from rrepa_lab.values import load_yaml, number_range, read_value

# --- values -----------------------------------------------------------------------------------------------------------

NUMBERS = {
    "1e-3": 0.001, "1E-3": 0.001, "1.e-3": 0.001, "1.0e-3": 0.001, ".5e1": 5.0, "-2e5": -2e5, "+1e2": 100.0, "010": "010",
    "0x1f": 31, "1_000": 1000, "3": 3, "-0": 0, "true": True, "False": False, "no": "no", "on": "on", "yes": "yes",
    "1:30": "1:30", "null": None, "~": None, "None": None, "2026-11-25": "2026-11-25", "1e": "1e", "e3": "e3", ".": ".",
    "-": "-", "1.2.3": "1.2.3",
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_a_study_file_reads_scalars_as_yaml_1_2_and_python_do(text, value):
    got = load_yaml(f"x: {text}")["x"] if text != "-" else "-"
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("[1e-3, 1e-2]", [0.001, 0.01]), ("{a: 1}", {"a": 1}), ("{'a': [1]}", {"a": [1]}), ("True", True),
        ("null", None), ("photos/cats", "photos/cats"), ("[3, 4", "[3, 4"), ("no", "no"), ("a: b", "a: b"), ("#x", "#x"),
        ("", ""), ("'3'", "'3'"), ("0..9", "0..9"),
    ],
)  # fmt: skip
def test_a_value_of_the_command_line_is_read_like_one_of_a_file(text, value):
    got = read_value(text)
    assert got == value
    assert type(got) is type(value)


def test_nan_and_infinity_are_numbers():
    assert math.isnan(read_value("nan"))
    assert read_value("-inf") == -math.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: a is given twice"), ("a: {x: 1, x: 2}", "x is given twice"),
        ("a: &a [*a]", "contains itself"),
        ("a: [1, 2", "line"), ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: &x [1,1,1,1,1,1,1,1,1,1]\nb: &y [*x,*x,*x,*x,*x,*x,*x,*x,*x,*x]\nc: &z [*y,*y,*y,*y,*y,*y,*y,*y,*y,*y]\n"
         "d: &u [*z,*z,*z,*z,*z,*z,*z,*z,*z,*z]\ne: [*u,*u,*u,*u,*u,*u,*u,*u,*u,*u]", "more than 100,000 values"),
        ("a: \x01", "special characters"), ("[" * 5000, "nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_no_plain_yaml_is_one_line(text, message):
    with pytest.raises(LabError, match=message) as caught:
        load_yaml(text)
    assert "\n" not in str(caught.value)


def test_a_range_has_a_limit():
    assert number_range("2..4") == [2, 3, 4]
    assert number_range("4..2") == []
    for text in ("0..100000", "0..99999999999999999999999"):
        with pytest.raises(LabError, match="holds more than 100,000 numbers"):
            number_range(text, "--seeds")


# --- studies and notebooks --------------------------------------------------------------------------------------------


def book(path, parameters, kernel="python3", language="python"):
    cell = nbformat.v4.new_code_cell(f'{parameters}\nout_dir: str = ""  # where to', metadata={"tags": ["parameters"]})
    about = {"kernelspec": {"name": kernel, "display_name": kernel, "language": language}} if kernel else {}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=about), path)
    return path


def test_numbers_of_a_grid_are_numbers_however_they_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    book(tmp_path / "book.ipynb", "weight: float = 0.5  # lambda")
    (tmp_path / "study.yaml").write_text("notebook: book.ipynb\ngrid: {weight: [1e-3, 1e-2]}\n")
    study, notebook = load_study("study.yaml")
    assert [cell.parameters["weight"] for cell in cells(study, notebook)] == [0.001, 0.01]
    for grid in ("weight=[1e-3,1e-2]", "weight=1e-3,1e-2"):
        assert main(["batch", "book.ipynb", "--grid", grid, "--dry-run"]) == 0
        text = capsys.readouterr().out
        assert "0.001" in text
        assert "0.01" in text


def test_a_grid_of_too_many_cells_is_refused_before_they_are_made(tmp_path):
    book(tmp_path / "book.ipynb", "a: int = 0  # a\nb: int = 0  # b\nc: int = 0  # c")
    lines = "".join(f"  {name}: 0..999\n" for name in "abc")
    (tmp_path / "study.yaml").write_text(f"notebook: {tmp_path / 'book.ipynb'}\ngrid:\n{lines}")
    with pytest.raises(LabError, match="10,000"):
        cells(*load_study(tmp_path / "study.yaml"))


def test_the_kernel_of_a_notebook_is_checked_before_anything_runs(tmp_path, capsys):
    assert read_notebook(book(tmp_path / "none.ipynb", "x: int = 0  # x", kernel=None)).kernel == "python3"
    with pytest.raises(LabError, match="conda-env-flows-py"):
        read_notebook(book(tmp_path / "other.ipynb", "x: int = 0  # x", kernel="conda-env-flows-py"))
    with pytest.raises(LabError, match="is written in R: a batch runs Python notebooks"):
        read_notebook(book(tmp_path / "r.ipynb", "x: int = 0  # x", kernel="ir", language="R"))
    assert main(["batch", str(tmp_path / "other.ipynb"), "--grid", "x=1,2", "--dry-run"]) == 2
    assert "conda-env-flows-py" in capsys.readouterr().err


# --- names that collide -----------------------------------------------------------------------------------------------


def folder_of(tmp_path, classes):
    for number, name in enumerate(classes):
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (8, 8), (40 + 80 * number, 10 * i, 90)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_classes_may_be_called_like_columns(tmp_path, capsys):
    names = ["accuracy", "class", "predicted"]
    small = {
        "data.image_size": 8, "flow.image_size": 8, "flow.patch_size": 4, "flow.width": 16, "flow.head_width": 16,
        "flow.blocks": 2, "flow.layers": 1, "train.steps": 2, "train.batch": 4, "train.warmup": 0,
        "data.path": str(folder_of(tmp_path, names)),
    }  # fmt: skip
    for _ in rl.train(rl.preset("imagefolder-none").override(small), tmp_path / "run", device="cpu"):
        pass
    assert main(["classify", str(tmp_path / "run"), "--split", "test"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in names:
        (row,) = [line.split() for line in lines if line.strip().startswith(f"{name} ") and any(map(str.isdigit, line))]
        assert len(row) == 5, "the class, a count for each of three, and its accuracy"


def test_two_runs_of_one_preset_are_told_apart_by_their_folders(trained, tmp_path, capsys):
    import shutil

    for name in ("early", "late"):
        shutil.copytree(trained, tmp_path / name)
    words = ["--metrics", "knn", "--taps", "block.2.layer.2", "--no-baselines", "--limit", "60"]
    assert main(["probe", str(tmp_path / "early"), str(tmp_path / "late"), *words]) == 0
    assert "early" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    shutil.copytree(trained, tmp_path / "other" / "early")
    with pytest.raises(LabError, match="two of the runs are called 'early'"):
        rl.probe([rl.load(tmp_path / "early"), rl.load(tmp_path / "other" / "early")], probes=["knn"], limit=60)
