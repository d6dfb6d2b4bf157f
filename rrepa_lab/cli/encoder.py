"""`rrepa-lab encoder train` and `rrepa-lab encoder score`: a small vision encoder trained without labels."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.arguments import Commands, add_cache, add_command, add_set, parse_setting
from rrepa_lab.cli.printing import changed_data, hint, print_facts, print_rows, set_words
from rrepa_lab.progress import progress

# presets that finish in minutes on two cores, for the hint; the last one takes any data set
DEMO_PRESETS = ("cifar10-tiny-reverse", "tinyimagenet-tiny-reverse", "imagefolder-tiny-reverse")

if TYPE_CHECKING:
    from rrepa_lab.training.selfsup import EncoderTrainConfig


def register(commands: Commands) -> None:
    """Add the command with its two actions."""
    actions = commands.add_parser("encoder", help="Train or score a small vision encoder.").add_subparsers(
        metavar="ACTION", required=True
    )
    train = add_command(actions, "train", run_train, "Train an encoder without labels.")
    train.add_argument("--out", required=True, help="folder to write")
    train.add_argument("--data", metavar="DATA", default="digits", help="a data set by name, an image folder, or digits")
    train.add_argument("--size", type=int, help="height and width of a picture (none: 32; digits 8)")
    add_set(train, "override a setting: steps=2000, data.path=DIR, data.channels=1, views.crop=0.3, encoder.model=NAME")
    add_cache(train)
    score = add_command(actions, "score", run_score, "k-NN accuracy of an encoder, of raw pixels and of an untrained encoder.")
    score.add_argument("encoder", nargs="?", default="bundled:digits", help="bundled:<name> or a folder")
    add_cache(score)


def run_train(args: argparse.Namespace) -> int:
    """Train an encoder and write it, with its card, to --out."""
    from rrepa_lab.training.selfsup import check_folder, score_encoder, train_encoder

    config = _config(args)
    check_folder(args.out)
    with progress(config.steps, "step") as bar:
        for report in train_encoder(config, args.out):
            bar.set_postfix(loss=f"{report.loss:.3f}", refresh=False)
            bar.update()
    about = score_encoder(Path(args.out))
    accuracies = {f"k-NN accuracy, {row['features']}": row["knn_accuracy"] for row in about.scores}
    print_facts({"encoder": str(args.out), "loss": report.loss} | accuracies, args.json)
    hint(args, align_command(str(args.out), config))
    return 0


def run_score(args: argparse.Namespace) -> int:
    """Print the k-NN accuracy of an encoder and of two baselines."""
    from rrepa_lab.training.encoder_names import encoder_folder
    from rrepa_lab.training.selfsup import encoder_scores, read_encoder

    folder = encoder_folder(str(args.encoder))
    config = read_encoder(folder).recipe
    print_rows(encoder_scores(folder, config).to_dict("records"), args.json)
    hint(args, align_command(str(args.encoder), config))
    return 0


def _config(args: argparse.Namespace) -> "EncoderTrainConfig":
    """The recipe for the data, overridden by --set."""
    from rrepa_lab.data.config import DATA_SETS, DataConfig, named_data
    from rrepa_lab.training.selfsup import encoder_recipe

    settings = dict(map(parse_setting, args.set))
    values = {f"data.{key}": value for key, value in named_data(args.data, args.size).items()} | settings
    name = str(values["data.name"])
    if "data.channels" not in settings and name in DATA_SETS and getattr(DATA_SETS[name], "grey", False):
        values["data.channels"] = 1
    ours = {key.removeprefix("data."): value for key, value in values.items() if key.startswith("data.")}
    recipe = encoder_recipe(DataConfig().override(ours))
    if "encoder.model" in settings:  # another model has other arguments and layers
        recipe = recipe.override({"encoder.args": {}, "encoder.layer": -1, "loss_layer": None})
    return recipe.override(settings)


def encoder_settings(name: str) -> dict[str, Any]:
    """The settings of a run that align it with an encoder written by `encoder train`, or with a named teacher.

    Raises: LabError if there is no encoder of this name.
    """
    from rrepa_lab.training.encoder_names import encoder_by_name

    return {"encoder": encoder_by_name(name).to_dict()}


def align_command(name: str, config: "EncoderTrainConfig") -> str:
    """The command that trains a flow aligned with this encoder, for a hint: a demo-size preset of the data set."""
    from rrepa_lab.runs.presets import preset

    data = config.data
    fitting = "digits-reverse"
    if data.name != "digits":
        known = {one: preset(one).data for one in DEMO_PRESETS}
        fitting = next(
            (one for one, own in known.items() if (own.name, own.image_size) == (data.name, data.image_size)), DEMO_PRESETS[-1]
        )
    settings: dict[str, Any] = {}
    for key, value in changed_data(preset(fitting).data, data).items():
        settings[key] = value
        if key in ("data.image_size", "data.channels"):
            settings[key.replace("data.", "flow.")] = value
    return f"align a flow with it: rrepa-lab train {fitting} --out runs/mine --encoder {name}{set_words(settings)}"
