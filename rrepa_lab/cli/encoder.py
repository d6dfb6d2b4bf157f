"""`rrepa-lab encoder train` and `rrepa-lab encoder score`: a small vision encoder trained without labels."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.arguments import Commands, add_cache, add_command, add_set, parse_setting
from rrepa_lab.cli.printing import hint, print_facts, print_rows
from rrepa_lab.errors import LabError
from rrepa_lab.progress import progress

if TYPE_CHECKING:
    from rrepa_lab.training.selfsup import EncoderTrainConfig


def register(commands: Commands) -> None:
    """Add the command with its two actions."""
    actions = commands.add_parser("encoder", help="Train or score a small vision encoder.").add_subparsers(
        metavar="ACTION", required=True
    )
    train = add_command(actions, "train", run_train, "Train an encoder without labels.")
    train.add_argument("--out", required=True, help="folder to write")
    train.add_argument("--data", metavar="FOLDER", help="image folder to train on (none: digits)")
    train.add_argument("--size", type=int, default=32, help="with --data: height and width of an image")
    add_set(train)
    add_cache(train)
    score = add_command(actions, "score", run_score, "k-NN accuracy of an encoder, of raw pixels and of an untrained encoder.")
    score.add_argument("encoder", nargs="?", default="bundled:digits", help="bundled:<name> or a folder")


def run_train(args: argparse.Namespace) -> int:
    """Train an encoder and write it, with its card, to --out."""
    from rrepa_lab.align.encoder import Encoder
    from rrepa_lab.training.selfsup import EncoderTrainConfig, encoder_of_folder, knn_table, train_encoder, write_encoder_card

    settings = dict(map(parse_setting, args.set))
    config = (encoder_of_folder(args.data, args.size) if args.data else EncoderTrainConfig()).override(settings)
    if (Path(args.out) / "model.safetensors").exists():
        raise LabError(f"{args.out} already holds an encoder: choose another --out")
    with progress(config.steps, "step") as bar:
        for report in train_encoder(config, args.out):
            bar.set_postfix(loss=f"{report.loss:.3f}", refresh=False)
            bar.update()
    encoder = Encoder(config.encoder.override({"weights": str(Path(args.out) / "model.safetensors")}))
    write_encoder_card(Path(args.out), config, report.loss, knn_table(encoder, config.data))
    print_facts({"encoder": str(args.out), "loss": report.loss}, args.json)
    hint(args, _align_command(str(args.out), config))
    return 0


def run_score(args: argparse.Namespace) -> int:
    """Print the k-NN accuracy of an encoder and of two baselines."""
    from rrepa_lab.align.encoder import Encoder
    from rrepa_lab.training.selfsup import knn_table

    folder, config = _read_encoder(str(args.encoder))
    encoder = Encoder(config.encoder.override({"weights": str(folder / "model.safetensors")}))
    print_rows(knn_table(encoder, config.data).to_dict("records"), args.json)
    hint(args, _align_command(str(args.encoder), config))
    return 0


def encoder_settings(name: str) -> dict[str, Any]:
    """The settings of a run that align it with an encoder written by `encoder train`, or with a named teacher.

    Raises: LabError if there is no encoder of this name.
    """
    from rrepa_lab.align.encoder import BUNDLED
    from rrepa_lab.align.named import NAMED
    from rrepa_lab.align.teacher import EncoderConfig

    if name in NAMED and not Path(name).exists():
        return {"encoder": EncoderConfig(model=name).to_dict()}
    folder, config = _read_encoder(name)
    weights = name if name.startswith(BUNDLED) else str((folder / "model.safetensors").absolute())
    return {"encoder": config.encoder.override({"weights": weights}).to_dict()}


def _read_encoder(name: str) -> tuple[Path, "EncoderTrainConfig"]:
    """Folder and configuration of an encoder, by bundled:<name> or folder."""
    from rrepa_lab.align.encoder import BUNDLED
    from rrepa_lab.paths import assets
    from rrepa_lab.readers import read_json, validate
    from rrepa_lab.training.selfsup import EncoderTrainConfig

    folder = assets() / "encoders" / name.removeprefix(BUNDLED) if name.startswith(BUNDLED) else Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise LabError(f"no encoder at {folder}: give bundled:digits or a folder written by rrepa-lab encoder train")
    return folder, validate(EncoderTrainConfig, read_json(folder / "config.json"), str(folder / "config.json"))


def _align_command(name: str, config: "EncoderTrainConfig") -> str:
    """The command that trains a flow aligned with this encoder, for a hint."""
    data = config.data
    preset = "digits-reverse" if data.name == "digits" else "imagefolder-reverse"
    data_setting = "" if data.name == "digits" else f" --set data.path={data.path}"
    return f"align a flow with it: rrepa-lab train {preset} --out runs/mine --encoder {name}{data_setting}"
