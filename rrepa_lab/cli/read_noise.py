"""`rrepa-lab read-noise`: choose the input noise of classification and probing."""

import argparse

from rrepa_lab.cli.arguments import Commands, add_command, add_noise_samples, add_run, parse_integers, parse_list
from rrepa_lab.cli.printing import hint, print_rows

COLUMNS = ["split", "metric", "n_noise_samples", "noise_std", "value", "standard_error", "n", "protocol", "chosen"]


def register(commands: Commands) -> None:
    """Add the command."""
    noise = add_command(
        commands, "read-noise", run, "Choose the noise added to images in classification and probing, on validation images."
    )
    add_run(noise)
    add_noise_samples(noise, "numbers of samples of the training noise; 0: clean images", type=str, default="0,1,4,16")
    noise.add_argument("--methods", default="gradient", help="of gradient, iterated, bayes; the first decides")
    noise.add_argument("--limit", type=int, default=512, help="number of validation images, class-balanced")
    noise.add_argument("--test", action="store_true", help="also report the first and the chosen number on test images")
    noise.add_argument("--save", action="store_true", help="write the choice to the run's config.json")


def run(args: argparse.Namespace) -> int:
    """Print the accuracy for each number of noise samples and the chosen one, and keep it with the run if --save is given."""
    from rrepa_lab.analysis.noise_choice import choose_read_noise, save_read_noise
    from rrepa_lab.runs.store import load

    loaded = load(args.run_name, args.device)
    counts = parse_integers("--noise-samples", args.noise_samples)
    table = choose_read_noise(loaded, counts=counts, methods=parse_list(args.methods), limit=args.limit, test=args.test)
    if args.save:
        save_read_noise(loaded, table)
    print_rows(table.to_dict("records") if args.json else table[COLUMNS].to_dict("records"), args.json)
    if not args.save:
        hint(args, f"keep this choice with the run: rrepa-lab read-noise {args.run_name} --save")
    return 0
