"""`rrepa-lab evaluate`: likelihood, accuracy and sample scores of a run."""

import argparse

from rrepa_lab.cli.arguments import Commands, add_command, add_noise_samples, add_run, parse_list
from rrepa_lab.cli.printing import hint, print_rows, sample_options


def register(commands: Commands) -> None:
    """Add the command."""
    evaluate = add_command(commands, "evaluate", run, "Evaluate a run on a split, with the protocol of every number.")
    add_run(evaluate)
    evaluate.add_argument("--split", default="test", help="train, val, test, or several in one table: train,test")
    add_noise_samples(evaluate, default=4, help="noise samples that a likelihood is averaged over")
    evaluate.add_argument("--samples", type=int, default=2000, help="images generated for the sample scores; 0 for none")
    evaluate.add_argument(
        "--limit", type=int, help="class-balanced images of the split, at most; samples are compared with all"
    )
    evaluate.add_argument("--save", action="store_true", help="write scores.csv and the card into the run directory")


def run(args: argparse.Namespace) -> int:
    """Print the scores, and keep them with the run if --save is given; several processes share the images."""
    from rrepa_lab.evaluation.evaluate import evaluate
    from rrepa_lab.processes import process_group
    from rrepa_lab.runs.card import save_scores
    from rrepa_lab.runs.store import load

    with process_group(args.device) as place:
        loaded = load(args.run_name, place.device)
        table = evaluate(loaded, parse_list(args.split), args.samples, args.noise_samples, limit=args.limit)
    if not place.main:
        return 0
    if args.save and loaded.directory is not None:
        save_scores(loaded, table)
    print_rows(table.to_dict("records"), args.json)
    if args.samples and "frechet_distance" not in set(table["metric"]):
        hint(args, f"samples were not scored: no evaluator of {loaded.config.data.words} is bundled")
    hint(args, f"draw samples: rrepa-lab sample {args.run_name} {sample_options(loaded.config.flow.classes)}")
    return 0
