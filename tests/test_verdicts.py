"""Verdicts of three values: intervals, effect sizes, Holm's correction, monotone claims, and where they are shown."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from rrepa_lab.batch.study import Study, load_study
from rrepa_lab.batch.summary import claims_markdown
from rrepa_lab.cli.batch import print_verdicts
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.compare import gather
from rrepa_lab.measurements.claims import COLUMNS, Claim, claim_lines, verdict_table, verdicts
from rrepa_lab.measurements.compare import Finding, tabulate
from rrepa_lab.paths import assets
from rrepa_lab.viz.comparison import report

STUDY = "digits-layer-alignment"


def measured(metric="m", **settings):
    """Findings of several settings: name=values over training seeds 0, 1, ..."""
    return [
        Finding(f"{name}-{seed}", {"align.strategy": name}, seed, metric, value, "nats", 10, "p")
        for name, values in settings.items()
        for seed, value in enumerate(values)
    ]


def claim(*pairs, ahead="higher", metric="m", name="c", **more):
    contrasts = [{"better": {"align.strategy": a}, "than": {"align.strategy": b}} for a, b in pairs]
    return Claim.from_dict({"claim": name, "metric": metric, "ahead": ahead, "contrasts": contrasts, **more})


def judge(found, *claims):
    return verdicts(found, claims)


# --- one contrast -----------------------------------------------------------------------------------------------------

ABOVE, BELOW, AROUND = [1.0, 1.2, 1.1, 0.9], [-1.0, -1.2, -1.1, -0.9], [1.0, -0.4, 0.7, -0.2]


@pytest.mark.parametrize("ahead", ["higher", "lower"])
@pytest.mark.parametrize(
    ("differences", "outcome", "verdict"),
    [(ABOVE, "holds", "reproduced"), (BELOW, "contradicted", "not reproduced"), (AROUND, "undecided", "undecided")],
)
def test_the_interval_decides_between_three_outcomes(ahead, differences, outcome, verdict):
    sign = 1 if ahead == "higher" else -1
    base = [10.0, 20.0, -5.0, 3.0]  # training seeds differ far more than the settings do
    found = measured(none=base, reverse=[b + sign * d for b, d in zip(base, differences, strict=True)])
    (row,) = judge(found, claim(("reverse", "none"), ahead=ahead)).to_dict("records")
    again = ttest_rel(differences, np.zeros(4))
    low, high = again.confidence_interval(0.95)
    assert (row["low"], row["high"], row["p"]) == pytest.approx((low, high, again.pvalue), abs=1e-9)
    assert row["d_z"] == pytest.approx(np.mean(differences) / np.std(differences, ddof=1))
    assert row["difference"] == pytest.approx(np.mean(differences)), "positive where the claim is right"
    assert (row["outcome"], row["verdict"], row["seeds"], row["unit"]) == (outcome, verdict, 4, "nats")
    assert row["holds"] is (outcome == "holds")


def test_a_one_sided_bound_is_not_enough():
    """The mean of three differences is 2 standard deviations from zero: 95 % one-sided, but the interval contains zero."""
    differences = [1.0, 2.0, 3.0]
    assert ttest_rel(differences, [0, 0, 0], alternative="greater").pvalue < 0.05
    (row,) = judge(measured(none=[0, 0, 0], reverse=differences), claim(("reverse", "none"))).to_dict("records")
    assert row["low"] < 0
    assert row["outcome"] == row["verdict"] == "undecided"


@pytest.mark.parametrize("value", [5.0, 0.0, -5.0])
def test_one_seed_never_gives_a_verdict(value):
    (row,) = judge(measured(none=[0.0], reverse=[value]), claim(("reverse", "none"))).to_dict("records")
    assert (row["outcome"], row["verdict"], row["verdict_holm"]) == ("undecided", "undecided: one seed", "undecided: one seed")
    assert not row["holds"]
    assert not row["holds_holm"]
    assert all(math.isnan(row[name]) for name in ("sd", "low", "high", "d_z", "p", "p_holm"))


def test_only_seeds_that_both_settings_have_count_and_only_values_that_exist():
    found = measured(none=[0, 0, 0, 0], reverse=[1.0, math.nan, 1.2])
    (row,) = judge(found, claim(("reverse", "none"))).to_dict("records")
    assert row["seeds"] == 2
    assert row["difference"] == pytest.approx(1.1)
    missing = measured(none=[0, 0], reverse=[math.nan, math.nan])
    with pytest.raises(LabError, match="share no training seed in which m was measured"):
        judge(missing, claim(("reverse", "none")))


def test_equal_differences_have_an_interval_of_no_width():
    rows = judge(measured(a=[0, 1], b=[0, 1], c=[1, 2]), claim(("a", "b")), claim(("c", "b"), name="d")).to_dict("records")
    assert [(row["outcome"], row["p"]) for row in rows] == [("undecided", 1.0), ("holds", 0.0)]
    assert rows[0]["d_z"] == 0
    assert rows[1]["d_z"] == math.inf


# --- several contrasts of a claim -------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcomes", list(itertools.product(("holds", "contradicted", "undecided"), repeat=2)))
def test_a_claim_needs_all_its_contrasts_and_falls_with_one(outcomes):
    kinds = {"holds": ABOVE, "contradicted": BELOW, "undecided": AROUND}
    found = measured(none=[0.0] * 4, a=kinds[outcomes[0]], b=kinds[outcomes[1]])
    judged = judge(found, claim(("a", "none"), ("b", "none")))
    expected = "reproduced" if outcomes == ("holds", "holds") else "undecided"
    expected = "not reproduced" if "contradicted" in outcomes else expected
    assert judged["outcome"].tolist() == list(outcomes)
    assert set(judged["verdict"]) == {expected}


def test_a_contrast_of_one_seed_keeps_a_claim_undecided_but_not_from_being_contradicted():
    found = measured(none=[0.0] * 4, good=ABOVE, bad=BELOW, single=[9.0])
    assert set(judge(found, claim(("good", "none"), ("single", "none")))["verdict"]) == {"undecided: one seed"}
    assert set(judge(found, claim(("bad", "none"), ("single", "none")))["verdict"]) == {"not reproduced"}


def ladder(*names, **more):
    return claim(monotone=[{"align.strategy": name} for name in names], **more)


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_a_monotone_claim_has_all_its_steps_as_contrasts(direction):
    sign = 1 if direction == "higher" else -1
    noise = [0.0, 0.1, -0.1, 0.05]

    def at(level, shift=0):
        return [sign * level + noise[(seed + shift) % 4] for seed in range(4)]

    rising = measured(one=at(1), two=at(2, 1), three=at(3, 2), four=at(4))
    judged = judge(rising, ladder("one", "two", "three", "four", ahead=direction))
    assert list(zip(judged["better"], judged["than"], strict=True)) == [("two", "one"), ("three", "two"), ("four", "three")]
    assert set(judged["verdict"]) == {"reproduced"}
    # the ends are in order and a step between them is not
    peaked = measured(one=at(1), two=at(3, 1), three=at(2, 2))
    assert judge(peaked, claim(("three", "one"), ahead=direction))["verdict"].tolist() == ["reproduced"]
    judged = judge(peaked, ladder("one", "two", "three", ahead=direction))
    assert judged["outcome"].tolist() == ["holds", "contradicted"]
    assert set(judged["verdict"]) == {"not reproduced"}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"monotone": [{"a": 1}], "metric": "m"}, "needs at least 2"),
        ({"monotone": [{"a": 1}, {"a": 1}], "metric": "m"}, "stands on both sides"),
        ({"contrasts": [{"better": {"a": 1}, "than": {"a": 1}}], "metric": "m"}, "stands on both sides"),
        ({"monotone": [{"a": 1}, {"a": 2}]}, "names no metric"),
        ({"monotone": [{"a": 1}, {"a": 2}], "metric": "m", "not_testable": "why"}, "needs either"),
        ({"metric": "m"}, "needs either"),
    ],
)
def test_claims_that_are_incomplete_are_refused(given, match):
    with pytest.raises(LabError, match=match):
        Study.from_dict({"notebook": "n.ipynb", "claims": [{"claim": "c", **given}]})


# --- Holm -------------------------------------------------------------------------------------------------------------


def test_holm_corrects_over_all_contrasts_of_the_study():
    spread = np.array([1.0, -1.0, 0.5, -0.5, 0.2, -0.2])
    values = {f"s{number}": (spread + shift).tolist() for number, shift in enumerate((3.0, 0.9, 0.8, 0.2))}
    found = measured(none=[0.0] * 6, **values) + measured("other", none=[0.0] * 6, s0=values["s0"])
    claims = [claim((name, "none"), name=name) for name in values] + [claim(("s0", "none"), metric="other", name="again")]
    judged = verdicts(found, claims)
    p = judged["p"].to_numpy()
    assert p == pytest.approx([ttest_rel(v, [0] * 6).pvalue for v in [*values.values(), values["s0"]]])
    # reject while the i-th smallest p is at most alpha / (m - i): the definition, for many alphas
    order = np.argsort(p, kind="stable")
    for alpha in np.linspace(0.001, 0.999, 500):
        rejected = set()
        for rank, index in enumerate(order):
            if p[index] > alpha / (len(p) - rank):
                break
            rejected.add(index)
        assert rejected == {index for index, value in enumerate(judged["p_holm"]) if value <= alpha}
    assert (judged["holds"] & ~judged["holds_holm"]).any(), "what holds alone need not hold among many"
    assert judged["holds_holm"].any()
    assert (judged["verdict"] != judged["verdict_holm"]).any()


def test_a_contrast_that_two_claims_share_is_one_hypothesis():
    found = measured(none=[0.0] * 4, a=ABOVE)
    once = judge(found, claim(("a", "none")))
    twice = judge(found, claim(("a", "none")), claim(("none", "a"), name="the reverse"))
    assert twice["p_holm"].tolist() == [once["p_holm"][0]] * 2 == [once["p"][0]] * 2
    assert twice["verdict_holm"].tolist() == ["reproduced", "not reproduced"]


# --- the shipped study ------------------------------------------------------------------------------------------------


def test_the_shipped_verdicts_are_recomputed_from_the_shipped_measurements():
    """Every column of the file, from the measurements and the study file beside it."""
    study, _ = load_study(STUDY)
    judged = verdicts(gather(assets() / "studies" / f"{STUDY}-runs.csv"), study.claims)
    shipped = pd.read_csv(assets() / "studies" / f"{STUDY}-verdicts.csv")
    assert tuple(shipped.columns) == COLUMNS
    pd.testing.assert_frame_equal(judged, shipped, rtol=1e-5, atol=1e-9, check_dtype=False)
    kinds = {verdict.split(":")[0] for verdict in shipped["verdict"]}
    assert kinds <= {"reproduced", "not reproduced", "undecided", "not testable here"}


def test_the_claims_about_depth_have_every_step_of_the_layers():
    study, _ = load_study(STUDY)
    deeper = [one for one in study.claims if one.claim.startswith("A deeper layer")]
    assert len(deeper) == 2
    for one in deeper:
        steps = [(pair.than["align.layers"], pair.better["align.layers"]) for pair in one.tested()]
        assert steps == [([1], [2]), ([2], [3])]


# --- where they are shown ---------------------------------------------------------------------------------------------


def test_numbers_stand_beside_every_verdict_wherever_it_is_shown(capsys):
    found = measured(none=[0.0] * 4, a=ABOVE, b=AROUND, single=[1.0])
    not_testable = Claim.from_dict({"claim": "t", "source": "s", "not_testable": "no teacher"})
    judged = judge(
        found, claim(("a", "none")), claim(("b", "none"), name="d"), claim(("single", "none"), name="e"), not_testable
    )
    first = judged.iloc[0]
    difference = f"{first['difference']:+.3g} [{first['low']:+.3g}, {first['high']:+.3g}] nats"
    numbers = [difference, f"{first['d_z']:+.2f}", f"{first['p']:.3g}", f"{first['p_holm']:.3g}"]
    print_verdicts(judged)
    places = {
        "markdown": claims_markdown(judged),
        "page": report(tabulate(found), "title", "", judged),
        "command": capsys.readouterr().out,
        "table": verdict_table(judged).to_string(),
    }
    for where, text in places.items():
        for number in [*numbers, "reproduced", "undecided: one seed", "not testable here: no teacher"]:
            assert number in text, f"{number} is missing in the {where}"
    assert len([line for line in claim_lines(judged) if line.startswith("- ")]) == 4
    assert len([line for line in claim_lines(judged) if line.startswith("  - ")]) == 3
