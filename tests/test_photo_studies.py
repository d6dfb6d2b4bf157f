"""Studies over several sessions: cells that were measured before, their tables, partial verdicts, and ratios of steps."""

import json
import math
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from scipy.stats import t

import rrepa_lab as rl
from rrepa_lab.batch.cell import Record, write_record
from rrepa_lab.batch.driver import plan, run_batch
from rrepa_lab.batch.measured import USUAL_SETTINGS, curves_path, keep, read_measured, setting_names, with_new
from rrepa_lab.batch.notebook import read_notebook
from rrepa_lab.batch.study import cells, load_study
from rrepa_lab.batch.summary import summarise
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.cell_scores import CLEAN, score_checkpoint, score_run, training_curve, training_seconds
from rrepa_lab.evaluation.compare import gather
from rrepa_lab.files import sha256
from rrepa_lab.measurements.claims import NOT_MEASURED, Claim, claim_lines, verdict_table, verdicts
from rrepa_lab.measurements.compare import Finding, as_text, settings_of
from rrepa_lab.measurements.curves import Curve, step_ratios, steps_to_reach
from rrepa_lab.measurements.results import FORMAT
from rrepa_lab.paths import assets
from rrepa_lab.runs.records import Records
from rrepa_lab.studies import photographs, report_photographs
from rrepa_lab.studies.photographs import read_study
from rrepa_lab.viz.training import setting_curves

pytestmark = pytest.mark.filterwarnings("ignore")  # jupyter's own

NOTEBOOK = """\
strategy: str = "none"  # how it is aligned
seed: int = 0  # of the training
steps: int = 10  # of the training
settings: dict = {}  # others
data_path: str = ""  # folder
out_dir: str = ""  # where result.json goes
"""
STUDY = """\
title: Tiny
notebook: tiny.ipynb
measured: tiny.csv
parameters: {steps: 100}
grid:
  - {seed: 0, strategy: [none, reverse]}
  - {seed: 1, strategy: [none, reverse]}
claims:
  - claim: Reverse is more accurate
    source: 37 to 57
    metric: m
    contrasts: [{better: {align.strategy: reverse}, than: {align.strategy: none}}]
  - claim: Reverse needs fewer steps
    metric: c
    fewer_steps: true
    contrasts: [{better: {align.strategy: reverse}, than: {align.strategy: none}}]
  - claim: Detach is more accurate
    metric: m
    contrasts: [{better: {align.strategy: detach}, than: {align.strategy: none}}]
  - claim: Another teacher is better
    not_testable: there is one
"""


@pytest.fixture
def folder(tmp_path):
    """A study file with its notebook."""
    place = tmp_path / "studies"
    place.mkdir()
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK, metadata={"tags": ["parameters"]})])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb.cells.append(nbformat.v4.new_code_cell("raise RuntimeError('it was run')"))
    nbformat.write(nb, place / "tiny.ipynb")
    (place / "tiny.yaml").write_text(STUDY)
    return place


def tasks_of(folder, out="out", name="tiny"):
    study, notebook = load_study(folder / f"{name}.yaml")
    return study, plan(study, notebook, folder.parent / out)


def finish(task, value, curve=(1.0, 2.0, 4.0), metric="m"):
    """Leave a cell as one that has ended."""
    given = task.cell.parameters
    config = rl.preset(f"digits-{given['strategy']}").override({"train.seed": given["seed"], "data.path": "/secret/place"})
    row = {"run": "r", "metric": metric, "value": value, "unit": "fraction", "n": 10, "protocol": "p", "low": value - 0.1}
    points = [{"step": 10 * place, "metric": "c", "value": point} for place, point in enumerate(curve, start=1)]
    result = {"format": FORMAT, "version": "0.2.0", "notebook": "tiny", "runs": {"r": config.to_dict()}}
    result |= {"measurements": [row], "facts": {"curve": points, "training_seconds": 12.4, "run_dir": "/secret/run"}}
    task.folder.mkdir(parents=True)
    (task.folder / "result.json").write_text(json.dumps(result))
    record = Record(state="done", key=task.cell.key, notebook="tiny", parameters=given, seconds=20.6,
                    result_sha256=sha256(task.folder / "result.json"))  # fmt: skip
    write_record(task.folder, record)


# --- what identifies a cell -------------------------------------------------------------------------------------------


def test_a_cell_is_what_it_was_given(folder):
    _, tasks = tasks_of(folder)
    assert [task.cell.name for task in tasks] == [f"seed={s},strategy={name}" for s in (0, 1) for name in ("none", "reverse")]
    assert tasks[1].cell.identity == '{"seed":0,"steps":100,"strategy":"reverse"}'
    before = {task.cell.identity for task in tasks}
    text = (
        (folder / "tiny.ipynb").read_text().replace("it was run", "other words").replace("steps: int = 10", "steps: int = 20")
    )
    (folder / "tiny.ipynb").write_text(text)
    _, again = tasks_of(folder)
    assert {task.cell.identity for task in again} == before
    assert again[0].cell.key != tasks[0].cell.key, "within one session edited code is run again"


def test_where_files_are_is_no_part_of_a_cell(folder):
    study, notebook = load_study(folder / "tiny.yaml")
    plain = cells(study, notebook)[0]
    moved = study.model_copy(update={"parameters": {"steps": 100, "data_path": "/elsewhere"}})
    there = cells(moved, notebook)[0]
    assert there.parameters["data_path"] == "/elsewhere"
    assert (there.identity, there.folder, there.key) == (plain.identity, plain.folder, plain.key)
    axis = study.model_copy(update={"grid": [{"data_path": ["/a", "/b"]}]})
    assert len({cell.folder for cell in cells(axis, notebook)}) == len({cell.identity for cell in cells(axis, notebook)}) == 2


# --- merging ----------------------------------------------------------------------------------------------------------


def test_new_cells_are_merged_in_the_order_of_the_study(folder):
    study, tasks = tasks_of(folder)
    finish(tasks[3], 0.4)
    assert keep(study, tasks) == 1
    finish(tasks[0], 0.1)
    finish(tasks[1], 0.25)
    assert keep(study, tasks) == 2
    table = pd.read_csv(folder / "tiny.csv", dtype=str, keep_default_na=False)
    assert table["source"].tolist() == [tasks[place].cell.name for place in (0, 1, 3)]
    row = table.iloc[1].to_dict()
    assert (row["align.strategy"], row["train_seed"], row["metric"], row["value"]) == ("reverse", "0", "m", "0.25")
    assert (row["unit"], row["n"], row["protocol"], row["low"], row["high"]) == ("fraction", "10", "digits 8x8; p", "0.15", "")
    assert (row["version"], row["training_seconds"], row["seconds"]) == ("0.2.0", "12", "21")
    assert json.loads(row["parameters"]) == {"seed": 0, "steps": 100, "strategy": "reverse"}
    assert table["align.blocks"].tolist() == ["-", "3,4", "3,4"]
    curves = pd.read_csv(curves_path(folder / "tiny.csv"), dtype=str)
    assert curves["source"].tolist() == [tasks[place].cell.name for place in (0, 0, 0, 1, 1, 1, 3, 3, 3)]
    assert curves["step"].tolist()[:3] == ["10", "20", "30"]
    assert "secret" not in "".join(path.read_text() for path in folder.glob("*.csv")), "no path of the machine"


def test_merging_again_changes_nothing(folder):
    study, tasks = tasks_of(folder)
    finish(tasks[2], 0.4)
    finish(tasks[1], 0.2)
    keep(study, tasks)
    before = {path: path.read_bytes() for path in folder.glob("*.csv")}
    assert len(before) == 2
    assert keep(study, tasks) == 0
    assert {path: path.read_bytes() for path in folder.glob("*.csv")} == before
    # another machine measured the same cell with another value: the first stays
    _, others = tasks_of(folder, out="other")
    finish(others[1], 0.9)
    finish(others[0], 0.1)
    assert keep(study, others) == 1
    kept = pd.read_csv(folder / "tiny.csv")
    assert kept["value"].tolist() == [0.1, 0.2, 0.4]
    old = next(text for path, text in before.items() if path.name == "tiny.csv").decode().splitlines()
    assert set(old) < set((folder / "tiny.csv").read_text().splitlines()), "rows that were there are the same line by line"


def test_the_table_is_one_that_compare_reads(folder):
    study, tasks = tasks_of(folder)
    finish(tasks[0], 0.1)
    keep(study, tasks)
    assert gather(folder / "tiny.csv") == read_measured(study, [task.cell for task in tasks]).findings()


def test_settings_are_those_of_claims_and_of_the_grid(folder):
    study, _ = load_study(folder / "tiny.yaml")
    assert setting_names(study) == list(USUAL_SETTINGS)
    wider = study.model_copy(update={"grid": [{"settings": [{"flow.noise_std": 0.1}, {"train.lr": 1e-3}]}]})
    assert setting_names(wider)[len(USUAL_SETTINGS) :] == ["flow.noise_std", "train.lr"]


def test_a_session_that_ended_between_the_two_files(folder):
    study, tasks = tasks_of(folder)
    finish(tasks[0], 0.1)
    keep(study, tasks)
    (folder / "tiny.csv").unlink()
    assert read_measured(study, [task.cell for task in tasks]).cells == set()
    assert keep(study, tasks) == 1
    curves = pd.read_csv(curves_path(folder / "tiny.csv"))
    assert len(curves) == 3


# --- bad input --------------------------------------------------------------------------------------------------------


def damage(folder, change):
    study, tasks = tasks_of(folder)
    finish(tasks[0], 0.1)
    finish(tasks[1], 0.2)
    keep(study, tasks)
    path = folder / "tiny.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(LabError) as caught:
        keep(study, tasks)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_cells_with_other_parameters_are_refused(folder):
    message = damage(folder, lambda text: text.replace('""steps"":100', '""steps"":200'))
    assert "line 2 is of no cell of the study" in message
    assert "steps is 200 there and 100 in the study; remove its rows, or restore the study" in message


def test_a_table_of_another_study_is_refused(folder):
    message = damage(folder, lambda text: text.replace("strategy=none", "strategy=other").replace('""none""', '""other""'))
    assert "the study has no cell 'seed=0,strategy=other'; is it the table of another study?" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: text.rindex("parameters") - 20], "has no column"),
        (lambda text: text.replace("0.1,", "0.1x,", 1), "line 2 is damaged: value is '0.1x'"),
        (lambda text: text.replace(',"{', ',"[', 1), "line 2 is damaged: its parameters are not a JSON object"),
        (lambda text: text[:-60] + "\n", "is damaged"),
        (lambda text: text + text.splitlines()[-1] + "\n", "has m of seed=0,strategy=reverse twice"),
        (lambda text: "<<<<<<< HEAD\n" + text, "has no column"),
        (lambda text: "", "is not a CSV file"),
    ],
)
def test_a_damaged_table_is_refused(folder, change, message):
    assert message in damage(folder, change)


def test_damaged_curves_are_refused(folder):
    study, tasks = tasks_of(folder)
    finish(tasks[0], 0.1)
    keep(study, tasks)
    path = curves_path(folder / "tiny.csv")
    right = path.read_text()
    for text, message in (
        (right.replace(",10,c", ",ten,c"), "line 2 is damaged: step is 'ten'"),
        (right + right.splitlines()[-1] + "\n", "is there twice"),
        (right.replace(",10,c", ",,c"), "a point needs step and value"),
    ):
        path.write_text(text)
        with pytest.raises(LabError, match=message):
            with_new(study, tasks)


def test_a_result_whose_curve_is_none(folder):
    study, tasks = tasks_of(folder)
    finish(tasks[0], 0.1)
    path = tasks[0].folder / "result.json"
    path.write_text(path.read_text().replace('"step": 10', '"stop": 10'))
    record = Record(state="done", key=tasks[0].cell.key, notebook="tiny", parameters={}, result_sha256=sha256(path))
    write_record(tasks[0].folder, record)
    with pytest.raises(LabError, match="its curve must be a list"):
        keep(study, tasks)


# --- a batch that goes on ---------------------------------------------------------------------------------------------


def test_measured_cells_are_skipped_and_count_in_the_tables(folder, capsys):
    study, tasks = tasks_of(folder)
    for task, value in zip(tasks, (0.1, 0.2, 0.3, 0.45), strict=True):
        finish(task, value)
    keep(study, tasks)
    out = folder.parent / "second"
    args = ["batch", str(folder / "tiny.yaml"), "--set", "data_path=/here"]
    assert main([*args, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert told.count("measured before") == 5
    assert "4 cells of tiny, 4 measured before (tiny.csv), 0 to run" in told
    assert main([*args, "--out", str(out), "--keep"]) == 0
    told = capsys.readouterr().out
    assert "0 run, 0 done before, 4 measured before, 0 failed" in told
    assert not (out / "cells").exists(), "nothing has run"
    assert pd.read_csv(out / "table.csv")["value"].tolist() == pytest.approx([0.2, 0.325])
    judged = pd.read_csv(out / "verdicts.csv")
    assert judged["verdict"].tolist()[2:] == [NOT_MEASURED, "not testable here: there is one"]
    assert "not measured yet" in (out / "report.html").read_text()
    assert main([*args, "--out", str(out), "--json"]) == 0
    assert [one["state"] for one in json.loads(capsys.readouterr().out)] == ["measured"] * 4


def test_only_the_missing_cells_run(folder):
    study, tasks = tasks_of(folder)
    finish(tasks[0], 0.1)
    finish(tasks[1], 0.2)
    keep(study, tasks)
    measured = read_measured(study, [task.cell for task in tasks]).cells
    notebook = read_notebook(folder / "tiny.ipynb")
    _, again = tasks_of(folder, out="second")
    finish(again[2], 0.3)
    states = {one.name: (one.state, one.ended) for one in run_batch(study, notebook, folder.parent / "second", jobs=1,
                                                                    measured=measured)}  # fmt: skip
    assert [states[task.cell.name] for task in tasks] == [("measured", 1), ("measured", 2), ("skipped", 3), ("failed", 4)]
    table, judged = summarise(study, again, folder.parent / "second")
    assert table["seeds"].tolist() == [2, 1]
    assert judged is not None
    assert judged["seeds"].tolist()[0] == 1


def test_other_parameters_leave_the_table_aside(folder, capsys):
    study, tasks = tasks_of(folder)
    finish(tasks[0], 0.1)
    keep(study, tasks)
    assert main(["batch", str(folder / "tiny.yaml"), "--set", "steps=5", "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "measured before" not in told.out
    assert "--set steps makes other cells" in told.out + told.err
    assert main(["batch", str(folder / "tiny.yaml"), "--set", "steps=5", "--keep", "--out", "x"]) == 2
    assert "leave out --set steps" in capsys.readouterr().err
    assert main(["batch", str(folder / "tiny.ipynb"), "--keep", "--out", "x"]) == 2
    assert "--keep needs a study file that names its table" in capsys.readouterr().err


def test_nothing_measured_is_no_table(folder):
    study, tasks = tasks_of(folder)
    with pytest.raises(LabError, match="nothing of this study is measured yet"):
        summarise(study, tasks, folder.parent / "out")


# --- verdicts and ratios of steps -------------------------------------------------------------------------------------


def curve(values, seed=0, steps=None, **settings):
    return Curve(settings, seed, "c", steps or [10 * (place + 1) for place in range(len(values))], values)


def test_steps_by_linear_interpolation():
    assert steps_to_reach(curve([0.0, 1.0, 2.0]), 1.5, "higher") == 25
    assert steps_to_reach(curve([9.0, 5.0, 4.0]), 6.0, "lower") == 17.5
    assert steps_to_reach(curve([1.0, 3.0, 0.0, 5.0]), 2.0, "higher") == 15, "the first time"
    assert steps_to_reach(curve([3.0, 1.0]), 2.0, "higher") == 10, "no step before the first is known"
    assert steps_to_reach(curve([1.0, math.nan, 3.0]), 2.0, "higher") == 20
    assert math.isnan(steps_to_reach(curve([1.0, 1.5]), 2.0, "higher"))
    with pytest.raises(LabError, match="rising steps"):
        steps_to_reach(curve([1.0, 2.0], steps=[10, 10]), 1.0, "higher")


def test_ratios_are_paired_by_seed():
    none = [curve([0.1, 0.2, 0.4], seed) for seed in (0, 1)]
    fast = [curve([0.4, 0.5, 0.6], 0), curve([0.2, 0.6, 0.7], 1), curve([1, 1, 1], 7)]
    first, second = step_ratios(fast, none, "higher")
    assert (first.target, first.reference_steps, first.steps, first.ratio) == (0.4, 30, 10, 3)
    assert (second.steps, second.ratio) == (pytest.approx(15), pytest.approx(2))
    (slow,) = step_ratios([curve([0.1, 0.2, 0.3])], none[:1], "higher")
    assert math.isnan(slow.ratio)
    with pytest.raises(LabError, match="several settings of the study fit"):
        step_ratios([none[0], none[0]], none, "higher")


def about_steps(ahead="higher"):
    contrast = {"better": {"s": "fast"}, "than": {"s": "none"}}
    return Claim.from_dict({"claim": "f", "metric": "c", "ahead": ahead, "fewer_steps": True, "contrasts": [contrast]})


def test_a_claim_about_steps_has_an_interval_over_seeds():
    none = [curve([0.1, 0.2, 0.4], seed, s="none") for seed in (0, 1, 2)]
    # ratios 3, 2 and 2.4
    fast = [curve(values, seed, s="fast") for seed, values in enumerate(([0.4, 0.5], [0.2, 0.6], [0.3, 0.7]))]
    (row,) = verdicts([], [about_steps()], [*none, *fast]).to_dict("records")
    ratios = [3, 2, 30 / 12.5]
    mean = sum(ratios) / 3
    sd = (sum((one - mean) ** 2 for one in ratios) / 2) ** 0.5
    half = t.ppf(0.975, 2) * sd / 3**0.5
    assert row["difference"] == pytest.approx(mean - 1)
    assert (row["low"], row["high"]) == pytest.approx((mean - 1 - half, mean - 1 + half))
    assert (row["metric"], row["seeds"], row["verdict"]) == ("steps[c]", 3, "reproduced")
    assert photographs.claim_cell(pd.DataFrame([row])).startswith(f"reproduced; {mean:.2f}x [{mean - half:.2f}x")


@pytest.mark.parametrize(("reached", "verdict"), [(1, "undecided"), (0, "not reproduced")])
def test_not_reached_is_a_value(reached, verdict):
    none = [curve([0.1, 0.2], seed, s="none") for seed in (0, 1, 2)]
    fast = [curve([0.2, 0.2] if seed < reached else [0.0, 0.1], seed, s="fast") for seed in (0, 1, 2)]
    judged = verdicts([], [about_steps()], [*none, *fast])
    (row,) = judged.to_dict("records")
    assert row["verdict"] == verdict
    assert f"not reached with {3 - reached} of 3 seeds" in row["unit"]
    assert f"not reached with {3 - reached} of 3 seeds" in photographs.claim_cell(judged)
    assert any("not reached" in line for line in claim_lines(judged))
    assert len(verdict_table(judged)) == 1


def found(name, values, metric="m"):
    return [Finding(name, {"s": name}, seed, metric, value, "", 10, "p") for seed, value in enumerate(values)]


def test_verdicts_of_a_part_of_the_measurements():
    pairs = [{"better": {"s": name}, "than": {"s": "none"}} for name in ("a", "b")]
    both = Claim.from_dict({"claim": "both", "metric": "m", "contrasts": pairs})
    measured = [*found("none", [0, 0, 0]), *found("a", [1, 1.1, 1.2])]
    with pytest.raises(LabError, match="the study has no m for s b"):
        verdicts(measured, [both])
    judged = verdicts(measured, [both], partial=True)
    assert judged["outcome"].tolist() == ["holds", NOT_MEASURED]
    assert set(judged["verdict"]) == set(judged["verdict_holm"]) == {NOT_MEASURED}
    assert judged["p_holm"][0] == pytest.approx(2 * judged["p"][0]), "corrected for the contrast that is still to come"
    assert claim_lines(judged)[2] == "  - not measured yet: s b against s none: m"
    assert verdict_table(judged)["difference"].tolist()[1] == ""
    assert verdicts([*measured, *found("b", [-1, -1.1, -1.2])], [both], partial=True)["verdict"][0] == "not reproduced"
    wrong = verdicts([*found("none", [0, 0, 0]), *found("a", [-1, -1.1, -1.2])], [both], partial=True)
    assert set(wrong["verdict"]) == {"not reproduced"}, "one contrast that is contradicted decides"
    with pytest.raises(LabError, match="fits several settings"):
        verdicts([*measured, *found("a", [1])], [both], partial=True)


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_of_a_part_of_a_study(folder, monkeypatch):
    study, tasks = tasks_of(folder)
    digits = pd.DataFrame([{"claim": "Reverse is more accurate", "source": "37 to 57", "metric": "m", "unit": "", "better": "a",
                            "than": "b", "difference": 0.5, "low": 0.25, "high": 0.75, "d_z": 2.0, "outcome": "holds",
                            "verdict": "reproduced", "verdict_holm": "undecided"}])  # fmt: skip
    _, rows = photographs.claims_side_by_side(digits, [photographs.read_study(folder / "tiny.yaml")])
    assert rows[0] == [
        "Reverse is more accurate",
        "37 to 57",
        "reproduced (with Holm's correction undecided); 0.5 [0.25, 0.75], d_z 2.00",
        "not measured yet",
    ]
    curves = {"none": (1.0, 2.0, 4.0), "reverse": (4.0, 5.0, 6.0)}
    for task, value in zip(tasks[:2], (0.1, 0.3), strict=True):
        finish(task, value, curves[task.cell.parameters["strategy"]])
    keep(study, tasks)
    titles, rows = photographs.claims_side_by_side(digits, [photographs.read_study(folder / "tiny.yaml")])
    assert titles == ["claim", "the paper", "digits", "Tiny (2 of 4 cells)"]
    assert [row[3] for row in rows] == [
        "undecided: one seed; 0.2",
        "undecided: one seed; 3.00x",
        "not measured yet",
        "not testable here",
    ]
    assert [row[2] for row in rows[1:]] == ["-"] * 3
    for task, value in zip(tasks[2:], (0.1, 0.30001), strict=True):
        finish(task, value, curves[task.cell.parameters["strategy"]])
    keep(study, tasks)
    one = photographs.read_study(folder / "tiny.yaml")
    assert photographs.claims_side_by_side(digits, [one])[1][0][3].startswith("reproduced; 0.2 [0.2, 0.2]")
    monkeypatch.setattr(report_photographs, "SCORES", {"m": "accuracy"})
    monkeypatch.setattr(report_photographs, "read_studies", lambda: [one])
    lines = report_photographs.scores().splitlines()
    assert lines[2].split(" | ")[-1] == "accuracy |"
    assert [line.split(" | ")[-1] for line in lines[4:]] == ["0.1000 ± 0.0000 |", "0.3000 ± 0.0000 |"]
    assert "**Tiny**, 4 of 4 cells:" in report_photographs.scores()
    curves_table = one.curves()
    aligned = "reverse, blocks 3,4, layer 2"
    assert curves_table["run"].unique().tolist() == ["none", aligned]
    assert set(curves_table["train_seeds"]) == {2}
    assert curves_table[curves_table["run"] == aligned]["value"].tolist() == [4.0, 5.0, 6.0]
    assert [trace.name for trace in setting_curves(curves_table, "c").data if trace.name] == ["none", aligned]
    monkeypatch.setattr(report_photographs, "read_studies", list)
    assert report_photographs.scores() == report_photographs.NOTHING


SHIPPED = sorted(path.stem for path in (assets() / "studies").glob("cifar10-*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies(name):
    """Claims that can be judged, and what is measured of them: read, and judged again."""
    study, notebook = load_study(name)
    planned = cells(study, notebook)
    seeds: dict[str, list[int]] = {}
    for cell in planned:
        setting = json.dumps({key: value for key, value in cell.parameters.items() if key != "seed"})
        seeds.setdefault(setting, []).append(cell.parameters["seed"])
    assert {tuple(one) for one in seeds.values()} == {(0, 1, 2)}
    assert len({cell.identity for cell in planned}) == len({cell.name for cell in planned}) == len(planned)
    assert not any(Path(str(value)).is_absolute() for cell in planned for value in cell.given.values())
    one = photographs.read_study(assets() / "studies" / f"{name}.yaml")
    judged = one.verdicts()
    assert set(judged["claim"]) == {claim.claim for claim in study.claims}
    known = {"reproduced", "not reproduced", "undecided", NOT_MEASURED, "not testable here"}
    assert {verdict.split(":")[0] for verdict in judged["verdict"]} <= known
    if not one.done:
        assert {verdict.split(":")[0] for verdict in judged["verdict"]} <= {NOT_MEASURED, "not testable here"}
    if study.measured:
        text = (assets() / "studies" / "README.md").read_text(encoding="utf-8")
        assert f"{study.title} ({one.done} of {len(planned)} cells)" in text
    for path in (assets() / "studies").glob(f"{name}*"):
        assert "/home/" not in path.read_text() and "/tmp/" not in path.read_text()  # noqa: PT018


def test_the_claims_of_photographs_are_about_settings_of_the_grid():
    """Every contrast has both its settings among the cells: no claim waits for a cell that is never run."""
    study, notebook = load_study("cifar10-main")
    have = {(one.parameters["strategy"], tuple(one.parameters["align_blocks"]), tuple(one.parameters["align_layers"]),
             one.parameters["align_weight"]) for one in cells(study, notebook)}  # fmt: skip
    for claim in study.claims:
        for contrast in claim.tested():
            for side in (contrast.better, contrast.than):
                if side["align.strategy"] == "none":
                    continue
                assert len(side) == 4, "it must fit one setting"
                assert (side["align.strategy"], *(tuple(side[f"align.{name}"]) for name in ("blocks", "layers")),
                        side["align.weight"]) in have  # fmt: skip


def settings_of_cell(cell):
    """The settings of the run that a cell trains."""
    given = cell.parameters
    changes = {f"align.{name}": given[f"align_{name}"] for name in ("blocks", "layers", "weight")}
    changes |= {"align.strategy": given["strategy"], "train.steps": given["steps"]} | given["settings"] | given["varied"]
    return {
        name: str(as_text(value)) for name, value in settings_of(rl.preset(f"{given['family']}-none").override(changes)).items()
    }


@pytest.mark.parametrize("name", ["cifar10-main", "cifar10-teachers", "cifar10-recipe", "cifar10-latents", "cifar10-large"])
def test_every_side_of_a_contrast_is_one_setting(name):
    """Of the study, or of one that it names in `also`: no claim is ambiguous, and none waits for a cell that is never run."""
    planned = []
    for source in (name, *load_study(name)[0].also):
        study, notebook = load_study(source)
        planned += [settings_of_cell(one) for one in cells(study, notebook) if one.parameters["seed"] == 0]
    sides = [side for claim in load_study(name)[0].claims for one in claim.tested() for side in (one.better, one.than)]
    assert sides
    for side in sides:
        wanted = {key: str(as_text(value)) for key, value in side.items()}
        assert sum(wanted.items() <= settings.items() for settings in planned) == 1, side


def test_claims_use_the_measurements_of_another_study(folder):
    """A study without the setting itself names the study that has it."""
    study, tasks = tasks_of(folder)
    finish(tasks[0], 0.1)
    finish(tasks[1], 0.25)
    keep(study, tasks)
    text = (folder / "tiny.yaml").read_text().replace("tiny.csv", "other.csv").replace("[none, reverse]", "[forward]")
    assert "[forward]" in text
    (folder / "other.yaml").write_text(f"also: [tiny.yaml]\n{text}")
    other = read_study(folder / "other.yaml")
    assert other.done == 0
    alone = read_study(folder / "tiny.yaml").verdicts()
    assert other.verdicts()["difference"].tolist() == pytest.approx(alone["difference"].tolist(), nan_ok=True)
    assert alone["difference"].notna().any()
    (folder / "other.yaml").write_text(f"also: [nothing.yaml]\n{text}")
    with pytest.raises(LabError, match="also names nothing.yaml, which is not there"):
        load_study(folder / "other.yaml")


# --- the cell ---------------------------------------------------------------------------------------------------------


def test_both_readings_have_a_name():
    run = rl.load("digits-none")
    noisy = rl.Run(run.flow, run.config.override({"read.n_noise_samples": 2}), run.classes, run.projectors)
    table = score_run(noisy, samples=0, limit=40, parts=["likelihood", "gradient"], clean=True)
    assert table["metric"].tolist() == ["nats_per_dim", "gradient_accuracy", CLEAN]
    plain = score_run(run, samples=0, limit=40, parts=["gradient"], clean=True)
    assert plain["metric"].tolist() == ["gradient_accuracy"], "it is of clean images already"
    assert table["value"].tolist()[2] == plain["value"].tolist()[0]
    assert "clean images" in table["protocol"][2]
    assert "clean images" not in table["protocol"][1]


def test_checkpoints_are_scored_once(tmp_path):
    run, path = rl.load("digits-none"), tmp_path / "checkpoints.csv"
    assert score_checkpoint(run, 0, path).empty
    table = score_checkpoint(run, 100, path)
    assert table["metric"].tolist() == ["FD[digits]", "KD[digits]"]
    before = path.read_bytes()
    assert len(score_checkpoint(run, 100, path)) == 2
    assert path.read_bytes() == before
    rows = [
        {"step": 10, "loss": 1.0, "nats_per_dim": 1.0, "seconds": 4.0, "similarity": {"a": 0.1, "b": 0.3}},
        {"step": 20, "loss": 1.0, "nats_per_dim": 1.0, "seconds": 9.0, "similarity": {"a": 0.2, "b": 0.4},
         "held_out_accuracy": 0.5},
        {"step": 30, "loss": 1.0, "nats_per_dim": 1.0, "seconds": 3.0, "similarity": {"a": 0.3, "b": 0.5},
         "held_out_accuracy": 0.6},
    ]  # fmt: skip
    Records(tmp_path).rewrite(rows)
    assert training_seconds(tmp_path) == 12, "9 before an interruption, 3 after it"
    scored = pd.DataFrame([{"step": 20, "metric": name, "value": 7.0, "seconds": 2.0} for name in ("FD[x]", "KD[x]")])
    assert training_seconds(tmp_path, scored) == 10
    points = training_curve(tmp_path, scored)
    assert [(one["step"], one["metric"], one["value"]) for one in points] == [
        (20, "held_out_accuracy", 0.5), (30, "held_out_accuracy", 0.6), (20, "similarity", pytest.approx(0.3)),
        (30, "similarity", pytest.approx(0.4)), (20, "FD[x]", 7.0), (20, "KD[x]", 7.0),
    ]  # fmt: skip
    assert training_curve(tmp_path / "nowhere") == []


@pytest.mark.notebooks
def test_two_sessions_of_a_real_study(tmp_path, capsys):
    """Digits through papermill: one setting in the first session, the other in the second, on another machine."""
    text = """\
title: Digits, two sessions
notebook: 02_train_a_tiny_flow
measured: two.csv
parameters: {steps: 20, samples: 100, limit: 60, clean: true, checkpoint_samples: 50, settings: {read.n_noise_samples: 1}}
grid: [{seed: 0, strategy: [none%s]}]
claims:
  - claim: fewer steps
    metric: held_out_accuracy
    fewer_steps: true
    contrasts: [{better: {align.strategy: detach}, than: {align.strategy: none}}]
"""
    path = tmp_path / "two.yaml"
    for session, names in (("first", ""), ("second", ", detach")):
        path.write_text(text % names)
        command = ["batch", str(path), "--out", str(tmp_path / session), "--jobs", "1", "--threads", "1", "--keep"]
        assert main(command) == 0, capsys.readouterr().out
        told = capsys.readouterr().out
        assert ("1 measured before" in told) == bool(names)
    table = pd.read_csv(tmp_path / "two.csv")
    assert table["source"].unique().tolist() == ["seed=0,strategy=none", "seed=0,strategy=detach"]
    assert {"gradient_accuracy", CLEAN, "FD[digits]", "nats_per_dim"} <= set(table["metric"])
    curves = pd.read_csv(tmp_path / "two-curves.csv")
    assert {"held_out_accuracy", "similarity", "FD[digits]", "KD[digits]"} <= set(curves["metric"])
    assert str(tmp_path) not in (tmp_path / "two.csv").read_text() + (tmp_path / "two-curves.csv").read_text()
    assert pd.read_csv(tmp_path / "second" / "verdicts.csv")["seeds"].tolist() == [1]
