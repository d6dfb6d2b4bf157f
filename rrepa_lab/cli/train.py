"""`rrepa-lab train`: train a run from a preset or a config.json."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.arguments import Commands, add_cache, add_command, add_device, add_set, parse_setting
from rrepa_lab.cli.dry_run import print_plan
from rrepa_lab.cli.encoder import encoder_settings
from rrepa_lab.cli.printing import hint, print_facts, sample_options
from rrepa_lab.errors import LabError
from rrepa_lab.processes import is_main, world_size
from rrepa_lab.progress import progress
from rrepa_lab.signals import ending_signals

REPEATED = 1.0  # seconds after a signal in which a launcher's own is no second one

if TYPE_CHECKING:
    from rrepa_lab.runs.config import RunConfig
    from rrepa_lab.training.reports import StepReport


def register(commands: Commands) -> None:
    """Add the command."""
    train = add_command(commands, "train", run, "Train a run from a preset or a config.json.")
    train.add_argument("source", metavar="PRESET|config.json", help="for example digits-reverse")
    train.add_argument("--out", help="run directory")
    add_set(train)
    train.add_argument(
        "--encoder", metavar="DIR|NAME", action="append",
        help="align with the encoder that `encoder train` wrote to this folder, or with a named teacher (dinov2-b, "
        "efficientnet-lite0); several times: with all of them, side by side",
    )  # fmt: skip
    train.add_argument("--seed", type=int, help="train.seed")
    train.add_argument("--resume", action="store_true", help="resume the run in --out")
    train.add_argument("--init", metavar="RUN", help="begin with the weights of this run, imported ones too")
    train.add_argument(
        "--dry-run", action="store_true", help="print the configuration and what it takes: operations, memory, hours"
    )
    train.add_argument(
        "--time", action=argparse.BooleanOptionalAction, help="dry run: time ten steps here (without this: if they are short)"
    )
    train.add_argument("--gpu", metavar="[Nx]NAME", help="dry run: hours on such GPUs, for example h100 or 8xa100")
    train.add_argument(
        "--utilization", type=float, default=0.35, help="dry run: the part of a GPU's peak that the training reaches (assumed)"
    )
    add_cache(train)
    add_device(train, "auto")


def run(args: argparse.Namespace) -> int:
    """Train, or describe the run with --dry-run; status 1 after an interruption that saved the run."""
    config = _config(args)
    if args.dry_run:
        print_plan(args, config)
        return 0
    if args.out is None:
        raise LabError("a run directory is required: add --out runs/NAME")
    main_process = is_main()
    with stop_on_interrupt() as stopped:
        report = _train(args, config, stopped, silent=not main_process)
    if report is None:
        raise LabError(f"{args.out} is finished: nothing left to train; raise train.steps in a new run")
    if not main_process:
        return int(stopped())
    facts = {"run": str(args.out), "step": report.step, "loss": report.loss, "nats_per_dim": report.nats_per_dim,
             "held_out_nats_per_dim": report.held_out_nats_per_dim, "seconds": report.seconds, **report.similarity}  # fmt: skip
    print_facts(facts, args.json)
    if stopped():
        hint(args, f"stopped and saved; to resume: rrepa-lab train {args.out}/config.json --out {args.out} --resume")
        return 1
    from rrepa_lab.runs.store import load

    hint(args, f"draw samples: rrepa-lab sample {args.out} {sample_options(load(args.out).config.flow.classes)}")
    return 0


def _config(args: argparse.Namespace) -> "RunConfig":
    """The configuration of the source, overridden by --encoder, then --set, then --seed."""
    from rrepa_lab.runs.presets import read_config

    each = [encoder_settings(name)["encoder"] for name in args.encoder or ()]
    settings: dict[str, Any] = {"encoder": each[0] if len(each) == 1 else each} if each else {}
    settings |= dict(map(parse_setting, args.set))
    if args.seed is not None:
        settings["train.seed"] = args.seed
    return read_config(args.source).override(settings)


def _train(args: argparse.Namespace, config: "RunConfig", stopped: Callable[[], bool], silent: bool) -> "StepReport | None":
    """Train with a progress bar; the last report, or None where no step was left."""
    from rrepa_lab.evaluation.train import train

    report = None
    with (
        progress(config.train.steps, "step", silent=silent) as bar,
        closing(train(config, args.out, resume=args.resume, init=args.init, device=args.device, stop=stopped)) as reports,
    ):
        for report in reports:
            bar.update(report.step - bar.n)
            parts = {"loss": f"{report.loss:.3f}", "nats/dim": f"{report.nats_per_dim:.3f}"}
            if report.similarity:
                parts["similarity"] = f"{sum(report.similarity.values()) / len(report.similarity):.3f}"
            bar.set_postfix(parts, refresh=False)
    return report


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C, SIGTERM and SIGHUP set a flag, so that a step can be finished and saved; a second one stops at once.

    Of several processes the main one prints. A terminal sends Ctrl-C to all of them, and torchrun passes it on once more:
    what comes within a second of the first signal is not a second one.

    Yields a function that returns whether the flag is set. A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    received: list[float] = []

    def handle(_signal: int, _frame: object) -> None:
        now = time.monotonic()
        if received:
            if world_size() > 1 and now - received[0] < REPEATED:
                return
            raise KeyboardInterrupt
        received.append(now)
        if not is_main():
            return
        with suppress(OSError):  # the terminal may be gone
            print("\nstopping after this step; Ctrl-C again to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in ending_signals()}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
