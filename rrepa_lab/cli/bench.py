"""`rrepa-lab bench`: time and memory on this machine."""

import argparse

from rrepa_lab.cli.arguments import Commands, add_cache, add_command, add_csv, add_device
from rrepa_lab.cli.printing import print_facts, print_rows, write_csv
from rrepa_lab.errors import LabError

COLUMNS = (
    "data", "what", "against", "kind", "over", "size", "case", "workers", "classes", "ratio", "data_wait", "low", "high",
    "required", "aim", "met", "seconds", "fastest", "slowest", "seconds_per_image", "pictures_per_second", "hours_for_50000",
    "reference", "error", "kept_mib", "parameters_mib", "gradients_mib", "optimizer_mib", "average_mib", "rss_mib", "peak_mib",
    "growth_mib", "answers", "gflops", "part_of_ceiling",
)  # fmt: skip
PROTOCOL = ("images", "steps", "flow", "ceiling_gflops", "repeats", "threads", "device", "torch")


def register(commands: Commands) -> None:
    """Add the command."""
    bench = add_command(commands, "bench", run, "Time and memory on this machine, as ratios of work run in alternation.")
    bench.add_argument(
        "which",
        nargs="?",
        default="speed",
        help="speed (the ratios with a required limit), scaling, classify, decode, strategies (a training step), teacher (a "
        "step with its features kept, and not), page (in a Chromium), memory (of the page under visitors; --repeats is "
        "minutes), data (waiting for the images of --data), processes (memory of two, weights copied or sharded), evaluation "
        "(samples of --run, features and moments: hours for 50,000), or plan (the fastest decoding of --run)",
    )
    bench.add_argument("--repeats", type=int, default=3, help="rounds")
    bench.add_argument("--data", metavar="FOLDER", help="data: the image folder")
    bench.add_argument("--size", type=int, default=32, help="data: height and width of an image")
    bench.add_argument("--run", dest="run_name", metavar="RUN", help="plan: the run to calibrate; evaluation: whose samples")
    bench.add_argument("--protocol", action="append", default=[], metavar="NETWORK", help="evaluation: inception, an encoder")
    bench.add_argument("--guidance", type=float, default=0.0, help="plan: classifier-free guidance weight")
    bench.add_argument("--save", action="store_true", help="plan: write it to the run directory")
    bench.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    add_cache(bench)
    add_device(bench)
    add_csv(bench)


def run(args: argparse.Namespace) -> int:
    """Run one benchmark and print its table, then what it was run with."""
    from rrepa_lab.bench import bench

    if args.which == "plan":
        return _run_plan(args)
    table = bench(
        args.which,
        args.repeats,
        args.threads,
        args.device,
        args.data,
        args.size,
        args.run_name or "digits-reverse",
        tuple(args.protocol),
    )
    write_csv(args.csv, table)
    if args.json:
        print_rows(table.to_dict("records"), True)
        return 0
    columns = [column for column in COLUMNS if column in table and table[column].notna().any()]
    # values of very different size in one column
    small = "error" in columns or args.which in ("speed", "scaling", "evaluation")
    print_rows(table[columns].to_dict("records"), False, ".3g" if small else ".4f")
    first = table.iloc[0]
    print_facts({name: first[name] for name in PROTOCOL if name in table}, False)
    return 0


def _run_plan(args: argparse.Namespace) -> int:
    """Find the fastest decoding of one run, and keep it with the run if --save is given."""
    import torch

    from rrepa_lab.bench.timing import limited_threads
    from rrepa_lab.runs.store import load
    from rrepa_lab.sampling.calibrate import calibrate

    if args.run_name is None:
        raise LabError("a run to calibrate is required: add --run RUN, for example --run digits-reverse")
    loaded = load(args.run_name, args.device)
    with limited_threads(args.threads):
        plan = calibrate(loaded, args.guidance, args.repeats, save=args.save)
    facts = {"run": loaded.name, **plan.to_dict(), "threads": args.threads, "torch": torch.__version__}
    print_facts(facts | {"kept in": str(loaded.directory) if args.save else "nothing (--save keeps it)"}, args.json)
    return 0
