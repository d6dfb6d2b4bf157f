"""`rrepa-lab compare`: one table of several runs, batches and notebook results."""

import argparse
from pathlib import Path

from rrepa_lab.cli.arguments import Commands, add_command, add_csv, add_output
from rrepa_lab.cli.printing import hint, print_json, print_rows, write_csv
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_text


def register(commands: Commands) -> None:
    """Add the command."""
    compare = add_command(commands, "compare", run, "Compare runs, batches and notebook results in one table.")
    compare.add_argument("sources", nargs="+", metavar="DIR", help="folder with results, run directory, or name of a run")
    compare.add_argument("--each", action="store_true", help="one row per measurement, not the mean over training seeds")
    compare.add_argument("--apart", action="store_true", help="one column per protocol of a metric")
    compare.add_argument(
        "--beside", action="append", default=[], metavar="TABLE", help="a published table: paper-table-1, main-imagenet64, ..."
    )
    add_csv(compare)
    add_output(compare, "--markdown", metavar="FILE", help="also write a Markdown table, one row per setting")
    add_output(compare, "--html", metavar="FILE", help="also write a self-contained HTML page with figures")


def run(args: argparse.Namespace) -> int:
    """Print mean and spread over training seeds, or every measurement, and write the requested files."""
    from rrepa_lab.evaluation.compare import gather, published
    from rrepa_lab.measurements.compare import markdown, protocols, tabulate, wide

    beside = published(args.beside)
    found = [*gather(args.sources), *beside]
    try:
        table = tabulate(found, apart=args.apart)
        each = tabulate(found, over_seeds=False, apart=args.apart)
    except LabError as error:
        raise LabError(f"{error}; --apart gives each a column of its own") from None
    chosen = each if args.each else table
    write_csv(args.csv, chosen)
    if args.markdown:
        write_text(Path(args.markdown), markdown(table))
    if args.html:
        from rrepa_lab.viz.comparison import report

        write_text(Path(args.html), report(table, "Comparison of " + ", ".join(args.sources)))
    if args.json:
        print_json(chosen.to_dict("records"))
    elif args.each:
        print_rows(chosen.drop(columns="protocol").to_dict("records"), False)
    else:
        print_rows(wide(table).to_dict("records"), False)
        hint(args, protocols(table))
    return 0
