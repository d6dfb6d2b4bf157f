"""Notes and tables of the tab "Layers", in Markdown."""

import pandas as pd
from tabs.layers.studies import UNSET, Study, aligned_taps, rows_of, scores_of_setting
from tabs.layers.tables import DIRECTIONS, METRICS

import rrepa_lab as rl
from rrepa_lab.measurements.compare import settings_in
from rrepa_lab.measurements.metrics import metric_of
from rrepa_lab.measurements.spread import spread_text
from rrepa_lab.studies.alignment import unguided

SCORES = {
    "nats_per_dim": "nats/dim, held out", "gradient_accuracy": "accuracy of one gradient step",
    "bayes_accuracy": "accuracy of Bayes' rule", "FD[digits]": metric_of("FD[digits]").label,
    "label_agreement": metric_of("label_agreement").label,
}  # fmt: skip


def _score_label(name: str) -> str:
    """The score, and that lower is better where it is."""
    return SCORES.get(name, name) + (" (lower is better)" if metric_of(name).better == "lower" else "")


def number(value: float, sd: float = float("nan")) -> str:
    """ "0.9120 ± 0.0112"."""
    return spread_text(value, sd)


def best_lines(rows: pd.DataFrame, metric: str) -> dict[str, str]:
    """Where each run is best, with the exact path of the module."""
    if rows.empty or not (rows["layer"] > 0).any():
        return {}
    lines = {}
    for row in rl.best_layer(rows, metric).to_dict("records"):
        where = f"block {row['block']:.0f}, layer {row['layer']:.0f}, `{row['module_path']}`"
        lines[row["run"]] = f"{where}: {number(row['value'], row.get('sd', float('nan')))}"
    return lines


def known_note(rows: pd.DataFrame, remarks: list[str], metric: str) -> str:
    """The best layer of each run, and what is missing."""
    lines = [f"- **{run}** {text}" for run, text in best_lines(rows, metric).items()]
    parts = [f"Best layer by {METRICS[metric]} (★):\n\n" + "\n".join(lines)] if lines else []
    return "\n\n".join([*parts, *remarks])


def compared_note(study: Study, settings: dict[str, dict[str, str]], metric: str, direction: str) -> str:
    """Where A and B were aligned, where they are best, and what is missing."""
    rows = unguided(rows_of(study.layers, settings), metric, direction) if study.layers is not None else pd.DataFrame()
    best = best_lines(rows, metric)
    lines = []
    for name, setting in settings.items():
        paths = ", ".join(f"`{tap.module_path}`" for tap in aligned_taps(setting))
        facts = [f"aligned at {paths}" if paths else "not aligned"]
        if name in best:
            facts.append(f"best at {best[name]}")
        elif study.layers is not None:
            reason = "no layer was aligned, so there is none" if metric == "teacher_cosine" and not paths else "not measured"
            facts.append(f"{METRICS[metric]} on {DIRECTIONS[direction]}: {reason}")
        lines.append(f"- **{name}**: {'; '.join(facts)}")
    if not any(name.startswith("B: ") for name in settings):
        lines.append("- A and B are the same setting: choose another one for B.")
    return "\n\n".join(["\n".join(lines), *study.remarks])


def scores_table(study: Study, settings: dict[str, dict[str, str]]) -> str:
    """Final scores of A and B, one line a metric, with seeds and protocols below."""
    pinned = {name: setting for name, setting in settings.items() if name[:3] in ("A: ", "B: ")}
    cells: dict[str, dict[str, str]] = {}
    protocols, seeds = {}, dict[str, str]()
    for name, setting in pinned.items():
        mine = scores_of_setting(study.scores, setting).dropna(subset=["value"])
        extra = [key for key in settings_in(study.scores) if key not in setting and key != "source"]
        for row in mine.to_dict("records"):
            variant = ", ".join(f"{key.rsplit('.', 1)[-1]} {row[key]}" for key in extra if row[key] != UNSET)
            label = _score_label(row["metric"]) + (f" ({variant})" if variant else "")
            cells.setdefault(label, {})[name] = number(row["value"], row["sd"])
            protocols[label] = f"n = {row['n']:.0f}; {row['protocol']}"
        counts = sorted(set(mine["seeds"]))
        seeds[name] = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))) if counts else "0"
    if not cells:
        return "Nothing was scored for these settings."
    lines = [f"| final score | {' | '.join(pinned)} |", f"|---|{'---|' * len(pinned)}"]
    lines += [f"| {label} | {' | '.join(values.get(name, UNSET) for name in pinned)} |" for label, values in cells.items()]
    lines.append(f"| training seeds (mean ± sd) | {' | '.join(seeds.values())} |")
    return "\n".join(lines) + "\n\n" + "  \n".join(f"<small>{label}: {text}</small>" for label, text in protocols.items())
