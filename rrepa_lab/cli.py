"""The command line: parse, call, print. Tables for people; with --json, JSON alone on standard output.

Exit status: 0 all well, 1 a check failed or the work was interrupted, 2 a mistake in what was asked for.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rrepa_lab import __version__
from rrepa_lab.errors import LabError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `rrepa-lab`."""
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        return given.run(given)
    except LabError as error:
        print(f"rrepa-lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rrepa-lab: interrupted", file=sys.stderr)
        return 1


# --- commands ---------------------------------------------------------------------------------------------------------


def _train(given: argparse.Namespace) -> int:
    from rrepa_lab.runs import describe_config
    from rrepa_lab.training.loop import read_config, train

    settings = dict(map(_setting, given.set))
    if given.seed is not None:
        settings["train.seed"] = given.seed
    config = read_config(given.source).override(settings)
    if given.dry_run:
        facts = describe_config(config)
        facts["state in memory"] = (
            f"{facts['parameters'] * 20 / 2**20:.0f} MiB (weights, gradients, optimizer, average; float32)"
        )
        _print_facts(facts if not given.json else {**facts, "config": config.to_dict()}, given.json)
        return 0
    if given.out is None:
        raise LabError("where shall the run go? add --out runs/NAME")
    from tqdm import tqdm

    main_process = os.environ.get("RANK", "0") == "0"  # one of several under torchrun or accelerate launch
    report = None
    bar = tqdm(total=config.train.steps, unit="step", disable=None if main_process else True, dynamic_ncols=True)
    with (
        _stop_on_interrupt() as stopped,
        bar,
        closing(train(config, given.out, resume=given.resume, device=given.device)) as reports,
    ):
        for report in reports:
            bar.update(report.step - bar.n)
            parts = {"loss": f"{report.loss:.3f}", "nats/dim": f"{report.nats_per_dim:.3f}"}
            if report.similarity:
                parts["similarity"] = f"{sum(report.similarity.values()) / len(report.similarity):.3f}"
            bar.set_postfix(parts, refresh=False)
            if stopped():
                break
    if report is None:
        raise LabError(f"{given.out} is finished: nothing left to train; raise train.steps in a new run")
    facts = {"run": str(given.out), "step": report.step, "loss": report.loss, "nats_per_dim": report.nats_per_dim,
             "held_out_nats_per_dim": report.held_out_nats_per_dim, "seconds": report.seconds, **report.similarity}  # fmt: skip
    if not main_process:
        return int(stopped())
    _print_facts(facts, given.json)
    if stopped():
        _hint(given, f"stopped and saved; go on: rrepa-lab train {given.out}/config.json --out {given.out} --resume")
        return 1
    _hint(given, f"look at samples: rrepa-lab sample {given.out} --labels 0..9 --seeds 0..9 --out grid.png")
    return 0


def _sample(given: argparse.Namespace) -> int:
    from rrepa_lab.files import write_atomically
    from rrepa_lab.runs import load
    from rrepa_lab.sampling.sample import sample
    from rrepa_lab.viz.images import grid

    out = Path(given.out)
    if out.suffix.lower() not in (".png", ".webp", ".jpg"):
        raise LabError(f"--out must be a picture (.png, .webp or .jpg), not {out}")
    run = load(given.run_name, given.device)
    chosen = _integers("--labels", given.labels) if given.labels else [-1]
    seeds = _integers("--seeds", given.seeds)
    pairs = [(label, seed) for label in chosen for seed in seeds]
    made = sample(
        run,
        [seed for _, seed in pairs],
        [label for label, _ in pairs],
        given.guidance,
        denoise=not given.no_denoise,
        method=given.method,
    )
    sheet = grid(made.images, columns=len(seeds) if len(chosen) > 1 else None)
    write_atomically(
        out, lambda path: sheet.save(path, format={".jpg": "JPEG"}.get(out.suffix.lower(), out.suffix[1:].upper()))
    )
    facts = {
        "run": run.name,
        "images": len(pairs),
        "labels": chosen,
        "seeds": seeds,
        "guidance": given.guidance,
        "out": str(out),
    }
    _print_facts(facts, given.json)
    _hint(given, f"classify a picture: rrepa-lab classify {given.run_name} IMAGE.png")
    return 0


def _classify(given: argparse.Namespace) -> int:
    import torch
    from PIL import Image, UnidentifiedImageError

    from rrepa_lab.analysis.classify import classify
    from rrepa_lab.data.pixels import from_picture
    from rrepa_lab.runs import load

    run = load(given.run_name, given.device)
    images = []
    for path in given.images:
        try:
            with Image.open(path) as opened:
                images.append(from_picture(opened, run.flow.config.channels, run.flow.config.image_size))
        except (FileNotFoundError, IsADirectoryError):
            raise LabError(f"no picture at {path}") from None
        except (UnidentifiedImageError, OSError) as error:
            raise LabError(f"{path} is not a picture that can be read ({type(error).__name__})") from None
    result = classify(run, torch.cat(images).to(run.device), given.method)
    rows = []
    for path, scores in zip(given.images, result.scores.tolist(), strict=True):
        order = sorted(range(len(scores)), key=lambda k: -scores[k])
        row = {
            "image": path,
            "label": run.classes[order[0]],
            "margin": scores[order[0]] - scores[order[1]],
            "runner_up": run.classes[order[1]],
        }
        rows.append({**row, "scores": dict(zip(run.classes, scores, strict=True))} if given.json else row)
    _print_rows(rows, given.json)
    _hint(given, f"score a whole split: rrepa-lab evaluate {given.run_name}")
    return 0


def _evaluate(given: argparse.Namespace) -> int:
    from rrepa_lab.analysis.evaluate import evaluate
    from rrepa_lab.runs import load
    from rrepa_lab.training.card import save_scores

    run = load(given.run_name, given.device)
    table = evaluate(run, given.split, given.samples)
    if given.save and run.directory is not None:
        save_scores(run, table)
    _print_rows(table.to_dict("records"), given.json)
    _hint(given, f"see what it draws: rrepa-lab sample {given.run_name} --labels 0..9 --seeds 0..9 --out grid.png")
    return 0


def _describe(given: argparse.Namespace) -> int:
    from rrepa_lab.runs import available, describe_config, load
    from rrepa_lab.training.loop import read_config

    if given.source is None:
        rows = [
            {"name": info.name, "strategy": info.strategy, "data": info.data, "summary": info.summary} for info in available()
        ]
        _print_rows(rows, given.json)
        _hint(given, "one of them in full: rrepa-lab describe digits-reverse --routing")
        return 0
    source: Any
    try:
        source = load(given.source)
        config = source.config
    except LabError as error:
        try:
            source = config = read_config(given.source)
        except LabError:
            raise error from None
    if not given.routing:
        _print_facts(describe_config(config), given.json)
        _hint(given, f"where its gradient goes: rrepa-lab describe {given.source} --routing")
        return 0
    from rrepa_lab.align.routing import routing

    table = routing(source)
    if given.json:
        _print_rows(table.to_dict("records"), True)
        return 0
    table["norm"] = [f"{value:.2e}" if value else "0" for value in table["gradient_norm"]]
    wide = table.pivot(index="group", columns=["tap", "strategy"], values="norm")
    print(f"Gradient norm of the alignment loss of {config.name}, by strategy and parameters ({table.n[0]} images, float64):\n")
    print(
        wide.loc[
            table["group"].drop_duplicates(), table[["tap", "strategy"]].drop_duplicates().apply(tuple, axis=1)
        ].to_string()
    )
    return 0


def _encoder_train(given: argparse.Namespace) -> int:
    from tqdm import tqdm

    from rrepa_lab.align.encoder import Encoder
    from rrepa_lab.align.selfsup import EncoderTrainConfig, knn_table, train_encoder
    from rrepa_lab.training.card import write_encoder_card

    config = EncoderTrainConfig().override(dict(map(_setting, given.set)))
    if (Path(given.out) / "model.safetensors").exists():
        raise LabError(f"{given.out} already holds an encoder: choose another --out")
    with tqdm(total=config.steps, unit="step", disable=None) as bar:
        for report in train_encoder(config, given.out):
            bar.update()
            bar.set_postfix(loss=f"{report.loss:.3f}", refresh=False)
    encoder = Encoder(config.encoder.override({"weights": str(Path(given.out) / "model.safetensors")}))
    write_encoder_card(Path(given.out), config, report.loss, knn_table(encoder, config.data))
    _print_facts({"encoder": str(given.out), "loss": report.loss}, given.json)
    _hint(given, f"how good is it: rrepa-lab encoder score {given.out}")
    return 0


def _encoder_score(given: argparse.Namespace) -> int:
    from rrepa_lab.align.encoder import BUNDLED, Encoder
    from rrepa_lab.align.selfsup import EncoderTrainConfig, knn_table
    from rrepa_lab.places import assets

    name = str(given.encoder)
    folder = assets() / "encoders" / name.removeprefix(BUNDLED) if name.startswith(BUNDLED) else Path(name)
    if not (folder / "config.json").is_file():
        raise LabError(f"no encoder at {folder}: give bundled:digits or a folder written by rrepa-lab encoder train")
    config = EncoderTrainConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    encoder = Encoder(config.encoder.override({"weights": str(folder / "model.safetensors")}))
    _print_rows(knn_table(encoder, config.data).to_dict("records"), given.json)
    _hint(
        given,
        "align a flow with it: rrepa-lab train digits-reverse --out runs/mine --set encoder.weights=FOLDER/model.safetensors",
    )
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from rrepa_lab.doctor import examine

    table = examine()
    _print_rows(table.to_dict("records"), given.json)
    if table["ok"].all():
        _hint(given, "all well; open the page: rrepa-lab app")
        return 0
    return 1


def _app(given: argparse.Namespace) -> int:
    from rrepa_lab.places import bundled

    os.execv(sys.executable, [sys.executable, str(bundled("app") / "demo.py"), *given.rest])


# --- parsing ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rrepa-lab", description="Train, sample, classify and read normalizing flows.")
    parser.add_argument("--version", action="version", version=f"rrepa-lab {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, parent: Any = commands) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = parent.add_parser(name, help=help, description=help, formatter_class=_Formatter)
        command.add_argument(
            "--json", action="store_true", help="print JSON for programs, and nothing else, on standard output"
        )
        command.set_defaults(run=run)
        return command

    def add_run(command: argparse.ArgumentParser) -> None:
        command.add_argument("run_name", metavar="RUN", help="bundled or local run, run directory, or Hub id")
        command.add_argument("--device", default="cpu", help="auto, cpu or cuda")

    def add_set(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting: train.steps=200"
        )

    train = add("train", _train, "Train a run from a preset or a config.json.")
    train.add_argument("source", metavar="PRESET|config.json", help="for example digits-reverse")
    train.add_argument("--out", help="run directory")
    add_set(train)
    train.add_argument("--seed", type=int, help="train.seed")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    train.add_argument("--dry-run", action="store_true", help="print what would be trained, and stop")
    train.add_argument("--device", default="auto", help="auto, cpu or cuda")

    sample = add("sample", _sample, "Draw images: every label with every seed.")
    add_run(sample)
    sample.add_argument("--labels", help="classes: 3, or 0..9, or 1,4,7 (none: unconditional)")
    sample.add_argument("--seeds", default="0..15", help="seeds, spelled like labels")
    sample.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance weight")
    sample.add_argument("--no-denoise", action="store_true", help="leave out the last step along the score")
    sample.add_argument("--method", default="auto", help="decoding: auto, cached, sequential")
    sample.add_argument("--out", default="grid.png", help="picture to write")

    classify = add("classify", _classify, "Read the class of pictures off a flow.")
    add_run(classify)
    classify.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    classify.add_argument("--method", default="gradient", help="gradient or bayes")

    evaluate = add("evaluate", _evaluate, "Score a run on a split, with the protocol of every number.")
    add_run(evaluate)
    evaluate.add_argument("--split", default="test", help="train, val or test")
    evaluate.add_argument("--samples", type=int, default=2000, help="images generated for the sample scores; 0 for none")
    evaluate.add_argument("--save", action="store_true", help="write scores.csv and the card into the run directory")

    describe = add("describe", _describe, "List the runs, or tell what one run or preset is.")
    describe.add_argument("source", nargs="?", metavar="RUN|PRESET|config.json", help="what to describe (none: list the runs)")
    describe.add_argument("--routing", action="store_true", help="the gradient atlas: which parameters each strategy reaches")

    encoder = commands.add_parser("encoder", help="Train or score a small vision encoder.").add_subparsers(
        metavar="ACTION", required=True
    )
    encoder_train = add("train", _encoder_train, "Train an encoder without labels.", encoder)
    encoder_train.add_argument("--out", required=True, help="folder to write")
    add_set(encoder_train)
    score = add("score", _encoder_score, "k-NN accuracy beside raw pixels and an untrained encoder.", encoder)
    score.add_argument("encoder", nargs="?", default="bundled:digits", help="bundled:<name> or a folder")

    add("doctor", _doctor, "Check the installation: versions, device, bundled files.")
    app = commands.add_parser("app", help="Open the page; takes the arguments of app/demo.py.", add_help=False)
    app.add_argument("rest", nargs=argparse.REMAINDER)
    app.set_defaults(run=_app)
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults, but not for switches and for what has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def _setting(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign:
        raise LabError(f"--set takes KEY=VALUE, for example train.steps=200, not {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _integers(option: str, text: str) -> list[int]:
    """Read "3", "1,4,7" and "0..9" (both ends included), also mixed."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            low, dots, high = part.partition("..")
            numbers += range(int(low), int(high) + 1) if dots else [int(low)]
    except ValueError:
        raise LabError(f"{option} takes integers such as 3, 1,4,7 or 0..9, not {text!r}") from None
    if not numbers:
        raise LabError(f"{option} {text} is empty: the first number is above the last")
    return numbers


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C only notes the wish, so that a step can be finished and saved; a second one stops at once."""
    asked: list[bool] = []

    def handle(_signal: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        print("\nstopping after this report; Ctrl-C again to stop at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


# --- printing ---------------------------------------------------------------------------------------------------------


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        shown = f"{value:.4g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{key:<{width}}  {shown if shown not in (None, '') else '-'}")


def _print_rows(rows: list[dict[Any, Any]], as_json: bool) -> None:
    if as_json:
        # JSON knows no nan: a measurement that does not exist is null
        plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]  # noqa: PLR0124
        print(json.dumps(plain, indent=2, allow_nan=False))
    elif rows:
        from tabulate import tabulate

        print(tabulate(rows, headers="keys", floatfmt=".4f", disable_numparse=[0]))
    else:
        print("nothing found")


def _hint(given: argparse.Namespace, text: str) -> None:
    if not given.json:
        print(f"\n{text}")


if __name__ == "__main__":
    sys.exit(main())
