"""`rrepa-lab sample`: generate a sheet of images."""

import argparse

from rrepa_lab.cli.arguments import Commands, add_command, add_output, add_run, parse_integers, parse_labels
from rrepa_lab.cli.printing import hint, print_facts


def register(commands: Commands) -> None:
    """Add the command."""
    sample = add_command(commands, "sample", run, "Sample images: every label with every seed.")
    add_run(sample)
    sample.add_argument("--labels", help="classes: all, cat,dog, 3, or 0..9 (none: unconditional)")
    sample.add_argument("--seeds", default="0..15", help="3, or 0..9, or 1,4,7")
    sample.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance weight")
    sample.add_argument("--temperature", type=float, default=1.0, help="of the unconditional branch; needs guidance")
    sample.add_argument("--strength", type=float, default=1.0, help="of the final denoising step; 0 changes nothing")
    sample.add_argument("--no-denoise", action="store_true", help="skip the final denoising step")
    sample.add_argument("--method", default="auto", help="decoding: auto, cached, jacobi, sequential; all give the same images")
    sample.add_argument(
        "--precision", default="float32", help="of the matrix products: float32, or bfloat16, which reports its error"
    )
    add_output(sample, "--out", default="grid.png", help="picture to write")


def run(args: argparse.Namespace) -> int:
    """Sample every label with every seed and write them as one picture, one row a label; several processes share them."""
    from rrepa_lab.processes import process_group

    with process_group(args.device) as place:
        return _sample(args, place.device, place.main)


def _sample(args: argparse.Namespace, device: str, main: bool) -> int:
    """Sample on this device; the main process prints and writes."""
    from torch import Tensor
    from tqdm import tqdm

    from rrepa_lab.flow.condition import Guidance
    from rrepa_lab.flow.decode.plan import Decoding
    from rrepa_lab.processes import shared
    from rrepa_lab.runs.store import load
    from rrepa_lab.sampling.sample import Samples, sample
    from rrepa_lab.viz.images import check_sheet, grid, picture_format, save_picture

    picture_format(args.out)  # before any image is sampled
    loaded = load(args.run_name, device)
    labels = parse_labels("--labels", args.labels, loaded.classes) if args.labels else [-1]
    seeds = parse_integers("--seeds", args.seeds)
    pairs = [(label, seed) for label in labels for seed in seeds]
    columns = len(seeds) if len(labels) > 1 else None
    check_sheet(args.out, len(pairs), *loaded.space.picture_shape[1:], columns)
    total, made = loaded.flow.config.blocks * len(pairs), list[Samples]()

    def of_rows(rows: Tensor) -> Tensor:
        chosen = [pairs[row] for row in rows]
        samples = sample(
            loaded,
            [seed for _, seed in chosen],
            [label for label, _ in chosen],
            Guidance(args.guidance, temperature=args.temperature),
            denoise=not args.no_denoise,
            strength=args.strength,
            method=Decoding(args.method, precision=args.precision),
            progress=lambda report: bar.update(report.images),
        )
        made.append(samples)
        return samples.images

    with tqdm(total=total, unit="image and block", disable=None if main else True, leave=False, dynamic_ncols=True) as bar:
        images = shared(of_rows, len(pairs))
    if not main:
        return 0
    (samples,) = made
    save_picture(grid(images, columns), args.out)
    facts = {
        "run": loaded.name,
        "images": len(pairs),
        "labels": [loaded.classes[label] if label >= 0 else "none" for label in labels],
        "seeds": seeds,
        "guidance": args.guidance,
        "finish": samples.finish,
        "decoded by": samples.method,
        **({} if samples.error is None else {"decoding error": samples.error}),
        "out": args.out,
    }
    print_facts(facts, args.json)
    hint(args, f"classify a picture: rrepa-lab classify {args.run_name} IMAGE.png")
    return 0
