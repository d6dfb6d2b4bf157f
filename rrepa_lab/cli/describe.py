"""`rrepa-lab describe`: list the runs, or describe one run or preset."""

import argparse
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.arguments import Commands, add_command
from rrepa_lab.cli.printing import hint, print_facts, print_rows
from rrepa_lab.errors import LabError

if TYPE_CHECKING:
    from rrepa_lab.runs.config import RunConfig


def register(commands: Commands) -> None:
    """Add the command."""
    describe = add_command(commands, "describe", run, "List the runs, or describe one run or preset.")
    describe.add_argument("source", nargs="?", metavar="RUN|PRESET|config.json", help="what to describe (none: list the runs)")
    describe.add_argument(
        "--routing", action="store_true", help="gradient norm of the alignment loss by strategy and group of parameters"
    )


def run(args: argparse.Namespace) -> int:
    """Print the list of runs, one configuration, or its gradient norms."""
    from rrepa_lab.runs.describe import describe_config
    from rrepa_lab.runs.store import available

    if args.source is None:
        rows = [
            {"name": info.name, "strategy": info.strategy, "data": info.data, "summary": info.summary} for info in available()
        ]
        print_rows(rows, args.json)
        hint(args, "details of one: rrepa-lab describe digits-reverse --routing")
        return 0
    source, config = _find(args.source)
    if args.routing:
        _print_routing(source, config.name, args.json)
        return 0
    facts = describe_config(config)
    if source is config:  # without weights: a preset, or a config.json
        facts |= _results(args.source, args.json)
    else:
        facts["step"] = source.step
    print_facts(facts, args.json)
    hint(args, f"gradient norms by group of parameters: rrepa-lab describe {args.source} --routing")
    return 0


def _results(name: str, as_json: bool) -> dict[str, Any]:
    """What a paper reports for a preset, and what was measured here; nothing for other configurations."""
    from rrepa_lab.runs.presets import names, reported_and_measured

    if name not in names():
        return {}
    known = reported_and_measured(name)
    if as_json:
        return known
    return {
        "about": known["about"],
        "reported": [_result_words(row) for row in known["reported"]],
        "measured": [_result_words(row) for row in known["measured"] or []] or "not measured yet",
    }


def _result_words(row: dict[str, Any]) -> str:
    seed = "" if row["seed"] is None else f"; seed {row['seed']}"
    hardware = f"; {row['hardware']}" if row["hardware"] else ""
    return f"{row['metric']} {row['value']:.4g} ({row['setting']}; {row['source']}{seed}{hardware})"


def _find(name: str) -> tuple[Any, "RunConfig"]:
    """What `align.routing.routing` takes, a run or a configuration without weights, and its configuration."""
    from rrepa_lab.runs.presets import read_config
    from rrepa_lab.runs.store import load

    try:
        loaded = load(name)
    except LabError as error:
        try:
            config = read_config(name)
        except LabError:
            raise error from None
        return config, config
    return loaded, loaded.config


def _print_routing(source: Any, name: str, as_json: bool) -> None:
    from rrepa_lab.analysis.routing import routing

    table = routing(source)
    if as_json:
        print_rows(table.to_dict("records"), True)
        return
    table["norm"] = [f"{value:.2e}" if value else "0" for value in table["gradient_norm"]]
    wide = table.pivot(index="group", columns=["tap", "strategy"], values="norm")
    groups = table["group"].drop_duplicates()
    columns = table[["tap", "strategy"]].drop_duplicates().apply(tuple, axis=1)
    print(f"Gradient norm of the alignment loss of {name}, by strategy and parameters ({table.n[0]} images, float64):\n")
    print(wide.loc[groups, columns].to_string())
