"""`rrepa-lab classify`: classify pictures, or a whole split, with a flow."""

import argparse
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.arguments import Commands, add_command, add_csv, add_noise_samples, add_run, parse_integers
from rrepa_lab.cli.pictures import load_pictures
from rrepa_lab.cli.printing import hint, print_json, print_rows, print_table, write_csv
from rrepa_lab.errors import LabError

if TYPE_CHECKING:
    from rrepa_lab.analysis.report import ClassificationReport
    from rrepa_lab.runs.run import Run

MAX_MATRIX = 20  # classes whose confusion matrix is printed


def register(commands: Commands) -> None:
    """Add the command."""
    classify = add_command(commands, "classify", run, "Classify pictures, or a whole split, with a flow.")
    add_run(classify)
    classify.add_argument("images", nargs="*", metavar="IMAGE", help="picture files")
    classify.add_argument("--split", help="classify a split instead, and report accuracy, confusion and calibration")
    classify.add_argument("--limit", type=int, help="number of images of the split, class-balanced (none: all)")
    classify.add_argument("--method", default="gradient", help="gradient, bayes or iterated")
    add_noise_samples(classify, "noise samples to average over; 0: clean images (none: the run's setting)")
    classify.add_argument("--blocks", help="blocks that are conditioned on the label: 4, or 3..4 (none: all)")
    classify.add_argument("--steps", type=int, default=20, help="iterated: gradient steps at most")
    classify.add_argument("--step-size", type=float, default=0.3, help="iterated: change of a logit per nat per logit")
    classify.add_argument("--seed", type=int, default=0, help="of the noise")
    add_csv(classify)


def run(args: argparse.Namespace) -> int:
    """Classify the picture files, or the images of --split."""
    from rrepa_lab.analysis.classify import Ascent
    from rrepa_lab.analysis.noise import NoiseSamples
    from rrepa_lab.runs.store import load

    if bool(args.images) == bool(args.split):
        raise LabError("give picture files, or --split test")
    loaded = load(args.run_name, args.device)
    settings: dict[str, Any] = {
        "noise": NoiseSamples(args.noise_samples, seed=args.seed),
        "blocks": parse_integers("--blocks", args.blocks) if args.blocks else None,
        "ascent": Ascent(args.steps, args.step_size),
    }
    if args.split:
        _classify_split(args, loaded, settings)
    else:
        _classify_pictures(args, loaded, settings)
    return 0


def _classify_pictures(args: argparse.Namespace, loaded: "Run", settings: dict[str, Any]) -> None:
    """One row per picture: the class, the runner-up and the margin between them; with --json the scores of all classes."""
    import pandas as pd

    from rrepa_lab.analysis.classify import classify

    x, changes = load_pictures(loaded, args.images)
    result = classify(loaded, x, args.method, **settings)
    rows: list[dict[str, Any]] = []
    for path, change, scores, label, runner_up, margin, probability in zip(
        args.images, changes, result.scores.tolist(), result.label.tolist(), result.top(2).labels[:, -1].tolist(),
        result.margin.tolist(), result.probability.amax(dim=1).tolist(), strict=True,
    ):  # fmt: skip
        row = {"image": path, "label": loaded.classes[label], "margin": margin, "runner_up": loaded.classes[runner_up]}
        row |= {"confidence": probability, "method": args.method} | ({"prepared": change} if any(changes) else {})
        rows.append({**row, "scores": dict(zip(loaded.classes, scores, strict=True))} if args.json else row)
    write_csv(args.csv, pd.DataFrame(rows).drop(columns="scores", errors="ignore"))
    print_rows(rows, args.json)
    hint(args, f"classify a whole split: rrepa-lab classify {args.run_name} --split test")


def _print_confusion(report: "ClassificationReport", classes: list[str]) -> None:
    """The confusion matrix; of more than MAX_MATRIX classes the most frequent answers to each."""
    counts = {str(name): rows["count"].tolist() for name, rows in report.confusion.groupby("class", sort=False)}
    known = {row["class"]: row for row in report.per_class.to_dict("records")}
    rows: list[list[Any]] = []
    if len(classes) <= MAX_MATRIX:
        print("rows: true class; columns: predicted class\n")
        rows = [[name, *counts[name], known[name]["accuracy"] if name in known else None] for name in classes]
        print_table(rows, ["class", *classes, "accuracy"])
        return
    for name, row in known.items():
        most = sorted(zip(counts[name], classes, strict=True), key=lambda pair: -pair[0])[:3]
        answers = ", ".join(f"{answer} {count}" for count, answer in most if count)
        rows.append([name, row["accuracy"], row["n"], answers])
    print_table(rows, ["class", "accuracy", "n", "most frequent answers"])
    print("\nall pairs of classes: --json")


def _classify_split(args: argparse.Namespace, loaded: "Run", settings: dict[str, Any]) -> None:
    """Accuracy and calibration, then the confusion matrix; with --json all four tables."""
    from rrepa_lab.analysis.features import Images
    from rrepa_lab.analysis.report import classification_report

    report = classification_report(loaded, args.method, images=Images(args.split, limit=args.limit), **settings)
    write_csv(args.csv, report.images)
    if args.json:
        print_json({name: table.to_dict("records") for name, table in report._asdict().items() if name != "images"})
        return
    print_rows(report.summary[["metric", "value", "standard_error", "n"]].to_dict("records"), False)
    about = report.summary.iloc[0]
    print(f"\n{loaded.name}, {args.method}, split {about['split']}; {about['data']}, {about['space']}\n")
    _print_confusion(report, loaded.classes)
    hint(args, f"compare with probes of every layer: rrepa-lab probe {args.run_name} --classifiers gradient,bayes")
