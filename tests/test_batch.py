"""Batches of notebooks: what is refused, what is kept, what is run again, and what is set side by side."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from rrepa_lab.batch.cell import finished, read_record
from rrepa_lab.batch.driver import plan, run_batch
from rrepa_lab.batch.notebook import find_notebook, read_notebook
from rrepa_lab.batch.study import Study, axis, cells, load_study, parse_grid
from rrepa_lab.batch.summary import summarise
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.compare import compare, gather
from rrepa_lab.measurements.claims import Claim, verdicts
from rrepa_lab.measurements.compare import Finding, markdown, tabulate, wide
from rrepa_lab.measurements.results import read_result, write_result
from rrepa_lab.paths import assets
from rrepa_lab.viz.comparison import report, spread

# jupyter's own warnings, and joblib's when a worker is killed on purpose
pytestmark = pytest.mark.filterwarnings("ignore")

PARAMETERS = """\
x: int = 1  # a number
scale: float = 1.0  # multiplies it
word: str = "a"  # a name
blocks: list[int] = [1]  # numbers
sleep: float = 0.0  # seconds it takes
log: str = ""  # file that counts the executions
out_dir: str = ""  # where result.json goes
"""
# no library in it, so that a kernel costs a second; it writes what write_result would
WORK = """\
import json, os, time
from pathlib import Path
if log:
    with open(log, "a") as stream:
        stream.write(f"start {x} {os.getpid()}\\n")
time.sleep(sleep)
if x == 13:
    raise ValueError("thirteen is not allowed")
row = {"settings": {"x": x, "blocks": blocks}, "metric": "m", "value": x * scale, "n": 5, "protocol": f"word {word}"}
Path(out_dir, "result.json").write_text(json.dumps(
    {"format": 1, "version": "0", "notebook": "tiny", "measurements": [row],
     "facts": {"threads": os.environ.get("OMP_NUM_THREADS"), "here": os.getcwd()}}))
"""


def write_notebook(path: Path, parameters: str | None = PARAMETERS, work: str = WORK, title: str = "# tiny") -> Path:
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(title)])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    if parameters is not None:
        nb.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nb.cells.append(nbformat.v4.new_code_cell(work))
    nbformat.write(nb, path)
    return path


@pytest.fixture
def tiny(tmp_path):
    return read_notebook(write_notebook(tmp_path / "tiny.ipynb"))


def run(study, notebook, out, **options):
    return list(run_batch(study, notebook, out, jobs=options.pop("jobs", 2), **options))


def on(notebook, **grid):
    """A study of this notebook over a grid."""
    return Study(notebook=str(notebook.path), grid=[grid])


# --- what is refused before anything runs -----------------------------------------------------------------------------


def test_parameters_are_read_with_type_default_and_help(tiny):
    assert tiny.parameters["scale"] == ("scale", "float", 1.0, "multiplies it")
    assert tiny.parameters["blocks"].default == [1]
    assert list(tiny.check({})) == ["x", "scale", "word", "blocks", "sleep", "log"]
    assert tiny.check({"scale": 2})["scale"] == 2.0  # a whole number is a float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scal": 1.0}, "unknown parameter of tiny 'scal'; did you mean 'scale'?"),
        ({"x": "1"}, "x takes int (a number), not '1'"),
        ({"x": 1.5}, "x takes int"),
        ({"x": True}, "x takes int"),
        ({"word": 3}, "word takes str"),
        ({"blocks": [1, "2"]}, "blocks takes list[int]"),
        ({"out_dir": "here"}, "out_dir is chosen by the batch"),
    ],
)
def test_a_misspelt_or_ill_typed_parameter_is_refused(tiny, values, message, tmp_path):
    study = Study(notebook="tiny", parameters=values)
    with pytest.raises(LabError) as caught:
        run(study, tiny, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out" / "cells").exists(), "nothing has run"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (None, "no cell tagged 'parameters'"),
        ("x = 1\nout_dir: str = ''", "parameter x has no type: write x: int = 1"),
        ("x: int = len('a')\nout_dir: str = ''", "needs a type"),
        ("x: Tensor = 1\nout_dir: str = ''", "needs a type"),
        ("x: int = 1", "has no parameter out_dir"),
    ],
)
def test_a_notebook_that_cannot_be_varied_is_refused(tmp_path, parameters, message):
    with pytest.raises(LabError, match=message.replace("(", r"\(")):
        read_notebook(write_notebook(tmp_path / "n.ipynb", parameters))


def test_what_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "n.ipynb").write_text("{")
    with pytest.raises(LabError, match="is not a notebook"):
        read_notebook(tmp_path / "n.ipynb")
    with pytest.raises(LabError, match="unknown notebook '02_train_a_tiny_flw'; did you mean '02_train_a_tiny_flow'"):
        find_notebook("02_train_a_tiny_flw")


# --- grids and study files --------------------------------------------------------------------------------------------


def test_axes_as_they_are_typed(tiny):
    typed = ["x=0..2,7", "scale=1,2.5", "word=none,true,3", "blocks=[[1,2],[3]]"]
    assert parse_grid(tiny, typed) == {
        "x": [0, 1, 2, 7],
        "scale": [1.0, 2.5],
        "word": ["none", "true", "3"],  # a str stays as it is typed
        "blocks": [[1, 2], [3]],
    }
    assert axis(tiny.parameters["word"], ["none"]) == ["none"]
    assert axis(tiny.parameters["x"], 4) == [4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "--grid takes NAME=VALUES"),
        ("x=a", "x takes int (a number), not 'a'"),
        ("x=2..1", "no value for x"),
        ("blocks=[1,2]", "an axis of lists is a list of lists: blocks=[[1, 2]]"),
        ("blocks=[[1", "is not a list"),
        ("y=1", "unknown parameter of tiny 'y'"),
    ],
)
def test_axes_that_cannot_be_read(tiny, text, message):
    with pytest.raises(LabError) as caught:
        parse_grid(tiny, [text])
    assert message in str(caught.value)


def test_cells_of_a_grid(tiny):
    study = Study(notebook="tiny", parameters={"scale": 2.0}, grid=[{"word": ["a"]}, {"word": ["a", "b"], "x": "0..1"}])
    found = cells(study, tiny)
    # x = 1 is the default, so {word: a} and {word: a, x: 1} are the same cell
    assert [cell.name for cell in found] == ["word=a", "word=a,x=0", "word=b,x=0", "word=b,x=1"]
    assert all(cell.parameters["scale"] == 2.0 for cell in found)
    assert len({cell.folder for cell in found}) == len({cell.key for cell in found}) == 4
    with pytest.raises(LabError, match="x stands in both grid and parameters"):
        cells(Study(notebook="tiny", parameters={"x": 2}, grid=[{"x": [1]}]), tiny)


def test_the_key_follows_code_and_parameters_but_not_the_prose(tmp_path, tiny):
    values = tiny.check({})
    prose = read_notebook(write_notebook(tmp_path / "tiny.ipynb", title="# other words"))
    code = read_notebook(write_notebook(tmp_path / "tiny.ipynb", work=WORK + "x"))
    assert prose.key(values) == tiny.key(values) != code.key(values)
    assert tiny.key(tiny.check({"x": 2})) != tiny.key(values)


def test_study_files(tmp_path, tiny):
    (tmp_path / "s.yaml").write_text("notebook: tiny.ipynb\ngrid: {x: 0..1}\n")
    study, notebook = load_study(tmp_path / "s.yaml")
    assert notebook.path == tiny.path
    assert len(cells(study, notebook)) == 2
    for text, message in (
        ("notebook: tiny.ipynb\ngird: {x: 1}", "unknown setting 'gird'; did you mean 'grid'?"),
        ("notebook: [", "is not a YAML file"),
        ("- 1", "must hold a YAML mapping"),
        ("notebook: none.ipynb", "unknown notebook"),
        ("notebook: tiny.ipynb\nclaims: [{claim: better}]", "needs either contrasts or a reason"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(LabError, match=message.replace("?", r"\?")):
            load_study(tmp_path / "bad.yaml")
    with pytest.raises(LabError, match="no study at"):
        load_study(tmp_path / "missing.yaml")


def test_the_shipped_study_is_within_its_limits():
    study, notebook = load_study("digits-layer-alignment")
    planned = cells(study, notebook)
    assert len(planned) == 60
    assert {cell.parameters["seed"] for cell in planned} == {0, 1, 2, 3, 4}
    assert all(cell.parameters["steps"] >= 500 and not cell.parameters["quick"] for cell in planned)
    assert {cell.parameters["strategy"] for cell in planned} == {"none", "forward", "detach", "reverse"}


def test_the_shipped_table_follows_from_the_shipped_measurements():
    """Table and verdicts are what the committed study file makes of the runs that are shipped with it."""
    study, notebook = load_study("digits-layer-alignment")
    folder = assets() / "studies"
    found = gather(folder / "digits-layer-alignment-runs.csv")
    settings = {(one.source, one.seed) for one in found}
    assert len(settings) == len(cells(study, notebook))
    shipped = pd.read_csv(folder / "digits-layer-alignment.csv", dtype={"align.layers": str})
    # both are written with six digits
    pd.testing.assert_frame_equal(tabulate(found), shipped, rtol=1e-4, atol=2e-6, check_dtype=False)
    judged = verdicts(found, study.claims)
    again = pd.read_csv(folder / "digits-layer-alignment-verdicts.csv")
    assert judged["verdict"].tolist() == again["verdict"].tolist()
    assert set(judged["verdict"].str.split(":").str[0]) <= {
        "reproduced", "not reproduced", "undecided", "not testable here",
    }  # fmt: skip


# --- running ----------------------------------------------------------------------------------------------------------


def test_a_batch_runs_keeps_failures_and_goes_on(tmp_path, tiny):
    study, out = on(tiny, x=[1, 13], scale=[1.0, 2.0]), tmp_path / "out"
    first = run(study, tiny, out, threads=1)
    states = {report.name: report.state for report in first}
    assert states == {"x=1,scale=1.0": "done", "x=1,scale=2.0": "done", "x=13,scale=1.0": "failed", "x=13,scale=2.0": "failed"}
    assert [report.ended for report in first] == [1, 2, 3, 4]
    failure = next(report.failure for report in first if report.state == "failed")
    assert (failure.kind, failure.message) == ("ValueError", "thirteen is not allowed")
    assert 'raise ValueError("thirteen is not allowed")' in failure.source
    done = next(report for report in first if report.state == "done")
    assert read_result(done.folder / "result.json").facts == {"threads": "1", "here": os.getcwd()}
    executed = nbformat.read(done.folder / "notebook.ipynb", 4)
    assert "widgets" not in executed.metadata

    # again: what is done is skipped, what failed is tried again
    (tmp_path / "fixed.txt").touch()
    second = run(study, tiny, out)
    assert [report.state for report in second].count("skipped") == 2
    assert [report.state for report in second].count("failed") == 2
    # other words change nothing, other code does
    assert (
        sum(finished(task) is not None for task in plan(study, read_notebook(write_notebook(tiny.path, title="new")), out)) == 2
    )
    edited = read_notebook(write_notebook(tiny.path, work=WORK.replace("x == 13", "x == 14")))
    assert not any(finished(task) for task in plan(study, edited, out))


def test_a_damaged_result_is_made_again(tmp_path, tiny):
    study, out = on(tiny, x=[1, 2]), tmp_path / "out"
    run(study, tiny, out)
    one, two = plan(study, tiny, out)
    (one.folder / "result.json").write_text('{"format": 1, "vers')
    with pytest.raises(LabError, match=r"result.json is not JSON"):
        compare(out)
    (two.folder / "cell.json").write_text("")
    assert finished(one) is None
    assert finished(two) is None
    assert [report.state for report in run(study, tiny, out)] == ["done", "done"]
    assert len(compare(out)) == 2


def test_a_run_that_takes_too_long_is_ended(tmp_path, tiny):
    study = Study(notebook="tiny", grid=[{"sleep": [60.0, 0.0]}], timeout=5)
    reports = {report.name: report for report in run(study, tiny, tmp_path / "out")}
    late = reports["sleep=60.0"]
    assert late.state == "failed"
    assert late.failure.kind == "TimeoutError"
    assert "time.sleep(sleep)" in late.failure.source
    assert late.seconds < 30
    assert reports["sleep=0.0"].state == "done"


def test_a_notebook_without_a_result_and_one_that_kills_its_kernel_fail(tmp_path):
    for work, kind in (("pass", "LabError"), ("import os\nos._exit(9)", "DeadKernelError")):
        notebook = read_notebook(write_notebook(tmp_path / "n.ipynb", work=work))
        (report,) = run(Study(notebook="n"), notebook, tmp_path / kind, jobs=1)
        assert (report.state, report.failure.kind) == ("failed", kind)


def test_a_folder_that_cannot_be_used(tmp_path, tiny):
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match="cannot write to .*file/out"):
        run(on(tiny), tiny, tmp_path / "file" / "out")
    first = run_batch(on(tiny, x=[1, 2]), tiny, tmp_path / "out", jobs=1)
    next(first)
    with pytest.raises(LabError, match="another batch is at work in"):
        run(on(tiny), tiny, tmp_path / "out")
    first.close()


@pytest.mark.notebooks
def test_a_killed_batch_goes_on_with_one_result_per_cell(tmp_path, tiny):
    """SIGKILL of a worker, then of the driver; the same command finishes, and no cell is lost or done twice."""
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-m", "rrepa_lab.cli", "batch", str(tiny.path), "--grid", "x=1..4", "--set", "sleep=1",
               "--set", f"log={log}", "--out", str(out), "--jobs", "2", "--json"]  # fmt: skip
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _until(lambda: _starts(log) >= 1)
    kernel = int(log.read_text().split()[2])
    worker = _parent(kernel)
    os.kill(worker, signal.SIGKILL)  # its cell is cut off; the driver starts new workers and tries it again
    _until(lambda: _done(out) and _starts(log) > 1 + _done(out))  # one has ended, another is at work
    driver.kill()
    driver.wait()
    _until(lambda: not _alive(out))  # workers and kernels end with their driver
    records = [read_record(folder) for folder in sorted((out / "cells").iterdir())]
    assert any(record is None or record.state == "running" for record in records), "it was cut off in the middle"
    results = [(path, read_record(path.parent)) for path in out.rglob("result.json")]
    before = {path: path.read_bytes() for path, record in results if record is not None and record.state == "done"}
    assert before

    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    reports = json.loads(again.stdout)
    assert sorted(report["cell"] for report in reports) == [f"x={x}" for x in range(1, 5)]
    assert sum(report["state"] == "skipped" for report in reports) == len(before)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(list(out.rglob("result.json"))) == 4
    table = pd.read_csv(out / "measurements.csv")
    assert sorted(table["value"]) == [1, 2, 3, 4]


def _starts(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.notebooks
def test_a_cell_whose_process_is_killed_twice_is_given_up(tmp_path):
    work = WORK.replace('raise ValueError("thirteen is not allowed")', "import signal; os.kill(os.getppid(), signal.SIGKILL)")
    log = tmp_path / "log"
    notebook = read_notebook(write_notebook(tmp_path / "tiny.ipynb", work=work))
    study = Study(notebook="tiny", parameters={"log": str(log)}, grid=[{"x": [13, 1, 2]}])
    reports = {report.name: report for report in run(study, notebook, tmp_path / "out")}
    assert {name: report.state for name, report in reports.items()} == {"x=13": "failed", "x=1": "done", "x=2": "done"}
    assert reports["x=13"].failure.kind == "Killed"
    assert log.read_text().count("start 13") == 2


def _done(out: Path) -> int:
    records = [read_record(folder) for folder in out.glob("cells/*")]
    return sum(record is not None and record.state == "done" for record in records)


def _until(true, seconds=90):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _alive(out: Path) -> bool:
    """Whether a process still works on a cell of this batch: its lock is held."""
    from filelock import FileLock, Timeout

    for lock in out.glob("cells/*/.lock"):
        try:
            FileLock(lock).acquire(timeout=0).lock.release()
        except Timeout:
            return True
    return False


# --- a cluster --------------------------------------------------------------------------------------------------------


@pytest.mark.notebooks
def test_a_dask_cluster_gives_the_same(tmp_path, tiny):
    """A real scheduler and two workers on the loopback address."""
    distributed = pytest.importorskip("distributed")
    study = on(tiny, x=[1, 2, 13])
    here = {report.name: report for report in run(study, tiny, tmp_path / "here", threads=1)}
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        there = {r.name: r for r in run(study, tiny, tmp_path / "there", scheduler=cluster.scheduler_address, threads=1)}
    assert {name: one.state for name, one in here.items()} == {name: one.state for name, one in there.items()}
    for name in ("x=1", "x=2"):
        one, other = (read_result(reports[name].folder / "result.json") for reports in (here, there))
        assert one == other
    assert there["x=13"].failure.message == here["x=13"].failure.message


def test_a_cluster_that_does_not_answer(tmp_path, tiny, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("rrepa_lab.batch.driver.ANSWER_WITHIN", 1)
    with pytest.raises(LabError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        run(on(tiny), tiny, tmp_path / "out", scheduler="tcp://127.0.0.1:9")
    assert not list((tmp_path / "out").glob("cells/*"))


# --- results, side by side --------------------------------------------------------------------------------------------


def finding(strategy, seed, value, protocol="p", metric="m", n=10, **settings):
    return Finding(f"{strategy}-{seed}", {"align.strategy": strategy, **settings}, seed, metric, value, "", n, protocol)


def test_a_table_has_mean_spread_and_number():
    found = [finding("none", seed, seed) for seed in (0, 1, 2)] + [finding("reverse", 0, 5.0)]
    table = tabulate(found)
    assert table[["align.strategy", "value", "sd", "seeds"]].values.tolist()[0] == ["none", 1.0, 1.0, 3]
    assert table.loc[1, "seeds"] == 1
    assert pd.isna(table.loc[1, "sd"])
    assert wide(table).to_dict("records") == [
        {"strategy": "none", "seeds": 3, "m": "1.0000 ± 1.0000"},
        {"strategy": "reverse", "seeds": 1, "m": "5.0000"},
    ]
    text = markdown(table)
    assert text.splitlines()[0].replace(" ", "") == "|strategy|seeds|m|"
    assert "- m: n = 10; p" in text


def test_the_data_set_does_not_read_as_the_name_of_a_run():
    found = [finding("none", 0, 1.0, **{"data.name": name, "space.kind": kind}) for name, kind in (("a", "b"), ("c", "d"))]
    assert list(wide(tabulate(found)).columns) == ["data.name", "space.kind", "seeds", "m"]


def test_only_settings_that_differ_are_columns():
    found = [
        finding("none", 0, 1.0),
        finding("reverse", 0, 1.0, **{"align.blocks": [3, 4], "align.weight": 0.5}),
        finding("reverse", 0, 1.0, **{"align.blocks": [1, 2], "align.weight": 0.5}),
    ]
    table = tabulate(found)
    assert list(table.columns[:3]) == ["align.strategy", "align.blocks", "metric"]
    assert list(table["align.blocks"]) == ["-", "3,4", "1,2"]


def test_protocols_do_not_mix():
    found = [finding("none", 0, 1.0, "sigma 0.1"), finding("reverse", 0, 2.0, "sigma 0.3")]
    with pytest.raises(LabError) as caught:
        tabulate(found)
    assert "m was measured under 2 protocols" in str(caught.value)
    assert "(1) none-0; (2) reverse-0. They differ in words: sigma 0.1 and sigma 0.3." in str(caught.value)
    with pytest.raises(LabError, match="2 protocols"):
        tabulate([finding("none", 0, 1.0, n=10), finding("reverse", 0, 1.0, n=20)])
    assert list(tabulate(found, apart=True)["metric"]) == ["m [1]", "m [2]"]


def test_the_same_settings_and_seed_twice_stand_apart():
    table = tabulate([finding("none", 0, 1.0), finding("none", 0, 2.0)._replace(source="mine")])
    assert list(table["source"]) == ["none-0", "mine"]
    assert list(table["value"]) == [1.0, 2.0]


def test_runs_and_results_are_gathered(tmp_path):
    import rrepa_lab as rl

    run_ = rl.load("digits-none")
    table = pd.DataFrame([{"run": "digits-none", "metric": "m", "value": float("nan"), "n": 3, "tap": "a", "split": "test"}])
    shown = write_result(tmp_path / "one", "tiny", table, [run_], by=["tap"])
    assert list(shown.columns) == ["run", "tap", "metric", "value", "unit", "n"]
    (one,) = gather(tmp_path)
    assert (one.seed, one.settings["tap"], one.protocol) == (0, "a", "digits 8x8; split test")
    assert one.settings["align.strategy"] == "none"
    assert "align.blocks" not in one.settings, "an unaligned run has no aligned blocks"
    assert one.value != one.value
    with pytest.raises(LabError, match="holds no result.json"):
        compare(_empty(tmp_path))
    with pytest.raises(LabError, match="no column 'guidance'"):
        write_result(tmp_path / "two", "tiny", table, [run_], by=["guidance"])


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_data_sets_do_not_mix(tmp_path):
    import rrepa_lab as rl

    run_ = rl.load("digits-none")
    table = pd.DataFrame([{"run": "digits-none", "metric": "m", "value": 1.0, "n": 3, "protocol": "p"}])
    write_result(tmp_path / "a", "tiny", table, [run_])
    for name, folder in (("b", "cats"), ("c", "dogs")):
        config = run_.config.override({"data.name": "folder", "data.path": str(tmp_path / folder)})
        write_result(tmp_path / name, "tiny", table, [rl.Run(run_.flow, config, run_.classes, run_.projectors)])
    with pytest.raises(LabError, match=r"\(1\) a/digits-none; \(2\) b/digits-none\. .* digits 8x8; p and folder cats 8x8; p\."):
        compare([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(
        LabError, match=r"folder cats 8x8; p.*folder dogs 8x8; p.*\. A column for each: --apart, or apart=True$"
    ):
        compare([tmp_path / "b", tmp_path / "c"])


def test_tables_of_measurements_come_back(tmp_path):
    found = [finding("none", 0, 1.5), finding("reverse", 1, float("nan"), **{"align.blocks": [3, 4]})]
    tabulate(found, over_seeds=False).to_csv(tmp_path / "m.csv", index=False)
    none, reverse = gather(tmp_path / "m.csv")
    assert (none.settings, none.seed, none.value, none.n) == ({"align.strategy": "none"}, 0, 1.5, 10)
    assert reverse.value != reverse.value
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(LabError, match=r"no table of measurements: .*bad.csv has no column source"):
        gather(tmp_path / "bad.csv")


def test_results_of_another_format_are_refused(tmp_path):
    path = tmp_path / "result.json"
    path.write_text('{"format": 7}')
    with pytest.raises(LabError, match="has format 7"):
        read_result(path)
    path.write_text('{"format": 1, "version": "0", "notebook": "n", "measurements": [{"metric": "m"}]}')
    with pytest.raises(LabError, match="value"):
        read_result(path)
    with pytest.raises(LabError, match="no result at"):
        read_result(tmp_path / "missing.json")


# --- claims -----------------------------------------------------------------------------------------------------------


def claim(ahead="higher", **more):
    contrast = {"better": {"align.strategy": "reverse"}, "than": {"align.strategy": "none"}}
    return Claim.from_dict({"claim": "c", "metric": "m", "ahead": ahead, "contrasts": [contrast], **more})


def test_verdicts_are_paired_by_seed():
    # seeds differ by 10, the strategies by 1: unpaired nothing could be seen
    found = [finding("none", seed, 10.0 * seed) for seed in (0, 1, 2)]
    found += [finding("reverse", seed, 10.0 * seed + 1 + 0.1 * seed) for seed in (0, 1, 2)]
    (row,) = verdicts(found, [claim()]).to_dict("records")
    assert row["difference"] == pytest.approx(1.1)
    assert row["sd"] == pytest.approx(0.1)
    assert (row["seeds"], row["holds"], row["verdict"]) == (3, True, "reproduced")
    assert verdicts(found, [claim("lower")])["verdict"].tolist() == ["not reproduced"]


def test_a_difference_within_its_spread_is_undecided():
    values = {0: -1.0, 1: 1.0, 2: 1.0}  # mean 0.33, sd 1.15
    found = [finding("none", seed, 0.0) for seed in values] + [finding("reverse", seed, v) for seed, v in values.items()]
    assert verdicts(found, [claim()])["verdict"].tolist() == ["undecided"]
    one = [finding("none", 0, 0.0), finding("reverse", 0, 9.0)]
    assert verdicts(one, [claim()])["verdict"].tolist() == ["undecided: one seed"], "it has no spread, and proves nothing"


def test_claims_that_cannot_be_held_against_anything():
    told = claim(contrasts=[], not_testable="no such teacher")
    assert verdicts([], [told])["verdict"].tolist() == ["not testable here: no such teacher"]
    with pytest.raises(LabError, match="the study has no m for reverse"):
        verdicts([finding("none", 0, 1.0)], [claim()])
    several = [finding("reverse", 0, 1.0, **{"align.blocks": [b]}) for b in (1, 2)] + [finding("none", 0, 1.0)]
    with pytest.raises(LabError, match="fits several settings"):
        verdicts(several, [claim()])
    with pytest.raises(LabError, match="share no training seed"):
        verdicts([finding("none", 0, 1.0), finding("reverse", 1, 1.0)], [claim()])


# --- report and command line ------------------------------------------------------------------------------------------


def test_the_report_stands_alone(tmp_path):
    found = [finding(name, seed, seed + 0.5, **{"align.blocks": [3, 4]}) for name in ("none", "reverse") for seed in (0, 1)]
    table = tabulate(found)
    page = report(table, "A <title>", "notes", verdicts(found, [claim()]))
    assert "A &lt;title&gt;" in page
    assert "not reproduced" in page
    assert page.count("Plotly.newPlot") == 1
    assert "plotly.js v" in page, "the script is inside"
    assert '<script src="http' not in page
    figure = spread(table, "m")
    assert [list(trace.x) for trace in figure.data] == [[1.0], [1.0]]
    with pytest.raises(LabError, match="unknown metric"):
        spread(table, "nothing")
    nowhere = tabulate([one._replace(value=math.nan) for one in found])
    with pytest.raises(LabError, match="m has no value"):
        spread(nowhere, "m")


def test_summarise_writes_tables_and_verdicts(tmp_path, tiny):
    out = tmp_path / "out"
    study = on(tiny, x=[1, 2])
    run(study, tiny, out)
    summarise(study, plan(study, tiny, out), out)
    assert sorted(path.name for path in out.iterdir() if path.is_file() and path.name[0] != ".") == [
        "measurements.csv", "report.html", "table.csv", "table.md",
    ]  # fmt: skip
    assert list(pd.read_csv(out / "table.csv")["value"]) == [1.0, 2.0]


def test_batch_and_compare_commands(tmp_path, tiny, capsys):
    nb, out = str(tiny.path), str(tmp_path / "out")
    assert main(["batch", nb, "--grid", "x=1,13", "--dry-run"]) == 0
    assert "2 cells of tiny, 2 to run" in capsys.readouterr().out
    assert main(["batch", nb, "--grid", "x=1"]) == 2
    assert "add --out" in capsys.readouterr().err
    assert main(["batch", nb, "--grid", "x=1,13", "--out", out, "--jobs", "2", "--set", "scale=3"]) == 1
    told = capsys.readouterr().out
    assert "1 run, 0 done before, 1 failed" in told
    assert "ValueError: thirteen is not allowed" in told
    assert "| time.sleep(sleep)" in told
    assert main(["batch", nb, "--grid", "y=1", "--out", out]) == 2
    assert "unknown parameter of tiny 'y'" in capsys.readouterr().err
    assert main(["batch", nb, "--set", "x=1,2", "--out", out]) == 2
    assert "x takes int" in capsys.readouterr().err
    assert main(["batch", str(assets() / "studies" / "digits-layer-alignment.yaml"), "--grid", "seed=1", "--dry-run"]) == 2
    assert "has its own grid" in capsys.readouterr().err

    page = tmp_path / "c.html"
    assert main(["compare", out, "--json", "--csv", str(tmp_path / "c.csv"), "--html", str(page)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["metric"], row["value"], row["sd"]) == ("m", 3.0, None)
    assert pd.read_csv(tmp_path / "c.csv")["protocol"].tolist() == ["word a"]
    assert page.stat().st_size > 1_000_000
    assert main(["compare", str(tmp_path / "nowhere")]) == 2
    assert "unknown run" in capsys.readouterr().err
