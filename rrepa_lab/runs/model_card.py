"""README.md of a run on the Hugging Face Hub: metadata that the Hub reads, samples, facts, scores, and how to load it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rrepa_lab.registry import Registry
from rrepa_lab.runs.attached import local_weights
from rrepa_lab.runs.card import Described, card_lines
from rrepa_lab.runs.config import RunConfig

LIBRARY = "rrepa_lab"
# data set by name -> its repository on the Hub
DATA_ON_HUB = {
    "mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k",
}  # fmt: skip


class CardPicture(NamedTuple):
    """A picture for a model card."""

    png: bytes
    caption: str  # what it shows, and how to make it again


# (run, number of images) -> picture; each is pushed as <name>.png and stands in the card
CARD_PICTURES: Registry[Callable[[Any, int], CardPicture]] = Registry("card picture", "rrepa_lab.viz.card_pictures")


def model_card(
    run: Described,
    repo_id: str,
    license: str,
    metrics: pd.DataFrame,
    scores: pd.DataFrame | None,
    pictures: Mapping[str, CardPicture],
) -> str:
    """The text of README.md.

    Args:
        repo_id: "owner/name", where it will stand.
        license: of the weights, by the Hub's identifiers ("mit", "apache-2.0", "unknown").
        metrics: the reports of the training, as `Records.table`.
        scores: the table of `rl.evaluate`, None if there is none.
        pictures: file name -> picture.
    """
    from huggingface_hub import ModelCardData

    classes = run.config.flow.classes
    tags = [LIBRARY, "normalizing-flow", "tarflow", "image-generation", run.config.align.strategy]
    tags[-1] = "r-repa" if tags[-1].startswith("reverse") else f"alignment-{tags[-1]}"
    results = [] if scores is None else _results(run.config, scores)
    data = ModelCardData(
        license=license,
        library_name=LIBRARY,
        pipeline_tag=None if classes else "unconditional-image-generation",
        tags=[*tags, "class-conditional"] if classes else tags,
        datasets=[hub_data] if (hub_data := data_on_hub(run.config)) else None,
        metrics=["accuracy"] if any(result.metric_type == "accuracy" for result in results) else None,
        model_name=run.name if results else None,
        eval_results=results or None,
    )
    shown = [line for name, one in pictures.items() for line in ("", f"![{one.caption}]({name})", "", f"{one.caption}.")]
    first, *rest = card_lines(run, metrics, scores)
    text = "\n".join(["---", data.to_yaml(), "---", "", first, *shown, *rest, *_loading(repo_id, classes), ""])
    return _without_folders(text, run.config)


def _without_folders(text: str, config: RunConfig) -> str:
    """The text with files of this machine by their names alone."""
    encoders = [local_weights(encoder) for encoder in config.teachers]
    space = (
        Path(config.space.weights) if config.space.weights is not None and Path(config.space.weights).is_absolute() else None
    )
    for path in (*encoders, space):
        if path is not None:
            text = text.replace(str(path), "/".join(path.parts[-2:]))
    return text


def data_on_hub(config: RunConfig) -> str | None:
    """The data set's repository on the Hub, if it is one that is known."""
    name = config.data.name
    return name.removeprefix("hub:") if name.startswith("hub:") else DATA_ON_HUB.get(name)


def _results(config: RunConfig, scores: pd.DataFrame) -> list[Any]:
    """The scores as the entries of the Hub's model-index, each with its protocol."""
    from huggingface_hub import EvalResult

    found = []
    for row in scores.to_dict("records"):
        metric = str(row["metric"])
        accuracy = metric.endswith("_accuracy")
        found.append(
            EvalResult(
                task_type="image-classification" if accuracy else "unconditional-image-generation",
                dataset_type=data_on_hub(config) or config.data.name,
                dataset_name=config.data.name,
                dataset_split=str(row["split"]),
                metric_type="accuracy" if accuracy else metric,
                metric_name=f"{metric} ({row['unit']})" if row["unit"] else metric,
                metric_value=float(row["value"]),
                metric_args={"n": int(row["n"]), "protocol": str(row["protocol"])},
            )
        )
    return found


def _loading(repo_id: str, classes: int) -> list[str]:
    label = ", labels=0, guidance=1.0" if classes else ""
    option = " --labels 0" if classes else ""
    return [
        "", "## Use", "", "```python", "import rrepa_lab as rl", "", f'run = rl.load("{repo_id}")',
        f"images = rl.sample(run, seeds=range(16){label}).images  # (16, C, H, W) in [-1, 1]", "```", "", "```sh",
        f"rrepa-lab sample {repo_id}{option} --seeds 0..15 --out grid.png", f"rrepa-lab describe {repo_id}", "```",
    ]  # fmt: skip
