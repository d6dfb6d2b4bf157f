"""Commands that read a flow: classify, evaluate."""

import argparse
from typing import Any

from rrepa_lab.cli.printing import hint, print_rows
from rrepa_lab.cli.words import add_command, add_run
from rrepa_lab.errors import LabError


def register(commands: Any) -> None:
    """Add these commands."""
    classify = add_command(commands, "classify", _classify, "Read the class of pictures off a flow.")
    add_run(classify)
    classify.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    classify.add_argument("--method", default="gradient", help="gradient or bayes")

    evaluate = add_command(commands, "evaluate", _evaluate, "Score a run on a split, with the protocol of every number.")
    add_run(evaluate)
    evaluate.add_argument("--split", default="test", help="train, val or test")
    evaluate.add_argument("--samples", type=int, default=2000, help="images generated for the sample scores; 0 for none")
    evaluate.add_argument("--save", action="store_true", help="write scores.csv and the card into the run directory")


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
    print_rows(rows, given.json)
    hint(given, f"score a whole split: rrepa-lab evaluate {given.run_name}")
    return 0


def _evaluate(given: argparse.Namespace) -> int:
    from rrepa_lab.analysis.evaluate import evaluate
    from rrepa_lab.runs import load
    from rrepa_lab.training.card import save_scores

    run = load(given.run_name, given.device)
    table = evaluate(run, given.split, given.samples)
    if given.save and run.directory is not None:
        save_scores(run, table)
    print_rows(table.to_dict("records"), given.json)
    hint(given, f"see what it draws: rrepa-lab sample {given.run_name} --labels 0..9 --seeds 0..9 --out grid.png")
    return 0
