"""`rrepa-lab data describe`, `data cache` and `data clear`: what a data set holds, and what is kept of it on this machine."""

import argparse
from typing import Any

from rrepa_lab.cli.arguments import Commands, add_cache, add_command, add_set, parse_setting
from rrepa_lab.cli.printing import hint, print_facts, print_json, print_rows
from rrepa_lab.errors import LabError


def register(commands: Commands) -> None:
    """Add the command with its three actions."""
    actions = commands.add_parser("data", help="Describe a data set, or list and clear what is cached.").add_subparsers(
        metavar="ACTION", required=True
    )
    describe = add_command(actions, "describe", run_describe, "What a data set holds, split by split; every header is read.")
    describe.add_argument(
        "data",
        metavar="NAME|FOLDER|FILE.npz",
        help="a registered data set, an image folder, or samples and statistics of ADM's",
    )
    describe.add_argument("--path", help="data.path of a named set")
    describe.add_argument("--size", type=int, default=32, help="image size of the cache (digits: 8)")
    describe.add_argument("--decode", action="store_true", help="read every picture to its end, to find those that are cut off")
    add_set(describe, "override a setting: data.holdout=0.1")
    add_cache(describe)
    listed = add_command(actions, "cache", run_cache, "List what the cache holds.")
    add_cache(listed)
    clear = add_command(actions, "clear", run_clear, "Remove parts of the cache.")
    clear.add_argument(
        "folder", nargs="*", metavar="ENTRY", help="names of `data cache`, or a kind: pictures, latents, features"
    )
    clear.add_argument("--all", action="store_true", help="everything")
    add_cache(clear)


def run_describe(args: argparse.Namespace) -> int:
    """Print the facts of a data set; status 1 if a file cannot be read."""
    from rrepa_lab.data.config import DATA_SETS, DataConfig
    from rrepa_lab.data.survey import describe_set, in_words

    if args.data.endswith(".npz"):
        from rrepa_lab.evaluation.adm import AdmFile

        print_facts(AdmFile(args.data).describe(), args.json)
        return 0
    named = args.data in DATA_SETS
    settings: dict[str, Any] = {"name": args.data if named else "folder", "path": args.path if named else args.data}
    if args.data != "digits":
        settings |= {"image_size": args.size, "channels": 3}
    given = {key.removeprefix("data."): value for key, value in map(parse_setting, args.set)}
    found = describe_set(DataConfig().override(settings | given), args.decode)
    if args.json:
        print_json(found)
    else:
        print_facts(in_words(found), False)
    bad = any(values.get("unreadable") for values in found["splits"].values())
    if not args.decode and not bad and args.data != "digits":
        hint(args, "read every picture to its end as well: add --decode")
    return int(bad)


def run_cache(args: argparse.Namespace) -> int:
    """Print the entries of the cache, the largest first."""
    from rrepa_lab.data.cache import entries
    from rrepa_lab.paths import cache_root

    rows = [
        {"entry": one.folder.name, "kind": one.kind, "rows": one.rows, "MiB": one.bytes / 2**20, "complete": one.complete,
         "data": one.about.get("name", "")} for one in entries()
    ]  # fmt: skip
    print_rows(rows, args.json, ".1f")
    hint(
        args, f"{sum(row['MiB'] for row in rows):.1f} MiB in {cache_root()}; remove some: rrepa-lab data clear ENTRY, or --all"
    )
    return 0


def run_clear(args: argparse.Namespace) -> int:
    """Remove entries by name or kind."""
    from rrepa_lab.data.cache import entries, remove
    from rrepa_lab.errors import unknown

    found = entries()
    if not args.folder and not args.all:
        raise LabError("name entries of `rrepa-lab data cache` to remove, or give --all")
    for name in args.folder:
        if not any(name in (one.folder.name, one.kind) for one in found):
            raise unknown("entry of the cache", name, [one.folder.name for one in found])
    chosen = [one for one in found if args.all or {one.folder.name, one.kind} & {*args.folder}]
    for one in chosen:
        remove(one)
    print_facts({"removed": len(chosen), "MiB": sum(one.bytes for one in chosen) / 2**20}, args.json)
    return 0
