"""The committed reports say what the committed tables say."""

import re

import pandas as pd
import pytest

from rrepa_lab.errors import LabError
from rrepa_lab.paths import assets
from rrepa_lab.studies import report
from rrepa_lab.studies.report_text import interval, markdown, spread


def test_the_committed_reports_follow_from_the_committed_tables():
    assert report.outdated() == [], "run python -m rrepa_lab.studies.report"


def test_every_table_and_value_is_in_a_report():
    text = "".join(path.read_text(encoding="utf-8") for path in report.report_files())
    found = set(re.findall(r"<!-- (table|value): ([\w-]+) -->", text))
    assert found == {("table", name) for name in report.TABLES} | {("value", name) for name in report.VALUES}


def test_no_line_of_text_starts_with_a_value():
    """Markdown takes a line that starts with a comment out of its paragraph."""
    for path in report.report_files():
        assert not re.search(r"^\s*<!-- value", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_what_stands_between_markers_is_replaced():
    tables, values = {"t": lambda: "| a |"}, {"v": lambda: "0.5"}
    text = "A\n<!-- table: t -->\nold\n<!-- end -->\nis <!-- value: v -->0.4<!-- end -->, <!-- value: v --><!-- end -->."
    value = "<!-- value: v -->0.5<!-- end -->"
    filled = report.fill(text, tables, values)
    assert filled == f"A\n<!-- table: t -->\n\n| a |\n\n<!-- end -->\nis {value}, {value}."
    assert report.fill(filled, tables, values) == filled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nothing --><!-- end -->", "unknown table 'nothing'"),
        ("<!-- value: t --><!-- end -->", "unknown value 't'"),
        ("<!-- table: t -->", "no <!-- end -->"),
        ("<!-- table: t --> <!-- value: v --><!-- end -->", "no <!-- end -->"),
        ("<!-- end -->", "an end no marker"),
        ("<!-- table:t --><!-- end -->", "no <!-- end -->"),
    ],
)
def test_markers_that_are_wrong(text, message):
    with pytest.raises(LabError, match=message):
        report.fill(text, {"t": str}, {"v": str})


def test_check_finds_a_changed_figure_and_writes_nothing(tmp_path, monkeypatch, capsys):
    right = (assets() / "studies" / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    wrong = right.replace("0.935 ± 0.010", "0.953 ± 0.010", 1)
    copy.write_text(wrong, encoding="utf-8")
    sums: list[bool] = []
    monkeypatch.setattr(report, "report_files", lambda: [copy])
    monkeypatch.setattr(report, "write_sums", lambda: sums.append(True))
    assert report.main(["--check"]) == 1
    assert "differs from its tables" in capsys.readouterr().err
    assert copy.read_text(encoding="utf-8") == wrong
    assert not sums
    assert report.main([]) == 0
    assert copy.read_text(encoding="utf-8") == right
    assert sums
    assert report.main(["--check"]) == 0


def test_conventions_of_the_figures():
    """Mean ± sample standard deviation; a difference with its interval; no minus on zero."""
    assert spread(pd.Series([1.0, 2.0, 3.0]), 2) == "2.00 ± 1.00"
    assert interval({"difference": 0.0123, "low": -0.0001, "high": 0.0247}, 3) == "0.012 [0.000, 0.025]"
    assert markdown(("a", "b"), [(1, "x")]) == "| a | b |\n|---|---|\n| 1 | x |"


def test_a_table_against_its_file():
    """One row by hand, from the rows of the file."""
    scores = pd.read_csv(assets() / "studies" / "digits-strategies.csv")
    own = scores[(scores["run"] == "digits-detach") & (scores["split"] == "test") & (scores["metric"] == "FD[digits]")]
    assert len(own) == 5
    mean = sum(own["value"]) / 5
    sd = (sum((value - mean) ** 2 for value in own["value"]) / 4) ** 0.5
    (row,) = [line for line in report.TABLES["strategies"]().splitlines() if "digits-detach" in line]
    assert row.split(" | ")[6] == f"{mean:.4f} ± {sd:.4f}"


def test_every_contrast_and_claim_of_the_verdicts_is_there():
    for name, table in (("digits-layer-alignment", "layer-alignment-claims"), ("digits-layers", "layers-claims")):
        judged = pd.read_csv(assets() / "studies" / f"{name}-verdicts.csv")
        lines = report.TABLES[table]().splitlines()[2:]
        assert len(lines) == len(judged)
        for claim, verdict in judged.groupby("claim", sort=False)["verdict"].first().items():
            assert sum(line.startswith(f"| {claim}") and f"| {verdict} |" in line for line in lines) == 1, claim
            assert f"| {claim} | {verdict.split(':')[0]} |" in report.TABLES["verdicts"]()
