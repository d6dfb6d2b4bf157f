"""Commands that make something: train, import-tarflow, sample, encoder."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.printing import hint, print_facts, print_rows, progress
from rrepa_lab.cli.words import (
    add_command,
    add_device,
    add_output,
    add_run,
    add_set,
    class_labels,
    integers,
    sample_options,
    setting,
)
from rrepa_lab.errors import LabError
from rrepa_lab.signals import ending_signals

if TYPE_CHECKING:
    from rrepa_lab.training.selfsup import EncoderTrainConfig


def register(commands: Any) -> None:
    """Add these commands."""
    train = add_command(commands, "train", _train, "Train a run from a preset or a config.json.")
    train.add_argument("source", metavar="PRESET|config.json", help="for example digits-reverse")
    train.add_argument("--out", help="run directory")
    add_set(train)
    train.add_argument("--encoder", metavar="DIR", help="align with the encoder that `encoder train` wrote there")
    train.add_argument("--seed", type=int, help="train.seed")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    train.add_argument("--dry-run", action="store_true", help="print what would be trained, and stop")
    add_device(train, "auto")

    published = add_command(
        commands, "import-tarflow", _import_tarflow, "Make a run of a checkpoint of the public TARFlow code."
    )
    published.add_argument("file", metavar="FILE", help="for example imagenet_model_4_1024_8_8_0.05.pth")
    published.add_argument("out", metavar="OUT", help="run directory to write")
    published.add_argument("--img-size", type=int, help="height and width of an image (read off the tensors)")
    published.add_argument("--patch-size", type=int, help="height and width of a patch (read off the tensors)")
    published.add_argument("--channels", type=int, help="1 or 3 (read off the tensors)")
    published.add_argument("--head-width", type=int, default=64, help="numbers in an attention head, which no tensor tells")
    published.add_argument("--noise", help="training noise: sigma, such as 0.05, or uniform (read off the file name)")
    published.add_argument("--name", help="name of the run (that of the file)")
    published.add_argument("--data", metavar="FOLDER", help="image folder with <split>/<class>/<picture>")

    sample = add_command(commands, "sample", _sample, "Draw images: every label with every seed.")
    add_run(sample)
    sample.add_argument("--labels", help="classes: all, cat,dog, 3, or 0..9 (none: unconditional)")
    sample.add_argument("--seeds", default="0..15", help="3, or 0..9, or 1,4,7")
    sample.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance weight")
    sample.add_argument("--temperature", type=float, default=1.0, help="of the unconditional branch, so only with guidance")
    sample.add_argument("--strength", type=float, default=1.0, help="of the last step along the score; 0 changes nothing")
    sample.add_argument("--no-denoise", action="store_true", help="leave out the last step along the score")
    sample.add_argument("--method", default="auto", help="decoding: auto, cached, jacobi, sequential; all give the same images")
    sample.add_argument("--precision", default="float32", help="of the products: float32, or bfloat16, which tells its error")
    add_output(sample, "--out", default="grid.png", help="picture to write")

    encoder = commands.add_parser("encoder", help="Train or score a small vision encoder.").add_subparsers(
        metavar="ACTION", required=True
    )
    encoder_train = add_command(encoder, "train", _encoder_train, "Train an encoder without labels.")
    encoder_train.add_argument("--out", required=True, help="folder to write")
    encoder_train.add_argument("--data", metavar="FOLDER", help="train on the pictures of an image folder, not on digits")
    encoder_train.add_argument("--size", type=int, default=32, help="of --data: height and width of an image")
    add_set(encoder_train)
    score = add_command(encoder, "score", _encoder_score, "k-NN accuracy beside raw pixels and an untrained encoder.")
    score.add_argument("encoder", nargs="?", default="bundled:digits", help="bundled:<name> or a folder")


def _train(given: argparse.Namespace) -> int:
    from rrepa_lab.data.facts import describe_data
    from rrepa_lab.evaluation.train import train
    from rrepa_lab.runs.config import complete
    from rrepa_lab.runs.describe import describe_config
    from rrepa_lab.runs.presets import read_config

    settings = _encoder_in(given.encoder) if given.encoder else {}
    settings |= dict(map(setting, given.set))
    if given.seed is not None:
        settings["train.seed"] = given.seed
    config = read_config(given.source).override(settings)
    if given.dry_run:
        known = config.data.name != "folder" or config.data.path is not None
        counted = config.align.counted(config.flow.blocks, config.flow.layers)
        config = complete(config) if known else config.model_copy(update={"align": counted})
        facts = describe_config(config)
        if known:
            facts |= describe_data(config.data)
        facts["state in memory"] = (
            f"{facts['parameters'] * 20 / 2**20:.0f} MiB (weights, gradients, optimizer, average; float32)"
        )
        print_facts(facts if not given.json else {**facts, "config": config.to_dict()}, given.json)
        return 0
    if given.out is None:
        raise LabError("where shall the run go? add --out runs/NAME")
    main_process = os.environ.get("RANK", "0") == "0"  # one of several under torchrun or accelerate launch
    report = None
    bar = progress(config.train.steps, "step", silent=not main_process)
    with (
        stop_on_interrupt() as stopped,
        bar,
        closing(train(config, given.out, resume=given.resume, device=given.device, stop=stopped)) as reports,
    ):
        for report in reports:
            bar.update(report.step - bar.n)
            parts = {"loss": f"{report.loss:.3f}", "nats/dim": f"{report.nats_per_dim:.3f}"}
            if report.similarity:
                parts["similarity"] = f"{sum(report.similarity.values()) / len(report.similarity):.3f}"
            bar.set_postfix(parts, refresh=False)
    if report is None:
        raise LabError(f"{given.out} is finished: nothing left to train; raise train.steps in a new run")
    facts = {"run": str(given.out), "step": report.step, "loss": report.loss, "nats_per_dim": report.nats_per_dim,
             "held_out_nats_per_dim": report.held_out_nats_per_dim, "seconds": report.seconds, **report.similarity}  # fmt: skip
    if not main_process:
        return int(stopped())
    print_facts(facts, given.json)
    if stopped():
        hint(given, f"stopped and saved; go on: rrepa-lab train {given.out}/config.json --out {given.out} --resume")
        return 1
    from rrepa_lab.runs.store import load

    hint(given, f"look at samples: rrepa-lab sample {given.out} {sample_options(load(given.out).config.flow.classes)}")
    return 0


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C, SIGTERM and SIGHUP set a flag, so that a step can be finished and saved; a second one stops at once.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    asked: list[bool] = []

    def handle(_signal: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        with suppress(OSError):  # the terminal may be gone
            print("\nstopping after this step; Ctrl-C again to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in ending_signals()}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _import_tarflow(given: argparse.Namespace) -> int:
    from rrepa_lab.runs.import_tarflow import facts, import_tarflow

    run = import_tarflow(
        given.file,
        given.out,
        image_size=given.img_size,
        patch_size=given.patch_size,
        channels=given.channels,
        head_width=given.head_width,
        noise=given.noise,
        name=given.name,
        data=given.data,
    )
    print_facts({"run": given.out, **facts(run), "weights": "of the last step, not averaged"}, given.json)
    classes = run.config.flow.classes
    hint(given, f"look at samples: rrepa-lab sample {given.out} {sample_options(classes)}")
    return 0


def _sample(given: argparse.Namespace) -> int:
    from tqdm import tqdm

    from rrepa_lab.runs.store import load
    from rrepa_lab.sampling.sample import sample
    from rrepa_lab.viz.images import check_sheet, grid, picture_format, save_picture

    picture_format(given.out)  # before anything is drawn
    run = load(given.run_name, given.device)
    chosen = class_labels("--labels", given.labels, run.classes) if given.labels else [-1]
    seeds = integers("--seeds", given.seeds)
    pairs = [(label, seed) for label in chosen for seed in seeds]
    columns = len(seeds) if len(chosen) > 1 else None
    check_sheet(given.out, len(pairs), *run.flow.config.image_shape[1:], columns)
    total = run.flow.config.blocks * len(pairs)
    with tqdm(total=total, unit="image and block", disable=None, leave=False, dynamic_ncols=True) as bar:
        made = sample(
            run,
            [seed for _, seed in pairs],
            [label for label, _ in pairs],
            given.guidance,
            temperature=given.temperature,
            denoise=not given.no_denoise,
            strength=given.strength,
            method=given.method,
            precision=given.precision,
            progress=lambda report: bar.update(report.images),
        )
    sheet = grid(made.images, columns)
    save_picture(sheet, given.out)
    facts = {
        "run": run.name,
        "images": len(pairs),
        "labels": [run.classes[label] if label >= 0 else "none" for label in chosen],
        "seeds": seeds,
        "guidance": given.guidance,
        "finish": made.finish,
        "decoded by": made.method,
        **({} if made.error is None else {"decoding error": made.error}),
        "out": given.out,
    }
    print_facts(facts, given.json)
    hint(given, f"classify a picture: rrepa-lab classify {given.run_name} IMAGE.png")
    return 0


def _encoder_train(given: argparse.Namespace) -> int:
    from rrepa_lab.align.encoder import Encoder
    from rrepa_lab.training.selfsup import EncoderTrainConfig, encoder_of_folder, knn_table, train_encoder, write_encoder_card

    settings = dict(map(setting, given.set))
    config = (encoder_of_folder(given.data, given.size) if given.data else EncoderTrainConfig()).override(settings)
    if (Path(given.out) / "model.safetensors").exists():
        raise LabError(f"{given.out} already holds an encoder: choose another --out")
    with progress(config.steps, "step") as bar:
        for report in train_encoder(config, given.out):
            bar.set_postfix(loss=f"{report.loss:.3f}", refresh=False)
            bar.update()
    encoder = Encoder(config.encoder.override({"weights": str(Path(given.out) / "model.safetensors")}))
    write_encoder_card(Path(given.out), config, report.loss, knn_table(encoder, config.data))
    print_facts({"encoder": str(given.out), "loss": report.loss}, given.json)
    hint(given, _align_with(str(given.out), config))
    return 0


def _trained_encoder(name: str) -> tuple[Path, "EncoderTrainConfig"]:
    """Folder and settings of an encoder, by bundled:<name> or folder."""
    from rrepa_lab.align.encoder import BUNDLED
    from rrepa_lab.paths import assets
    from rrepa_lab.readers import read_json, validate
    from rrepa_lab.training.selfsup import EncoderTrainConfig

    folder = assets() / "encoders" / name.removeprefix(BUNDLED) if name.startswith(BUNDLED) else Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise LabError(f"no encoder at {folder}: give bundled:digits or a folder written by rrepa-lab encoder train")
    return folder, validate(EncoderTrainConfig, read_json(folder / "config.json"), str(folder / "config.json"))


def _align_with(name: str, config: "EncoderTrainConfig") -> str:
    """What to do with an encoder."""
    data = config.data
    preset = "digits-reverse" if data.name == "digits" else "imagefolder-reverse"
    more = "" if data.name == "digits" else f" --set data.path={data.path}"
    return f"align a flow with it: rrepa-lab train {preset} --out runs/mine --encoder {name}{more}"


def _encoder_in(name: str) -> dict[str, Any]:
    """The settings of a run that align it with an encoder of `encoder train`."""
    from rrepa_lab.align.encoder import BUNDLED

    folder, config = _trained_encoder(name)
    weights = name if name.startswith(BUNDLED) else str((folder / "model.safetensors").absolute())
    return {"encoder": config.encoder.override({"weights": weights}).to_dict()}


def _encoder_score(given: argparse.Namespace) -> int:
    from rrepa_lab.align.encoder import Encoder
    from rrepa_lab.training.selfsup import knn_table

    folder, config = _trained_encoder(str(given.encoder))
    encoder = Encoder(config.encoder.override({"weights": str(folder / "model.safetensors")}))
    print_rows(knn_table(encoder, config.data).to_dict("records"), given.json)
    hint(given, _align_with(str(given.encoder), config))
    return 0
