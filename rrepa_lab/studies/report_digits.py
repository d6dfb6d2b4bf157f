"""Tables and figures of the reports about strategies and layer alignment, from the committed CSV files; see `report`."""

from collections.abc import Callable
from functools import partial

import pandas as pd

from rrepa_lab.evaluation.paper import published_table
from rrepa_lab.measurements.claims import CONFIDENCE, UNDECIDED
from rrepa_lab.paths import assets
from rrepa_lab.readers import read_table
from rrepa_lab.runs.presets import ALIGNED
from rrepa_lab.studies.report_layers import LAYERS, encoder_similarity
from rrepa_lab.studies.report_text import between, cell, interval, markdown, spread, study_table

STUDY, STRATEGIES = "digits-layer-alignment", "digits-strategies"
STUDIES = {STRATEGIES: "strategies", STUDY: "layer alignment", LAYERS: "layers"}
# metric -> title of its column, digits after the point
SCORES = {
    "nats_per_dim": ("nats/dim", 4),
    "gradient_accuracy": ("one step", 3),
    "bayes_accuracy": ("Bayes' rule", 4),
    "FD[digits]": ("Fréchet distance", 4),
    "label_agreement": ("labels agree", 3),
}
UNITS = {"nats_per_dim": "nats/dim", "gradient_accuracy": "one step", "FD[digits]": "Fréchet", "cka": "CKA"}


# --- claims -----------------------------------------------------------------------------------------------------------


def all_verdicts() -> str:
    """One row a claim of every study: verdict, and verdict with Holm's correction over that study."""
    rows: list[list[str]] = []
    for metric, contrasts in study_table(f"{STRATEGIES}-verdicts").groupby("metric", sort=False):
        word = contrasts["claim"].iloc[0].split()[3]
        words = {"gradient_accuracy": "one-step accuracy", "bayes_accuracy": "accuracy by Bayes' rule"}
        claim = f"Each strategy has a {word} {words.get(str(metric), SCORES[str(metric)][0])} than no alignment"
        rows.append([STUDIES[STRATEGIES], claim, *(_by_strategy(contrasts, column) for column in ("verdict", "verdict_holm"))])
    for name in (STUDY, LAYERS):
        for text, contrasts in study_table(f"{name}-verdicts").groupby("claim", sort=False):
            first = contrasts.iloc[0]
            rows.append([STUDIES[name], str(text), *(str(first[key]).split(":")[0] for key in ("verdict", "verdict_holm"))])
    return markdown(("study", "claim", "verdict", "with Holm's correction"), rows)


def _by_strategy(contrasts: pd.DataFrame, column: str) -> str:
    """The verdicts of claims that differ in the strategy alone: one word if they agree."""
    if contrasts[column].nunique() == 1:
        return str(contrasts[column].iloc[0])
    return ", ".join(f"{row['better']} {row[column]}" for row in contrasts.to_dict("records"))


def claims(name: str) -> str:
    """One row a contrast: settings, difference with interval, effect size, p; the verdict once for each claim."""
    rows = []
    for claim, contrasts in study_table(f"{name}-verdicts").groupby("claim", sort=False):
        for place, row in enumerate(contrasts.to_dict("records")):
            source = f" ({row['source']})" if isinstance(row["source"], str) else ""
            head = ["", ""] if place else [f"{claim}{source}", str(row["verdict"])]
            if not isinstance(row["better"], str):
                rows.append([*head, "", "", "", "", ""])
                continue
            digits = 4 if row["metric"] == "FD[digits]" else 3
            metric = UNITS.get(row["metric"], row["metric"])
            contrast = f"{row['better']} against {row['than']}".replace(", read ", ": ")
            difference = f"{metric} {interval(row, digits)}"
            rows.append([*head, contrast, difference, f"{row['d_z']:.2f}", f"{row['p']:#.2g}", f"{row['p_holm']:#.2g}"])
    return markdown(("claim", "verdict", "contrast", "difference, 95 % interval", "d_z", "p", "p (Holm)"), rows)


# --- strategies -------------------------------------------------------------------------------------------------------


def strategies() -> str:
    """Mean ± standard deviation over seeds of every score, training beside test images."""
    columns = [
        ("nats_per_dim", "train"),
        ("nats_per_dim", "test"),
        ("gradient_accuracy", "train"),
        ("gradient_accuracy", "test"),
    ]
    columns += [(name, "test") for name in ("bayes_accuracy", "FD[digits]", "label_agreement")]
    table = study_table(STRATEGIES)
    alone = ("FD[digits]", "label_agreement")
    titles = ["run", *(SCORES[name][0] + ("" if name in alone else f", {split}") for name, split in columns)]
    rows = [
        [f"`{run}`", *(spread(part[(part["metric"] == name) & (part["split"] == split)]["value"], SCORES[name][1])
                       for name, split in columns)]
        for run, part in table.groupby("run", sort=False)
    ]  # fmt: skip
    return markdown(titles, rows)


def strategies_short() -> str:
    """The table of README.md: scores on test images."""
    table = study_table(STRATEGIES)
    table = table[table["split"] == "test"]
    layers = study_table(f"{LAYERS}-seeds")
    names = ("nats_per_dim", "gradient_accuracy", "FD[digits]")
    rows = []
    for run, part in table.groupby("run", sort=False):
        scores = [spread(part[part["metric"] == name]["value"], SCORES[name][1]) for name in names]
        rows.append([f"`{run}`", *scores, cell(encoder_similarity(layers, str(run)), 3)])
    return markdown(("run", "nats/dim", "one-step accuracy", "Fréchet distance", "CKA with the encoder"), rows)


def strategy_differences() -> str:
    """Differences from no alignment, paired by seed, positive where the strategy is better."""
    table = study_table(f"{STRATEGIES}-verdicts")
    titles = {"nats_per_dim": "nats/dim lower by", "gradient_accuracy": "one step more accurate by",
              "bayes_accuracy": "Bayes' rule more accurate by", "FD[digits]": "Fréchet distance lower by"}  # fmt: skip
    rows = []
    for strategy, part in table.groupby("better", sort=False):
        found = {row["metric"]: row for row in part.to_dict("records")}
        rows.append([str(strategy), *(interval(found[name], SCORES[name][1]) for name in titles)])
    return markdown(("strategy", *titles.values()), rows)


def one_sided(holm: bool) -> str:
    """How many contrasts of the strategies are decided, "2 of 12": by their intervals, or after Holm's correction."""
    table = study_table(f"{STRATEGIES}-verdicts")
    decided = table["p_holm"] < 1 - CONFIDENCE if holm else table["outcome"] != UNDECIDED
    return f"{int(decided.sum())} of {len(table)}"


def gap(metric: str, digits: int) -> str:
    """Smallest to largest difference of the mean scores between training and test images, over strategies."""
    table = study_table(STRATEGIES)
    means = table[table["metric"] == metric].groupby(["strategy", "split"])["value"].mean().unstack()
    return between((means["train"] - means["test"]).abs(), digits)


def shifts() -> str:
    """Scores on the validation split by the part of the training images that is shifted; one seed."""
    table = study_table("digits-shifts")
    part = table["run"].str.extract(r"shift-([\d.]+)\.")[0]
    rows = []
    for (share, strategy), own in table.groupby([part, "strategy"], sort=False):
        scores = [f"{_value(own, name):.{digits}f}" for name, (_, digits) in SCORES.items()]
        rows.append([f"{100 * float(str(share)):.0f} %", str(strategy), *scores])
    return markdown(("images shifted", "strategy", *(title for title, _ in SCORES.values())), rows)


def search() -> str:
    """Scores on the validation split of every variant of the settings; mean of two seeds."""
    table = study_table("digits-search")
    names = [name for name in SCORES if name in set(table["metric"])]
    rows = [
        [f"`{str(run).rpartition('.')[0]}`", str(strategy), *(f"{_value(own, name):.{SCORES[name][1]}f}" for name in names)]
        for (run, strategy), own in table.groupby(["run", "strategy"], sort=False)
    ]
    return markdown(("variant", "strategy", *(SCORES[name][0] for name in names)), rows)


def _value(table: pd.DataFrame, metric: str) -> float:
    return float(table[table["metric"] == metric]["value"].mean())


# --- layer alignment --------------------------------------------------------------------------------------------------

SETTING = ["align.strategy", "align.blocks", "align.layers"]


def layer_alignment() -> str:
    """Every setting of the study: scores of test images, and the last training report on training images."""
    test, curves = study_table(STUDY), study_table(f"{STUDY}-curves")
    curves = curves[curves["step"] == curves["step"].max()]
    columns = [(curves, "train_nats_per_dim", 4), (test, "nats_per_dim", 4), (curves, "train_accuracy", 3)]
    columns += [
        (test, "gradient_accuracy", 3),
        (test, "bayes_accuracy", 3),
        (test, "FD[digits]", 4),
        (test, "label_agreement", 3),
    ]
    titles = ("strategy", "blocks", "layer", "nats/dim, train", "nats/dim, test", "one step, train", "one step, test",
              "Bayes' rule, test", "Fréchet distance", "labels agree")  # fmt: skip
    rows = []
    for setting in test[SETTING].drop_duplicates().itertuples(index=False):
        cells = [
            cell(table[(table[SETTING] == list(setting)).all(axis=1) & (table["metric"] == metric)].iloc[0], digits)
            for table, metric, digits in columns
        ]
        strategy, blocks, layer = setting
        rows.append([str(strategy), "all" if blocks == "1,2,3,4" else str(blocks).replace(",", ", "), str(layer), *cells])
    return markdown(titles, rows)


def paper_table() -> str:
    """Table 1 of the paper as committed."""
    table = published_table("paper-table-1")
    return markdown(table.columns, table.itertuples(index=False))


def gains(name: str, metric: str, digits: int) -> str:
    """Smallest to largest gain in a score (lower is better) over no alignment, of all settings of a study."""
    table = study_table(name)
    if "split" in table:
        table = table[table["split"] == "test"]
    column = "strategy" if "strategy" in table else "align.strategy"
    keys = [key for key in (column, *SETTING[1:]) if key in table]
    means = table[table["metric"] == metric].groupby(keys)["value"].mean()
    none = means[means.index.get_level_values(0) == "none"].iloc[0]
    return between(
        (none - value for key, value in means.items() if (key[0] if isinstance(key, tuple) else key) != "none"), digits
    )


def holm_smallest(name: str, place: int) -> str:
    """The smallest corrected p of a study, or (place 1) the next."""
    return f"{study_table(f'{name}-verdicts')['p_holm'].dropna().sort_values().iloc[place]:#.2g}"


# --- bundled runs -----------------------------------------------------------------------------------------------------


def bundled() -> str:
    """The stored scores of the bundled runs, seed 0, on test images."""
    rows = []
    for strategy in ALIGNED:
        table = read_table(assets() / "runs" / f"digits-{strategy}" / "scores.csv")
        scores = table[table["split"] == "test"].set_index("metric")["value"]
        rows.append([f"`digits-{strategy}`", *(f"{scores[name]:.{digits}f}" for name, (_, digits) in SCORES.items())])
    return markdown(("bundled run", *(title for title, _ in SCORES.values())), rows)


TABLES: dict[str, Callable[[], str]] = {
    "verdicts": all_verdicts,
    "strategies": strategies,
    "strategies-short": strategies_short,
    "strategies-differences": strategy_differences,
    "shifts": shifts,
    "search": search,
    "layer-alignment": layer_alignment,
    "layer-alignment-claims": partial(claims, STUDY),
    "paper-table-1": paper_table,
    "layers-claims": partial(claims, LAYERS),
    "bundled-runs": bundled,
}
VALUES: dict[str, Callable[[], str]] = {
    "strategies-one-sided": partial(one_sided, False),
    "strategies-one-sided-holm": partial(one_sided, True),
    "gap-nats": partial(gap, "nats_per_dim", 3),
    "gap-accuracy": partial(gap, "gradient_accuracy", 3),
    "gain-nats-500": partial(gains, STUDY, "nats_per_dim", 3),
    "gain-frechet-500": partial(gains, STUDY, "FD[digits]", 4),
    "gain-nats-1500": partial(gains, STRATEGIES, "nats_per_dim", 3),
    "gain-frechet-1500": partial(gains, STRATEGIES, "FD[digits]", 4),
    "holm-layer-alignment-1": partial(holm_smallest, STUDY, 0),
    "holm-layer-alignment-2": partial(holm_smallest, STUDY, 1),
}
