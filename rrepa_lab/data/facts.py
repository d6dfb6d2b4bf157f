"""What a data set holds, found out from its listing before anything is trained on it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.images import missing_classes
from rrepa_lab.data.splits import class_names, load_split, split_rule, splits
from rrepa_lab.errors import LabError


class DataFacts(NamedTuple):
    """What a data set holds."""

    classes: list[str]
    counts: dict[str, dict[str, int]]  # split -> class -> images; the class "" stands for images without a label
    ignored: dict[str, int]  # kind of entry -> how many were left out
    rules: dict[str, str]  # split -> the rule by which its images are chosen, in words
    missing: dict[str, list[str]]  # split -> classes without an image in it
    levels: int  # integer values a number can take


def check_data(config: DataConfig, classes: Sequence[str] | None = None) -> DataFacts:
    """Read the listing of every split, not the pictures; LabError in one line for what would end a training later."""
    names = list(classes) if classes is not None else class_names(config)
    counts, rules, missing, levels = {}, {}, {}, 0
    ignored: dict[str, int] = {}
    for split in splits(config):
        images = load_split(config, split, names)
        found = torch.bincount(images.labels + 1, minlength=len(images.classes) + 1).tolist()
        counts[split] = dict(zip(images.classes, found[1:], strict=True)) if images.classes else {"": found[0]}
        rules[split], missing[split] = split_rule(config, split), missing_classes(images.labels, images.classes)
        levels = images.levels
        ignored |= getattr(images, "ignored", {})  # of sets that list folders
    if "train" not in counts:
        raise LabError(f"{config.path or config.name} has no train/: there is nothing to train on")
    return DataFacts(names, counts, ignored, rules, missing, levels)


def describe_data(config: DataConfig) -> dict[str, str]:
    """The facts of `check_data` in words: classes, images and rule of each split, and what was ignored."""
    facts = check_data(config)
    names = ", ".join(facts.classes[:10]) + (", ..." if len(facts.classes) > 10 else "")
    lines = {"classes": f"{len(facts.classes)}: {names}" if names else "none: pictures without class folders"}
    for split, counts in facts.counts.items():
        lacking = f"; none of {', '.join(facts.missing[split])}" if facts.missing[split] else ""
        lines[split] = f"{sum(counts.values())} images ({facts.rules[split]}){lacking}"
    if facts.ignored:
        lines["ignored"] = ", ".join(f"{count} {kind}" for kind, count in facts.ignored.items())
    return lines
