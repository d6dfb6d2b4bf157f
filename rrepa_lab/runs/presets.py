"""Named runs: `<family>-<strategy>`. The families are in `runs/families`, one file for each data set."""

from pathlib import Path
from typing import Any

from rrepa_lab.errors import LabError, unknown
from rrepa_lab.paths import assets
from rrepa_lab.readers import MissingFileError, read_json, validate
from rrepa_lab.runs.card import read_scores
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.families import cifar10, imagefolder, imagenet, imagenet_latent, tinyimagenet
from rrepa_lab.runs.families import digits as _digits
from rrepa_lab.runs.families.digits import DIGITS_VIT, digits
from rrepa_lab.runs.families.family import Family, Result
from rrepa_lab.runs.store import LARGEST_CONFIG

__all__ = [
    "ALIGNED", "DIGITS_VIT", "FAMILIES", "config_file", "digits", "names", "preset", "read_config", "reported_and_measured",
]  # fmt: skip

ALIGNED: tuple[str, ...] = ("none", "forward", "detach", "reverse")

FAMILIES: dict[str, Family] = {
    **_digits.FAMILIES, **imagefolder.FAMILIES, **cifar10.FAMILIES, **tinyimagenet.FAMILIES, **imagenet.FAMILIES,
    **imagenet_latent.FAMILIES,
}  # fmt: skip


def names() -> list[str]:
    """Every preset: family and strategy."""
    return [f"{family}-{strategy}" for family in FAMILIES for strategy in ALIGNED]


def preset(name: str) -> RunConfig:
    """The configuration of this name; LabError with the nearest name if there is none.

    Example:
        >>> preset("imagenet64-reverse").align.place
        'on blocks -2,-1 at layer -3'
    """
    family, _, strategy = name.rpartition("-")
    if family not in FAMILIES or strategy not in ALIGNED:
        raise unknown("preset", name, names())
    return FAMILIES[family].make(strategy)


def reported_and_measured(name: str) -> dict[str, Any]:
    """What is known of a preset: a line about it, results of the paper, and results of this kit, as plain values.

    `measured` is null for one that was not measured yet. Those of a bundled run are its scores on the test split.

    Raises: LabError for an unknown name.

    Example:
        >>> reported_and_measured("cifar10-large-reverse")["measured"] is None
        True
    """
    preset(name)
    family, _, strategy = name.rpartition("-")
    known = FAMILIES[family]
    measured = known.measured.get(strategy, ()) or _bundled(name)
    return {
        "about": known.about,
        "reported": [result._asdict() for result in known.reported.get(strategy, ())],
        "measured": [result._asdict() for result in measured] or None,
    }


def _bundled(name: str) -> tuple[Result, ...]:
    """The scores of the bundled run of this name, if there is one."""
    scores = read_scores(assets() / "runs" / name)
    if scores is None:
        return ()
    rows = scores[scores["split"] == "test"].to_dict("records")
    source = f"rrepa-lab evaluate {name}"
    return tuple(
        Result(str(row["metric"]), float(row["value"]), str(row["protocol"]), source, int(row["train_seed"])) for row in rows
    )


def read_config(source: str | Path | RunConfig) -> RunConfig:
    """A configuration from a preset's name, the path of a config.json (bare or of a run), or itself."""
    if isinstance(source, RunConfig):
        return source
    if str(source).endswith(".json") or Path(source).is_file():
        return config_file(Path(source))
    return preset(str(source))


def config_file(path: Path) -> RunConfig:
    """A RunConfig from a JSON file: a run's config.json, or its `config` part alone."""
    try:
        values = read_json(path, LARGEST_CONFIG)
    except MissingFileError:
        raise LabError(f"no configuration at {path}") from None
    if "format" in values and "config" in values:
        return validate(RunConfig, values["config"], str(path), stored=True)
    return validate(RunConfig, values, str(path))
