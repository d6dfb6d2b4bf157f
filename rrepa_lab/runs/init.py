"""A run that begins with the weights of another one: what must agree, what is copied, and what is recorded of it.

Rules for the classes, which go by name:

- A class that both runs have keeps its embedding, whatever its number. The names of a class of ImageNet ("tench, Tinca tinca",
  "tench") and its WordNet id ("n01440764") are the same. A class that is new begins as no label: with the mean of the other
  run's table.
- An imported run whose classes are mere numbers is taken by number, which is a warning; it must have as many classes.
- If none of the names agrees, that is an error: a table of other classes would be kept by accident.
- Without classes in the new run, the mean of the table becomes part of the token projection: the flow is that of no label.
  Without classes in the other run, all embeddings begin at 0, which is the flow as it was.
"""

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from rrepa_lab.align.projector import SHARED
from rrepa_lab.data.layout import first_names
from rrepa_lab.errors import LabError, LabWarning
from rrepa_lab.flow.tarflow.config import FlowConfig
from rrepa_lab.runs.config import InitConfig, RunConfig
from rrepa_lab.runs.run import Run

# of FlowConfig: all that shapes the tensors or their meaning; classes go by name, and the noise may be another one
GEOMETRY = (
    "image_size", "channels", "patch_size", "width", "blocks", "layers", "head_width", "mlp", "mlp_ratio", "positions",
    "volume_preserving",
)  # fmt: skip
_WORDNET_ID = re.compile(r"n\d{8}")


def check_geometry(config: RunConfig, source: Run) -> None:
    """LabError, naming the setting and both values, unless the weights of `source` fit a flow of this configuration.

    Flows of two spaces of latents do not fit each other, even if their shapes agree: a latent means something else in each.
    """
    ours, theirs = config.space, source.config.space
    if ours.kind != theirs.kind:
        change = f"space.kind is {theirs.kind} there and {ours.kind} here"
        raise LabError(f"cannot begin with the weights of {source.name}: {change}; add --set space.kind={theirs.kind}")
    for key in ours.stored.keys() & theirs.stored.keys():
        if ours.stored[key] != theirs.stored[key]:
            change = f"space.stored.{key} is {theirs.stored[key]} there and {ours.stored[key]} here"
            advice = f"--set space.weights={theirs.weights}"
            raise LabError(f"cannot begin with the weights of {source.name}: {change}; add {advice}")
    for key in GEOMETRY:
        here, there = (_value(flow, key) for flow in (config.flow, source.config.flow))
        if here != there:
            setting = f"flow.{key} is {there} there and {here} here"
            text = str(there).replace(" ", "")
            raise LabError(f"cannot begin with the weights of {source.name}: {setting}; add --set flow.{key}={text}")


def _value(flow: FlowConfig, key: str) -> object:
    if key == "layers":  # [4, 4] is 4
        depths = flow.depths
        return depths[0] if len(set(depths)) == 1 else list(depths)
    return getattr(flow, key)


def start_from(run: Run, source: Run) -> None:
    """Give a fresh run the weights of another one, and record that in its configuration (`config.init`).

    Projectors are copied where both runs have the same teacher, tap and sizes; the others stay as they are.

    Raises: LabError for another geometry, and for classes of which none has the same name.
    """
    check_geometry(run.config, source)
    # one that was imported has a class count but no file of names
    numbered = bool(source.config.origin) and source.classes == [str(number) for number in range(len(source.classes))]
    rows = class_rows(source.classes, run.classes, numbered, source.name)
    weights = {name: value.detach().clone() for name, value in source.flow.state_dict().items()}
    for block in range(run.flow.config.blocks):
        _fit_classes(weights, f"blocks.{block}.", rows, run.flow.config.width)
    run.flow.load_state_dict(weights)
    record = InitConfig(
        name=source.name,
        step=source.step,
        weights=weights_fingerprint(source),
        origin=source.config.origin,
        classes=_class_words(rows, len(source.classes)),
        projectors=_copy_projectors(run, source),
    )
    run.config = run.config.model_copy(update={"init": record})


def class_rows(theirs: Sequence[str], ours: Sequence[str], numbered: bool = False, name: str = "the run") -> list[int | None]:
    """For each of our classes the row of their table, None for one that they do not have; the rules stand above.

    Args:
        numbered: their names are mere numbers.
        name: of their run, for messages.

    Example:
        >>> class_rows(["cat", "dog"], ["dog", "fox"])
        [1, None]
        >>> class_rows(["tench, Tinca tinca", "goldfish, Carassius auratus"], ["n01443537"])
        [1]
    """
    if not theirs or not ours:
        return [None] * len(ours)
    if numbered and list(theirs) != list(ours):
        if len(theirs) != len(ours):
            counts = f"{len(theirs)} numbered classes, and the data have {len(ours)}"
            raise LabError(f"{name} has {counts}: import it with --data, a folder of its own classes, so that names can agree")
        note = f"the classes of {name} are numbers: they are taken as {first_names(list(ours))}, in this order"
        warnings.warn(note, LabWarning, stacklevel=2)
        return list(range(len(ours)))
    same = _imagenet_ids() if _speaks_imagenet([*theirs, *ours]) else {}
    known = {same.get(key, key): row for row, key in enumerate(theirs)}
    found = [known.get(same.get(key, key)) for key in ours]
    if all(row is None for row in found):
        both = f"{first_names(list(theirs))} there, {first_names(list(ours))} here"
        raise LabError(f"no class of {name} is a class of the data ({both}): use data of the same classes, or flow.classes=0")
    return found


def _speaks_imagenet(names: Sequence[str]) -> bool:
    """Whether some of the names are WordNet ids, or lists of synonyms as timm has them."""
    return any(_WORDNET_ID.fullmatch(name) or ", " in name for name in names)


@lru_cache(maxsize=1)
def _imagenet_ids() -> dict[str, str]:
    """Every way in which the kit names a class of ImageNet -> its WordNet id."""
    classes = imagenet_classes()
    first = {key: name.split(",")[0].split(" (")[0] for key, name in classes.items()}
    count = Counter(first.values())
    ids = {name: key for key, name in classes.items()}
    for key, name in first.items():
        # data/sets/imagenet.py calls a class by its first name, with the id behind it where two share that
        ids[name if count[name] == 1 else f"{name} ({key})"] = key
    return ids


def imagenet_classes() -> dict[str, str]:
    """The 1,000 classes of ImageNet in the order of their ids: WordNet id -> name.

    Two are called "crane" and two "maillot": these have their number behind the name, since tables are keyed by it.
    """
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    names = list(info.label_descriptions())
    distinct = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
    return dict(zip(info.label_names(), distinct, strict=True))


def _fit_classes(weights: dict[str, Tensor], block: str, rows: Sequence[int | None], width: int) -> None:
    """Replace the class table of a block by one for these rows, in place."""
    table = weights.pop(f"{block}class_embed", None)
    if not rows:
        if table is not None:
            weights[f"{block}proj_in.bias"] += table.mean(dim=0)
        return
    unlabelled = torch.zeros(width) if table is None else table.mean(dim=0)
    weights[f"{block}class_embed"] = torch.stack([unlabelled if table is None or row is None else table[row] for row in rows])


def _class_words(rows: Sequence[int | None], theirs: int) -> str:
    if not rows or not theirs:
        return "none" if not rows else f"{len(rows)} new"
    kept = sum(row is not None for row in rows)
    new = f", {len(rows) - kept} new" if kept < len(rows) else ""
    left = f", {theirs - kept} left out" if kept < theirs else ""
    return f"{kept} by name{new}{left}"


def _copy_projectors(run: Run, source: Run) -> list[str]:
    """Copy the projectors that fit; returns their taps."""
    copied: list[str] = []
    own_teacher, other_teacher = ((one.config.encoder, one.config.align.teacher) for one in (run, source))
    if own_teacher != other_teacher:
        return copied
    for key, own in run.projectors.items():
        other = dict(source.projectors.items()).get(key)
        if other is not None and _shapes(own) == _shapes(other):
            own.load_state_dict(other.state_dict())
            copied += run.projectors.taps if key == SHARED else [key.replace("_", ".")]
    return copied


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def weights_fingerprint(run: Run) -> str:
    """16 hex digits of the SHA-256 of all tensors of flow and projectors, in float32 and in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(run.weights().items()):
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
