"""`rrepa-lab evaluate`: likelihood, accuracy and sample scores of runs, and scores of pictures of any origin."""

import argparse
import re
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.arguments import (
    Commands,
    add_cache,
    add_command,
    add_csv,
    add_device,
    add_noise_samples,
    add_output,
    parse_list,
)
from rrepa_lab.cli.printing import hint, print_facts, print_json, print_rows, sample_options, write_csv
from rrepa_lab.errors import LabError

if TYPE_CHECKING:
    import pandas as pd

    from rrepa_lab.runs.run import Run

SHOWN = ("run", "split", "metric", "value", "low", "high", "unit", "n")  # columns that are printed


def register(commands: Commands) -> None:
    """Add the command."""
    evaluate = add_command(
        commands,
        "evaluate",
        run,
        "Evaluate runs on a split, or pictures against a reference, with the protocol of every number.",
    )
    evaluate.add_argument("run_name", metavar="RUN", nargs="*", help="bundled or local runs, run directories, or Hub ids")
    add_cache(evaluate)
    add_device(evaluate)
    evaluate.add_argument("--split", default="test", help="train, val, test, or several in one table: train,test")
    add_noise_samples(evaluate, default=4, help="noise samples that a likelihood is averaged over")
    evaluate.add_argument(
        "--samples", default="2000", metavar="N|FILE|FOLDER",
        help="images generated for the sample scores (0: none), or pictures to score: a .npz file in ADM's layout, or a folder",
    )  # fmt: skip
    evaluate.add_argument("--parts", default="likelihood,gradient,bayes,samples", help="all, or some of: likelihood, gradient, "
                          "iterated, bayes, probe, samples, nearest")  # fmt: skip
    evaluate.add_argument(
        "--protocol", action="append", metavar="NAME",
        help="of sample scores: encoder (the default), adm, tarflow, or a network: efficientnet-lite2, DIR; can be repeated",
    )  # fmt: skip
    evaluate.add_argument("--reference", metavar="FILE|FOLDER|SPLIT", help="what samples are compared with, in place of the "
                          "protocol's own: a .npz file of statistics or pictures, a folder, or a split")  # fmt: skip
    evaluate.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance weight of the samples")
    evaluate.add_argument("--no-denoise", action="store_true", help="samples without the final denoising step")
    evaluate.add_argument("--seed", type=int, default=0, help="of noise, samples and bootstrap")
    evaluate.add_argument(
        "--limit", type=int, help="class-balanced images of the split, at most; samples are compared with all"
    )
    add_output(
        evaluate, "--save-samples", metavar="FILE.npz", help="also write the samples, uint8 NHWC, as ADM's evaluator reads"
    )
    add_output(evaluate, "--save-reference", metavar="FILE.npz", help="only write the statistics of the reference (or split)")
    add_output(evaluate, "--nearest", metavar="FILE.png", help="also draw the samples closest to a training image, above it")
    evaluate.add_argument("--save", action="store_true", help="write scores.csv and the card into the run directory")
    add_csv(evaluate)


def run(args: argparse.Namespace) -> int:
    """Print the scores, and keep them with the run if --save is given; several processes share the images."""
    from rrepa_lab.processes import process_group

    with process_group(args.device) as place:
        if args.save_reference:
            return _save_reference(args, place.device, place.main)
        if not re.fullmatch(r"[+-]?\d+", args.samples):
            return _score(args, place.device, place.main)
        if not args.run_name:
            raise LabError("name a run, or pictures: --samples FILE.npz --reference REFERENCE.npz")
        if len(args.run_name) > 1 and (args.save_samples or args.nearest):
            raise LabError("--save-samples and --nearest write one file: name one run")
        return _runs(args, place.device, place.main)


def _runs(args: argparse.Namespace, device: str, main: bool) -> int:
    """Evaluate runs, one table for all."""
    import pandas as pd

    from rrepa_lab.evaluation.evaluate import evaluate
    from rrepa_lab.evaluation.run_samples import Sampling
    from rrepa_lab.runs.card import save_scores
    from rrepa_lab.runs.store import load

    sampling = Sampling(int(args.samples), args.seed, args.guidance, denoise=not args.no_denoise)
    tables = []
    for name in args.run_name:
        loaded = load(name, device)
        table = evaluate(
            loaded, parse_list(args.split), sampling, args.noise_samples, args.seed, args.limit, parts=parse_list(args.parts),
            protocols=args.protocol, reference=args.reference, save_samples=args.save_samples,
        )  # fmt: skip
        tables.append(table)
        if args.nearest:
            _draw_nearest(loaded, sampling, args, main)
        if main and args.save and loaded.directory is not None:
            save_scores(loaded, table)
    if not main:
        return 0
    _print(pd.concat(tables, ignore_index=True), args)
    if not args.json:
        hint(args, f"draw samples: rrepa-lab sample {args.run_name[0]} {sample_options(loaded.config.flow.classes)}")
    return 0


def _draw_nearest(loaded: "Run", sampling: Any, args: argparse.Namespace, main: bool) -> None:
    from rrepa_lab.evaluation.nearest import nearest_training
    from rrepa_lab.viz.images import grid, save_picture

    split = next((name for name in parse_list(args.split) if name != "train"), "test")
    found = nearest_training(loaded, sampling, split)
    if main:
        pairs = found.closest(16)
        save_picture(grid(pairs, len(pairs) // 2), args.nearest)


def _score(args: argparse.Namespace, device: str, main: bool) -> int:
    """Score pictures of a file or a folder."""
    from rrepa_lab.evaluation.score import score

    loaded = _only_run(args, device)
    if args.reference is None and loaded is None:
        raise LabError("--samples FILE needs something to compare with: add --reference FILE.npz, or a folder of real pictures")
    reference = args.reference or parse_list(args.split)[-1]
    protocols = args.protocol or ("adm" if loaded is None else "encoder")
    table = score(args.samples, reference, protocols, run=loaded, device=device, seed=args.seed)
    if main:
        _print(table, args)
    return 0


def _save_reference(args: argparse.Namespace, device: str, main: bool) -> int:
    from rrepa_lab.evaluation.protocols import choose
    from rrepa_lab.evaluation.score import save_reference

    loaded = _only_run(args, device)
    source = args.reference or (None if loaded is None else parse_list(args.split)[-1])
    if source is None:
        raise LabError("--save-reference needs pictures: add --reference FOLDER (or FILE.npz), or a run and its --split")
    (chosen, *more) = choose(args.protocol or ("adm" if loaded is None else "encoder"), loaded)
    if more:
        raise LabError("--save-reference writes the statistics of one network: give one --protocol")
    written = save_reference(args.save_reference, source, chosen, run=loaded, device=device)
    facts = {"reference": written.words, "sha256 of the pictures": written.sha256, "pictures": len(written.pictures or ())}
    facts |= {"network": chosen.network.words, "network sha256": chosen.network.sha256, "out": args.save_reference}
    if main:
        print_facts(facts, args.json)
    return 0


def _only_run(args: argparse.Namespace, device: str) -> "Run | None":
    from rrepa_lab.runs.store import load

    if len(args.run_name) > 1:
        raise LabError("pictures are compared with the data of one run at most")
    return load(args.run_name[0], device) if args.run_name else None


def _print(table: "pd.DataFrame", args: argparse.Namespace) -> None:
    """The numbers, and below them what each of them is."""
    write_csv(args.csv, table)
    if args.json:
        print_json(table.to_dict("records"))
        return
    print_rows(table[[name for name in SHOWN if name in table]].to_dict("records"), False, ".4g")
    for line in protocol_lines(table):
        hint(args, line)
    if args.csv is None:
        hint(args, "every protocol column: --csv FILE or --json")


def protocol_lines(table: "pd.DataFrame") -> list[str]:
    """A line for each protocol of a table, with the metrics that it is that of."""
    from rrepa_lab.runs.card import protocol_words

    lines: dict[str, list[str]] = {}
    for row in table.to_dict("records"):
        lines.setdefault(protocol_words(row), []).append(str(row["metric"]))
    return [f"{', '.join(dict.fromkeys(metrics))}: {words}" for words, metrics in lines.items()]
