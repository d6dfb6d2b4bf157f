"""The studies on photographs: those study files of assets/studies that name a table of measurements (`measured:`).

Their cells are run by `rrepa-lab batch STUDY --out DIR --set data_path=DIR --keep`, in as many sessions as it takes; what is
measured so far is in the committed tables, and verdicts and scores are computed from these. A claim whose settings were not
measured yet says so.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rrepa_lab.batch.measured import Measured, read_measured, with_also
from rrepa_lab.batch.study import Study, cells, load_study
from rrepa_lab.measurements.claims import NOT_MEASURED, RATIO, verdicts
from rrepa_lab.measurements.compare import tabulate
from rrepa_lab.paths import assets
from rrepa_lab.readers import read_yaml
from rrepa_lab.studies.alignment import name_settings
from rrepa_lab.studies.reading import over_seeds

FIRST = ("cifar10-main", "cifar10-latents", "cifar10-teachers", "cifar10-recipe")  # the order of a report; others follow


class PhotographStudy(NamedTuple):
    """A study with what is measured of it so far."""

    name: str
    study: Study
    cells: int  # of its grid
    measured: Measured

    @property
    def done(self) -> int:
        """Cells that are measured."""
        return len(self.measured.cells)

    def verdicts(self) -> pd.DataFrame:
        """As `measurements.claims.verdicts`, with "not measured yet" where that is so."""
        found, curves = with_also(self.study)
        own, own_curves = self.measured.findings(), self.measured.training_curves()
        return verdicts(own + found, self.study.claims, own_curves + curves, partial=True)

    def curves(self) -> pd.DataFrame:
        """Training curves as `viz.training.setting_curves` draws them: run, metric, step, value, sd, train_seeds.

        A setting is named by what differs among those that are measured, "reverse, blocks 3,4, layer 3".
        """
        curves = self.measured.training_curves()
        names = [one["run"] for one in name_settings([curve.settings for curve in curves])]
        points = [
            {"run": name, "metric": curve.metric, "step": step, "train_seed": curve.seed, "value": value}
            for name, curve in zip(names, curves, strict=True)
            for step, value in zip(curve.steps, curve.values, strict=True)
        ]
        return over_seeds(pd.DataFrame(points))

    def scores(self) -> pd.DataFrame | None:
        """Mean and spread over training seeds, as `rl.compare`; None where nothing is measured."""
        return tabulate(self.measured.findings()) if self.done else None


def read_study(path: Path) -> PhotographStudy:
    """A study and its tables; LabError for a damaged one, see `batch.measured.read_measured`."""
    study, notebook = load_study(path)
    planned = cells(study, notebook)
    return PhotographStudy(path.stem, study, len(planned), read_measured(study, planned))


def read_studies(folder: Path | None = None) -> list[PhotographStudy]:
    """Every study of a folder (assets/studies) that names a table of its measurements, in the order of a report."""
    return list(_read_all(folder or assets() / "studies"))


@cache
def _read_all(folder: Path) -> tuple[PhotographStudy, ...]:
    paths = [path for path in sorted(folder.glob("*.yaml")) if read_yaml(path).get("measured")]
    return tuple(read_study(path) for path in sorted(paths, key=lambda path: _place(path.stem)))


def _place(name: str) -> int:
    return FIRST.index(name) if name in FIRST else len(FIRST)


def claim_cell(rows: pd.DataFrame | None) -> str:
    """Verdict of a claim with the difference of each contrast, its interval and effect size; "-" for a claim not made.

    Args:
        rows: of one claim, from `verdicts`.
    """
    if rows is None or rows.empty:
        return "-"
    verdict, *corrected = verdict_words(rows)
    parts = [effect(row) for row in rows.to_dict("records") if isinstance(row["better"], str)]
    return "; ".join([verdict + "".join(f" ({words})" for words in corrected), *filter(None, parts)])


def verdict_words(rows: pd.DataFrame) -> list[str]:
    """The verdict of a claim, and where Holm's correction changes it "with Holm's correction undecided"."""
    verdict, holm = (_without_reason(str(rows[name].iloc[0])) for name in ("verdict", "verdict_holm"))
    return [verdict] if holm == verdict else [verdict, f"with Holm's correction {holm}"]


def _without_reason(verdict: str) -> str:
    """ "not testable here" alone: why is in the study file."""
    return verdict.split(":", maxsplit=1)[0] if verdict.startswith("not testable") else verdict


def effect(row: Mapping[Any, Any], with_size: bool = True) -> str:
    """One contrast: "0.0123 [0.0045, 0.0201], d_z 1.2", "2.40x [1.80x, 3.00x]"; nothing where it is not measured."""
    value, low, high, d_z = (float(row[name]) for name in ("difference", "low", "high", "d_z"))
    unit = "" if pd.isna(row["unit"]) else str(row["unit"])
    if row["outcome"] == NOT_MEASURED:
        return ""
    if unit.startswith(RATIO):
        missed = unit.partition("; ")[2]
        if pd.isna(value):
            return missed
        shown = f"{value + 1:.2f}x" + ("" if pd.isna(low) else f" [{low + 1:.2f}x, {high + 1:.2f}x]")
        return f"{shown} ({missed})" if missed else shown
    shown = f"{value:.3g}" + ("" if pd.isna(low) else f" [{low:.3g}, {high:.3g}]")
    return f"{shown}, d_z {d_z:.2f}" if with_size and not pd.isna(d_z) else shown


def claims_side_by_side(digits: pd.DataFrame, studies: Sequence[PhotographStudy]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of a table with a row for each claim and a column for each study; claims are matched by their words.

    Args:
        digits: verdicts of the study on digits.
    """
    judged = [(f"{one.study.title} ({one.done} of {one.cells} cells)", one.verdicts()) for one in studies]
    tables = [("digits", digits), *judged]
    rows = []
    for claim in dict.fromkeys(text for _, table in tables for text in table["claim"]):
        own = [table[table["claim"] == claim] for _, table in tables]
        sources = [str(part["source"].iloc[0]) for part in own if len(part) and isinstance(part["source"].iloc[0], str)]
        rows.append([str(claim), sources[0] if sources else "", *(claim_cell(part) for part in own)])
    return ["claim", "the paper", *(title for title, _ in tables)], rows
