"""The bundled autoencoder and runs of photographs: how they were made.

    export RREPA_DATA=DIR    # cifar10/ in it, or torchvision's files
    rrepa-lab vae train cifar10 --out assets/autoencoders/cifar10 --set data.holdout=0.1 --set steps=6000
    rrepa-lab train cifar10-reverse --out runs/cifar10-reverse    # and the other presets: cifar10-none, cifar10-latent-...
    python -m rrepa_lab.studies.bundled runs/cifar10-reverse

The last line writes the run's weights in bfloat16 to assets/runs with its records, scores it as stored on 1,000 training and
1,000 test images and on 2,000 samples, and draws samples for its card. A run that names a folder of this machine is refused.
"""

import argparse
from pathlib import Path

import pandas as pd

from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.evaluate import evaluate
from rrepa_lab.files import write_atomically
from rrepa_lab.paths import assets
from rrepa_lab.runs.attached import local_weights
from rrepa_lab.runs.card import save_scores
from rrepa_lab.runs.model_card import CARD_PICTURES
from rrepa_lab.runs.names import SAMPLES
from rrepa_lab.runs.run import Run
from rrepa_lab.runs.store import load
from rrepa_lab.space.autoencoder import is_bundled
from rrepa_lab.studies.digits import store, write_sums

PARTS = ("likelihood", "gradient", "iterated", "bayes", "samples")
IMAGES = 1000  # of a split that are scored, as in the studies
SHOWN = 20  # samples of the picture in the card


def bundle(source: Path) -> Path:
    """Write a trained run to assets/runs; returns its folder there.

    Raises: LabError for a run that is not trained to its end, or whose data, space or teacher is a place on this machine.
    """
    run = load(source)
    config = run.config
    if run.step < config.train.steps:
        raise LabError(f"{source} is at step {run.step} of {config.train.steps}: train it to its end")
    places: dict[str, object] = {
        "data.path": config.data.path,
        "space.weights": None if is_bundled(config.space) else config.space.weights,
    }
    places |= {f"encoder {number}": local_weights(one) for number, one in enumerate(config.teachers)}
    for key, value in places.items():
        if value is not None:
            raise LabError(f"{key} is {value}, a folder of this machine: bundle it, or leave it out ($RREPA_DATA has data)")
    target = assets() / "runs" / config.name
    stored = store(source, target)
    picture = CARD_PICTURES["samples"](stored, SHOWN)
    write_atomically(target / SAMPLES, lambda temporary: temporary.write_bytes(picture.png))
    save_scores(stored, scores(stored))
    return target


def scores(run: Run) -> pd.DataFrame:
    """The table of a bundled run; its accuracies are under the noise of `config.read`."""
    return evaluate(run, ["train", "test"], limit=IMAGES, parts=PARTS)


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a trained run")
    for folder in parser.parse_args().runs:
        print(bundle(folder))
    write_sums()


if __name__ == "__main__":
    main()
