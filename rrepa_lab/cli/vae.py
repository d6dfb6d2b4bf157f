"""`rrepa-lab vae train`: an autoencoder whose latents a flow can model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.arguments import Commands, add_command, add_device, add_set, parse_setting
from rrepa_lab.cli.encoder import encoder_settings
from rrepa_lab.cli.printing import changed_data, hint, print_facts, set_words
from rrepa_lab.errors import unknown
from rrepa_lab.progress import progress

if TYPE_CHECKING:
    from rrepa_lab.space.autoencoder import AutoencoderConfig


def register(commands: Commands) -> None:
    """Add the command with its action."""
    actions = commands.add_parser("vae", help="Train an autoencoder whose latents a flow models.").add_subparsers(
        metavar="ACTION", required=True
    )
    train = add_command(
        actions, "train", run_train, "Train a small VAE, or a decoder for the PCA of an encoder's features (space.kind)."
    )
    train.add_argument("data", metavar="DATA", help="a data set by name, an image folder, or digits")
    train.add_argument("--out", required=True, help="folder to write")
    train.add_argument("--kind", default="small-vae", help="small-vae or features")
    train.add_argument("--size", type=int, help="height and width of a picture (none: 32; digits 8)")
    train.add_argument("--encoder", metavar="DIR", help="kind features: an encoder of `encoder train`, or bundled:digits")
    add_set(train, "override a setting: factor=8, channels=4, kl_weight=1e-4, steps=5000, data.flip=true, encoder.model=NAME")
    train.add_argument("--seed", type=int, help="of weights, batches and noise")
    train.add_argument("--resume", action="store_true", help="go on with the training that was stopped in --out")
    add_device(train, "auto")


def run_train(args: argparse.Namespace) -> int:
    """Train, write config.json, model.safetensors and card.md to --out, and print the quality of the reconstructions."""
    from rrepa_lab.evaluation.reconstruction import train_autoencoder
    from rrepa_lab.runs.store import pick_device
    from rrepa_lab.space.autoencoder import TRAINED_HERE, read_autoencoder

    if args.kind not in TRAINED_HERE:
        raise unknown("kind of autoencoder", args.kind, TRAINED_HERE)
    config = _config(args)
    out, report = Path(args.out), None
    with progress(config.steps, "step") as bar:
        for report in train_autoencoder(config, out, resume=args.resume, device=pick_device(args.device)):
            bar.set_postfix(loss=f"{report.loss:.4f}", refresh=False)
            bar.update(report.step - bar.n)
    stored = read_autoencoder(out, config.kind)
    c, h, w = stored.latents
    quality = stored.quality
    facts: dict[str, Any] = {
        "autoencoder": str(out), "latents": f"{c}x{h}x{w}", "loss": None if report is None else report.loss,
        "psnr": quality["psnr"], "rfd": quality["rfd"], "rfd_encoder": quality["rfd_encoder"], "n": quality["n"],
        "scored on": quality["protocol"],
    }  # fmt: skip
    print_facts(facts, args.json)
    preset, settings = _next_training(config, out)
    settings |= {"flow.image_size": h, "flow.channels": c, "flow.patch_size": 1}
    hint(args, f"train a flow of its latents: rrepa-lab train {preset} --out runs/latent{set_words(settings)}")
    return 0


def _next_training(config: "AutoencoderConfig", out: Path) -> tuple[str, dict[str, Any]]:
    """A preset for a flow of the latents, and the settings of space and data in which the training differs from it."""
    from rrepa_lab.runs.presets import preset

    name = "digits-none" if config.data.name == "digits" else "imagefolder-tiny-none"
    changes = changed_data(preset(name).data, config.data)
    return name, {"space.kind": config.kind, "space.weights": str(out)} | changes


def _config(args: argparse.Namespace) -> "AutoencoderConfig":
    """Defaults for the data, overridden by --encoder, then --set, then --seed."""
    from rrepa_lab.space.autoencoder import AutoencoderConfig, data_settings

    values: dict[str, Any] = {"kind": args.kind} | data_settings(args.data, args.size)
    if args.encoder:
        values |= encoder_settings(args.encoder)
    nested = dict(map(parse_setting, args.set))
    if args.seed is not None:
        nested["seed"] = args.seed
    # an encoder that is named by --set alone has no settings to override yet
    if any(key.startswith("encoder.") for key in nested) and "encoder" not in values:
        from rrepa_lab.align.teacher import EncoderConfig

        values["encoder"] = EncoderConfig().to_dict()
    if args.kind == "features" and "encoder" not in values and args.data == "digits":
        values |= encoder_settings("bundled:digits")
    base = AutoencoderConfig.from_dict(values)
    return base.override(nested)
