"""`rrepa-lab push`: upload a run to the Hugging Face Hub."""

import argparse

from rrepa_lab.cli.arguments import Commands, add_command, add_run
from rrepa_lab.cli.printing import hint, print_facts, sample_options


def register(commands: Commands) -> None:
    """Add the command."""
    push = add_command(commands, "push", run, "Upload a run to the Hugging Face Hub, with a model card and samples.")
    add_run(push)
    push.add_argument("repo_id", metavar="OWNER/NAME", help="repository on the Hub; made if there is none")
    push.add_argument("--public", action="store_true", help="make a new repository public, not private")
    push.add_argument("--samples", type=int, default=16, help="images in the picture of the card; 0 for none")
    push.add_argument("--license", default="unknown", help="of the weights, for the card: mit, cc-by-nc-4.0, ...")


def run(args: argparse.Namespace) -> int:
    """Push, and print the address."""
    from rrepa_lab.runs.store import load

    loaded = load(args.run_name, args.device)
    address = loaded.push(args.repo_id, not args.public, samples=args.samples, license=args.license)
    print_facts({"run": loaded.name, "address": address}, args.json)
    hint(args, f"draw samples from there: rrepa-lab sample {args.repo_id} {sample_options(loaded.config.flow.classes)}")
    return 0
