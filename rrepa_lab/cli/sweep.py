"""`rrepa-lab sweep`: guidance and denoising chosen on the validation split, reported on the test split."""

import argparse

from rrepa_lab.cli.arguments import Commands, add_command, add_csv, add_run, parse_list
from rrepa_lab.cli.printing import hint, print_json, print_rows, write_csv
from rrepa_lab.errors import LabError

SHOWN = ("split", "guidance", "strength", "metric", "value", "low", "high", "n", "chosen")


def register(commands: Commands) -> None:
    """Add the command."""
    sweep = add_command(
        commands, "sweep", run, "Choose guidance and denoising on the validation split, and report on the test."
    )
    add_run(sweep)
    sweep.add_argument("--guidance", default="0,0.5,1,2,3", help="weights; the first one is what the best is compared with")
    sweep.add_argument("--strength", default="1", help="of the denoising step")
    sweep.add_argument("--samples", type=int, default=2000, help="of every setting")
    sweep.add_argument("--by", default="FD", help="what decides: FD, KD, sFD, precision, recall, label_agreement")
    sweep.add_argument("--protocol", metavar="NAME", help="encoder (the default), or a network: efficientnet-lite2, DIR")
    sweep.add_argument("--seed", type=int, default=0, help="of the first sample")
    add_csv(sweep)


def run(args: argparse.Namespace) -> int:
    """Print every setting on the validation split, and the first and the chosen one on the test split."""
    from rrepa_lab.evaluation.sweep import choose_sampling
    from rrepa_lab.measurements.metrics import family_of
    from rrepa_lab.runs.store import load

    guidances, strengths = (_numbers(name, getattr(args, name)) for name in ("guidance", "strength"))
    table = choose_sampling(
        load(args.run_name, args.device), guidances=guidances, strengths=strengths, samples=args.samples, by=args.by,
        seed=args.seed, protocols=args.protocol,
    )  # fmt: skip
    write_csv(args.csv, table)
    if args.json:
        print_json(table.to_dict("records"))
        return 0
    rows = table[table["metric"].map(family_of) == family_of(args.by)]
    print_rows(rows[list(SHOWN)].to_dict("records"), False, ".4g")
    best = rows[rows["chosen"]].iloc[0]
    hint(args, f"{rows['protocol'].iloc[0]}; interval {rows['interval'].iloc[0] or 'none'}; all metrics: --csv FILE")
    hint(args, f"score it: rrepa-lab evaluate {args.run_name} --guidance {best['guidance']:g}")
    return 0


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in parse_list(text)]
    except ValueError:
        raise LabError(f"--{name} takes numbers such as 0,0.5,1, not {text!r}") from None
