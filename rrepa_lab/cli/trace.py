"""`rrepa-lab trace`: record inner states of images or noise, block by block."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rrepa_lab.cli.arguments import (
    Commands,
    add_command,
    add_csv,
    add_output,
    add_run,
    parse_integers,
    parse_labels,
    parse_list,
)
from rrepa_lab.cli.pictures import load_pictures
from rrepa_lab.cli.printing import hint, print_rows, write_csv
from rrepa_lab.errors import LabError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from rrepa_lab.analysis.trace import Trace
    from rrepa_lab.runs.run import Run


class _Source(NamedTuple):
    """What is sent through the flow."""

    x: "Tensor"  # images (B, C, H, W) in [-1, 1], or noise (B, T, P)
    labels: "Tensor | None"  # (B,) classes of the rows of a split; pictures and noise have none
    description: str  # the column "source" of the table


def register(commands: Commands) -> None:
    """Add the command."""
    trace = add_command(commands, "trace", run, "Record inner states of images or noise, block by block.")
    add_run(trace)
    trace.add_argument("images", nargs="*", metavar="IMAGE", help="picture files (none: rows of a split, or noise)")
    trace.add_argument("--rows", default="0..7", help="rows of the split: 3, or 0..9, or 1,4,7")
    trace.add_argument("--split", default="test", help="train, val or test")
    trace.add_argument("--seeds", help="start from noise with these seeds instead, in the format of --rows")
    trace.add_argument("--direction", default="reverse", help="forward (image to noise) or reverse (noise to image)")
    trace.add_argument("--taps", default="block.*.layer.*", help="which states: names or patterns, separated by commas")
    trace.add_argument("--label", default="none", help="a class for all or one for each, own (the split's), or none")
    trace.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance weight")
    trace.add_argument("--temperature", type=float, default=1.0, help="of the unconditional branch; needs guidance")
    add_output(trace, "--out", metavar="FILE", help="write states and images between the blocks to a .safetensors file")
    add_output(trace, "--picture", metavar="FILE", help="write the images between the blocks as a picture")
    add_csv(trace)


def run(args: argparse.Namespace) -> int:
    """Trace the source, compare both directions where it is images, and print one row per tap."""
    from rrepa_lab.analysis.trace import trace
    from rrepa_lab.flow.condition import Guidance
    from rrepa_lab.runs.store import load
    from rrepa_lab.viz.images import picture_format

    if args.out and not args.out.endswith(".safetensors"):
        raise LabError(f"--out must be a .safetensors file, not {args.out}")
    if args.picture:
        picture_format(args.picture)
    loaded = load(args.run_name, args.device)
    source = _read_source(args, loaded)
    labels, taps = _labels(args, loaded, source), parse_list(args.taps)
    if not taps:
        raise LabError("--taps is empty: give names or patterns of states, such as block.*.layer.*")
    guidance = Guidance(args.guidance, temperature=args.temperature)
    result = trace(loaded, source.x, labels, args.direction, taps, guidance=guidance)
    opposite = None
    if source.x.ndim == 4:
        direction = "forward" if result.direction == "reverse" else "reverse"
        opposite = trace(loaded, source.x, labels, direction, taps, guidance=guidance, path=False, check=False)
    table = _table(loaded, taps, result, opposite).assign(
        round_trip_error=float(result.error.max()), direction=result.direction, source=source.description, label=args.label,
        guidance=args.guidance, temperature=args.temperature, n=len(source.x), device=args.device,
    )  # fmt: skip
    write_csv(args.csv, table)
    _write_files(args, result)
    if args.json:
        print_rows(table.to_dict("records"), True)
    else:
        _print_table(args, table)
    return 0


def _read_source(args: argparse.Namespace, loaded: "Run") -> _Source:
    """Noise of --seeds, picture files, or --rows of --split."""
    from rrepa_lab.sampling.sample import noise

    if args.seeds:
        if args.images:
            raise LabError("give picture files or --seeds, not both")
        return _Source(noise(loaded.flow, parse_integers("--seeds", args.seeds)), None, args.seeds)
    if args.images:
        return _Source(load_pictures(loaded, args.images)[0], None, ", ".join(args.images))
    images = loaded.images(args.split)
    rows = parse_integers("--rows", args.rows)
    if max(rows) >= len(images) or min(rows) < 0:
        raise LabError(f"--rows {args.rows}: the {args.split} split has rows 0..{len(images) - 1}")
    x, labels = (part.to(loaded.device) for part in images.__getitems__(rows))
    return _Source(x, labels, f"{args.split} {args.rows}")


def _labels(args: argparse.Namespace, loaded: "Run", source: _Source) -> "Tensor | None":
    """The classes of --label, (B,), or None for the unconditional flow."""
    import torch

    if args.label == "none":
        return None
    if args.label == "own":
        if source.labels is None:
            raise LabError("--label own needs rows of a split: pictures and noise have no label of their own")
        return source.labels
    labels, count = parse_labels("--label", args.label, loaded.classes), len(source.x)
    if len(labels) not in (1, count):
        raise LabError(f"--label {args.label}: {len(labels)} labels for {count} sources; give one, or one for each")
    return torch.tensor(labels * (count // len(labels)))


def _table(loaded: "Run", taps: list[str], result: "Trace", opposite: "Trace | None") -> "pd.DataFrame":
    """One row per tap: place, shape, mean and spread of its state, and its difference between the directions."""
    import pandas as pd

    from rrepa_lab.analysis.trace import state_gap
    from rrepa_lab.measurements.columns import about, place

    rows = []
    for tap in loaded.flow.resolve(taps):
        state = result.states[tap.name]
        row = {"shape": "x".join(map(str, state.shape)), "mean": float(state.mean()), "spread": float(state.std())}
        rows.append({**about(loaded), **place(tap), **row} | (state_gap(result, opposite, tap.name) if opposite else {}))
    return pd.DataFrame(rows)


def _write_files(args: argparse.Namespace, result: "Trace") -> None:
    """--out and --picture, where given."""
    import torch

    from rrepa_lab.viz.images import grid, save_picture

    if args.out:
        _save_states(Path(args.out), result.states | {f"path.{name}": image for name, image in result.images.items()})
    if args.picture:
        images = torch.stack(list(result.images.values()), dim=1)  # (B, N + 1, C, H, W): one row of the grid per source
        save_picture(grid(images.flatten(0, 1), len(result.images)), args.picture)


def _save_states(path: Path, tensors: dict[str, "Tensor"]) -> None:
    from safetensors.torch import save_file

    from rrepa_lab.files import write_atomically

    contiguous: dict[str, Any] = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary))


def _print_table(args: argparse.Namespace, table: "pd.DataFrame") -> None:
    columns = ["tap", "module_path", "shape", "mean", "spread", *(["relative_gap"] if "relative_gap" in table else [])]
    print_rows(table[columns].to_dict("records"), False, floats=".3g")
    first = table.iloc[0]
    print(f"\nlargest round-trip error: {first['round_trip_error']:.1e} (n = {first['n']}, {args.direction})")
    if "relative_gap" in table:
        print(
            f"largest difference of a state between the directions, relative to its spread: {table['relative_gap'].max():.1e}"
        )
    hint(args, f"probe the layers: rrepa-lab probe {args.run_name}")
