"""What the files of a data set are: sizes, modes, and which of them cannot be read."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.decoded import CachedImages
from rrepa_lab.data.facts import check_data
from rrepa_lab.data.images import ImageSet
from rrepa_lab.data.layout import first_names
from rrepa_lab.data.pictures import Header, read_header, read_picture
from rrepa_lab.data.splits import read_split, splits
from rrepa_lab.errors import LabError
from rrepa_lab.progress import progress
from rrepa_lab.readers import MIB

MOST_WORKERS = 16
BAR = 5000  # files from which a bar is shown


class Survey(NamedTuple):
    """The files of a split."""

    sizes: Counter[str]  # "32x32" -> how many
    modes: Counter[str]  # Pillow's: RGB, L, CMYK
    animated: int  # of which the first frame is read
    unreadable: list[str]  # each with its reason


def survey(images: Any, decode: bool = False) -> Survey | None:
    """Read the header of every file of a split, by several workers; None for a set without files.

    Args:
        images: a set with `root` and `files`.
        decode: read every picture to its end, which finds files that are cut off.
    """
    files = getattr(images, "files", None)
    if files is None:
        return None

    def read(name: str) -> Header | str:
        path = Path(images.root) / name
        try:
            found = read_header(path)
            if decode:
                read_picture(path)
        except LabError as error:
            return f"{path}: {error}"
        return found

    found = Survey(Counter(), Counter(), 0, [])
    animated = 0
    bar = progress(len(files), "file", silent=len(files) < BAR, label="reading")
    with bar, ThreadPoolExecutor(min(MOST_WORKERS, 4 * (os.cpu_count() or 1))) as pool:
        for header in pool.map(read, files, chunksize=64):
            bar.update()
            if isinstance(header, str):
                found.unreadable.append(header)
                continue
            found.sizes[f"{header.width}x{header.height}"] += 1
            found.modes[header.mode] += 1
            animated += header.frames > 1
    return found._replace(animated=animated)


def describe_set(config: DataConfig, decode: bool = False) -> dict[str, Any]:
    """Everything about a data set that can be found out without training on it, as plain values.

    Returns: name, path, classes, levels, ignored, and for each of `splits`: images, per_class, rule, missing, fingerprint,
        and where it has files sizes, modes, animated, unreadable and cache (bytes, where, complete).
    """
    facts = check_data(config)
    found: dict[str, Any] = {
        "name": config.name, "path": config.path, "classes": facts.classes, "levels": facts.levels, "ignored": facts.ignored,
    }  # fmt: skip
    found["splits"] = {split: dict(_split(config, split, facts.classes, decode)) for split in splits(config)}
    for split, values in found["splits"].items():
        counts = facts.counts[split]
        values |= {"rule": facts.rules[split], "missing": facts.missing[split], "per_class": counts}
    return found


def _split(config: DataConfig, split: str, classes: list[str], decode: bool) -> Iterator[tuple[str, Any]]:
    images: ImageSet = read_split(config, split, classes)
    yield "images", len(images)
    yield "fingerprint", images.fingerprint
    files = survey(images, decode)
    if files is not None:
        yield from {
            **files._asdict(),
            "sizes": dict(files.sizes.most_common()),
            "modes": dict(files.modes.most_common()),
        }.items()
    if isinstance(images, CachedImages):
        spec = images.spec
        yield "cache", {"bytes": spec.bytes, "folder": str(spec.folder), "complete": images.decoded, "kept": images.keeps}


def in_words(found: dict[str, Any]) -> dict[str, str]:
    """The values of `describe_set` as lines for people."""
    names = found["classes"]
    lines = {"data": f"{found['name']} {found['path'] or ''}".strip()}
    lines["classes"] = f"{len(names)}: {first_names(names)}" if names else "none: pictures without labels"
    for split, values in found["splits"].items():
        counts = [*values["per_class"].values()]
        each = f", {min(counts)} to {max(counts)} in a class" if names and counts else ""
        lines[split] = f"{values['images']} images{each} ({values['rule']})"
        if values["missing"]:
            lines[split] += f"; none of {first_names(values['missing'])}"
        lines[f"{split}: fingerprint"] = values["fingerprint"]
        if "sizes" in values:
            for key in ("sizes", "modes"):
                known = [f"{name} ({count})" for name, count in values[key].items()]
                lines[f"{split}: {key}"] = first_names(known) if known else ""
            if values["animated"]:
                lines[f"{split}: animated"] = f"{values['animated']}, of which the first frame is read"
            bad = values["unreadable"]
            lines[f"{split}: unreadable"] = f"{len(bad)}: {first_names(bad)}" if bad else "none"
        if "cache" in values:
            kept = values["cache"]
            state = "complete" if kept["complete"] else "not made yet" if kept["kept"] else "not kept: above data.cache_limit"
            lines[f"{split}: cache"] = f"{kept['bytes'] / MIB:.1f} MiB, {state}, {kept['folder']}"
    if found["ignored"]:
        lines["ignored"] = ", ".join(f"{count} {kind}" for kind, count in found["ignored"].items())
    return lines
