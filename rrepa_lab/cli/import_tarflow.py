"""`rrepa-lab import-tarflow`: convert a checkpoint of the public TARFlow code into a run."""

import argparse

from rrepa_lab.cli.arguments import Commands, add_command
from rrepa_lab.cli.printing import hint, print_facts, sample_options


def register(commands: Commands) -> None:
    """Add the command."""
    convert = add_command(commands, "import-tarflow", run, "Convert a checkpoint of the public TARFlow code into a run.")
    convert.add_argument("file", metavar="FILE", help="for example imagenet_model_4_1024_8_8_0.05.pth")
    convert.add_argument("out", metavar="OUT", help="run directory to write")
    convert.add_argument("--img-size", type=int, help="height and width of an image (none: from the tensors)")
    convert.add_argument("--patch-size", type=int, help="height and width of a patch (none: from the tensors)")
    convert.add_argument("--channels", type=int, help="1 or 3 (none: from the tensors)")
    convert.add_argument("--head-width", type=int, default=64, help="channels per attention head; no tensor shows it")
    convert.add_argument("--noise", help="training noise: sigma, such as 0.05, or uniform (none: from the file name)")
    convert.add_argument("--name", help="name of the run (none: the file name)")
    convert.add_argument("--data", metavar="FOLDER", help="image folder with <split>/<class>/<picture>")


def run(args: argparse.Namespace) -> int:
    """Write the run directory and print what was found in the checkpoint."""
    from rrepa_lab.runs.import_tarflow import facts, import_tarflow

    imported = import_tarflow(
        args.file,
        args.out,
        image_size=args.img_size,
        patch_size=args.patch_size,
        channels=args.channels,
        head_width=args.head_width,
        noise=args.noise,
        name=args.name,
        data=args.data,
    )
    print_facts({"run": args.out, **facts(imported), "weights": "of the last step, not averaged"}, args.json)
    hint(args, f"draw samples: rrepa-lab sample {args.out} {sample_options(imported.config.flow.classes)}")
    return 0
