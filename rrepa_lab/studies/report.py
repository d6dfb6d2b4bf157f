"""The committed reports: tables and figures between markers, filled from the committed CSV files.

    python -m rrepa_lab.studies.report            fill them
    python -m rrepa_lab.studies.report --check    exit status 1 if a report differs from its tables; writes nothing

The reports are `assets/studies/README.md`, `assets/benchmarks.md`, `assets/processes.md`, `assets/evaluation.md` and, in a
clone, the table of results in README.md. Their text is written by hand; what is between

    <!-- table: NAME -->    and    <!-- end -->        a Markdown table on lines of its own
    <!-- value: NAME -->    and    <!-- end -->        a figure inside a sentence, not at the start of a line: Markdown takes
                                                       a line that starts with a comment out of its paragraph

is replaced. NAME is one of the functions of `report_digits`, `report_layers`, `report_photographs`, `report_evaluation` and
`report_bench`, which read `assets/studies/*.csv`, the study files there and the scores of the bundled runs: after a study or a
benchmark was run again, run this.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from rrepa_lab.errors import LabError, unknown
from rrepa_lab.files import write_text
from rrepa_lab.paths import assets
from rrepa_lab.readers import read_text
from rrepa_lab.studies import report_bench, report_digits, report_evaluation, report_layers, report_photographs
from rrepa_lab.studies.digits import write_sums

TABLES: dict[str, Callable[[], str]] = (
    report_digits.TABLES | report_layers.TABLES | report_bench.TABLES | report_evaluation.TABLES | report_photographs.TABLES
)
VALUES: dict[str, Callable[[], str]] = (
    report_digits.VALUES | report_layers.VALUES | report_bench.VALUES | report_photographs.VALUES
)
_START = re.compile(r"<!-- (table|value): *([^ ]*) *-->")
_MARKED = re.compile(r"(<!-- (table|value): ([\w-]+) -->)(.*?)<!-- end -->", re.DOTALL)


def report_files() -> list[Path]:
    """Paths of the reports; README.md of the clone is one of them, a wheel has none."""
    root = assets()
    top = root.parent / "README.md"
    clone = [top] if (root.parent / "pyproject.toml").is_file() else []
    return [root / "studies" / "README.md", root / "benchmarks.md", root / "processes.md", root / "evaluation.md", *clone]


def fill(text: str, tables: Mapping[str, Callable[[], str]] = TABLES, values: Mapping[str, Callable[[], str]] = VALUES) -> str:
    """The text with everything between markers replaced by what the CSV files give.

    Raises: LabError for an unknown name, or a marker without an end.
    """

    def replace(match: re.Match[str]) -> str:
        start, kind, name, inside = match.groups()
        if _START.search(inside):
            raise LabError(f"{start} has no <!-- end -->")
        known = tables if kind == "table" else values
        if name not in known:
            raise unknown(kind, name, known)
        return f"{start}\n\n{known[name]()}\n\n<!-- end -->" if kind == "table" else f"{start}{known[name]()}<!-- end -->"

    filled = _MARKED.sub(replace, text)
    if len(_START.findall(filled)) != filled.count("<!-- end -->") or len(_START.findall(text)) != len(_MARKED.findall(text)):
        raise LabError("a marker of a table or value has no <!-- end -->, or an end no marker")
    return filled


def outdated() -> list[Path]:
    """The reports that differ from what their tables give."""
    return [path for path in report_files() if fill(read_text(path)) != read_text(path)]


def main(argv: list[str] | None = None) -> int:
    """Command line of this file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit status 1 if a report is out of date")
    given = parser.parse_args(argv)
    changed = outdated()
    for path in changed:
        if given.check:
            print(f"{path} differs from its tables: run python -m rrepa_lab.studies.report", file=sys.stderr)
        else:
            write_text(path, fill(read_text(path)))
            print(path)
    if not given.check:
        write_sums()  # also after an edit of the text by hand
    return int(given.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
