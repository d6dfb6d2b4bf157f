"""Image folders on disk: how they are laid out, which pictures belong to a split, and which class each has.

Three layouts are read. <split>/<class>/<picture> is taken as it is, with a part of train/ set aside for every split that has
no folder of its own. <class>/<picture> is divided into train, val and test class by class. Pictures without class folders,
in either place, have no labels. Entries that an operating system or an editor leaves behind are ignored and counted.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from rrepa_lab.data.fingerprint import encoded
from rrepa_lab.errors import LabError

SPLITS = ("train", "val", "test")
SHARE = 0.1  # part of the pictures that serves as a split without a folder of its own
PICTURES = frozenset(
    (
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )
)
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_SYSTEM = frozenset(("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"))


class Part(NamedTuple):
    """Where the pictures of a split come from."""

    folder: Path
    share: str  # the split whose pictures these are, where `folder` is divided
    val: float  # part of each class of `folder` set aside as val, and as test
    test: float
    rule: str  # in words
    bounds: Sequence[str] = ()  # where a division was made before, see `bounds_of`


class Listing(NamedTuple):
    """The pictures of a split by class."""

    classes: list[str]  # in alphabetical order; none where the pictures lie in no class folders
    files: list[list[str]]  # of each class, relative to the folder, sorted; of all pictures if there are no classes
    ignored: Counter[str]  # kind of entry -> how many


def visible(name: str) -> bool:
    """Whether an entry is the user's own: no dot file (.DS_Store, ._x.png, .ipynb_checkpoints), no leftover of a system."""
    return not name.startswith(".") and name.casefold() not in _SYSTEM


def parts(root: Path, holdout: float, bounds: Sequence[str] = ()) -> dict[str, Part]:
    """The splits of an image folder.

    Args:
        root: the folder that data.path names, absolute.
        holdout: part of the training pictures that serves as `val` where there are not both val/ and test/. 0: a tenth where
            test is taken from the training pictures too, else nothing.
        bounds: of an earlier division, which is kept, see `bounds_of`.

    Returns: split -> its part; there is no "train" in a folder of held-out pictures only, and no "val" where nothing serves
    as such: one held-out folder, whatever its name, is `test`.
    Raises: LabError, in one line, for a path that is no folder.
    """
    if not root.is_dir():
        what = "it is a file" if root.exists() else "there is nothing"
        raise LabError(f"no image folder at {root} ({what}): data.path names a folder of <split>/<class> or <class> folders")
    own = _split_folders(root)
    if not own:
        return carved(root, holdout or SHARE, SHARE, bounds)
    if {"val", "test"} <= own.keys():
        unused = " (data.holdout is not used)" if holdout else ""
        return {
            name: Part(place, name, 0, 0, f"{name} = {place.name}/{unused if name == 'val' else ''}")
            for name, place in own.items()
        }
    test = own.get("test") or own.get("val")
    if test is None:
        return carved(own["train"], holdout or SHARE, SHARE, bounds)
    found = carved(own["train"], holdout, 0, bounds) if "train" in own else {}
    rule = "test = test/" if "test" in own else f"test = {test.name}/ (no test folder)"
    return found | {"test": Part(test, "test", 0, 0, rule)}


def carved(folder: Path, val: float, test: float, bounds: Sequence[str] = ()) -> dict[str, Part]:
    """A folder divided into splits, each with its rule in words."""
    if val + test > 0.999:
        raise LabError(f"data.holdout is {val}: with {test:.0%} for test nothing is left to train on")
    found = {}
    for name, part in {"train": 1 - val - test, "val": val, "test": test}.items():
        if part:
            place = f"{folder.name}/" if part == 1 else f"{part:.0%} of {folder.name}/, stratified, seed 0"
            found[name] = Part(folder, name, val, test, f"{name} = {place}", bounds)
    return found


def _split_folders(root: Path) -> dict[str, Path]:
    """Split -> its folder, where the folder is laid out by splits."""
    names = {name.casefold(): name for name in _folders(root)}
    own: dict[str, Path] = {}
    for split, spellings in SPLIT_NAMES.items():
        for spelling in spellings:
            if spelling in names:
                own.setdefault(split, root / names[spelling])
    others = [name for key, name in names.items() if all(key not in spellings for spellings in SPLIT_NAMES.values())]
    # a class may be called "train": then it has pictures of its own, and so have the classes beside it
    if others and all(_has_loose(folder) for folder in own.values()) and any(_has_loose(root / name) for name in others):
        return {}
    return own


def class_names(root: Path, holdout: float) -> list[str]:
    """The classes of an image folder, alphabetically: those of train/ where there is one; none for unlabelled pictures.

    Raises: LabError for a class folder without a picture, and a folder that holds another image folder.
    """
    found = parts(root, holdout)
    folder = found.get("train", found["test"]).folder
    classes = filled_classes(folder)
    if len(classes) == 1:
        inner = _class_folders(folder)[classes[0]][0]
        if not _has_loose(inner) and (_split_folders(inner) or (folder == root and len(_folders(inner)) > 1)):
            raise LabError(f"{root} holds one folder, {inner.name}, with the image folder in it: set data.path={inner}")
    return classes


def class_folders(folder: Path) -> list[str]:
    """The names of the class folders in a folder, alphabetically; whether pictures lie in them is not looked up."""
    return list(_class_folders(folder))


def filled_classes(folder: Path) -> list[str]:
    """The class folders in a folder, alphabetically; none for pictures without them. LabError where one has no picture."""
    classes = _class_folders(folder)
    filled = [name for name, places in classes.items() if any(next(_pictures(place), None) for place in places)]
    if not filled:
        if _has_loose(folder):
            return []
        raise LabError(f"{folder} holds no pictures: expected <class>/<picture> in it")
    empty = [name for name in classes if name not in filled]
    if empty:
        raise LabError(f"{classes[empty[0]][0]} holds no pictures: fill this class folder, or remove it")
    return filled


def listing(part: Part, classes: Sequence[str] | None = None) -> Listing:
    """The pictures of a split, by class.

    Args:
        classes: the names that labels count, in this order; by default those of the folder. Empty: pictures without labels.

    Raises: LabError for a class that is not among `classes`, and for a split without pictures.
    """
    ignored: Counter[str] = Counter()
    names, grouped = _grouped(part, classes, ignored)
    return Listing(names, _divided(grouped, part), ignored)


def _grouped(part: Part, classes: Sequence[str] | None, ignored: Counter[str]) -> tuple[list[str], list[list[str]]]:
    """Class names, and the pictures of each in all splits of the folder; one group of all where there are no classes."""
    places = _class_folders(part.folder, ignored)
    listed = {name: [path for place in found for path in _pictures(place, ignored)] for name, found in places.items()}
    files = {name: _in_order(found, part.folder) for name, found in listed.items() if found}
    loose = _in_order(_loose(part.folder, ignored), part.folder)
    if not files and not loose:
        raise LabError(f"{part.folder} holds no pictures ({_ignored_words(ignored)}): {part.rule}")
    names = sorted(files) if classes is None else list(classes)
    strangers = [name for name in files if name not in names]
    if names and strangers:
        what = f"the class {strangers[0]!r} in {part.folder} is not one of the classes {first_names(names)}"
        raise LabError(f"{what}; the folder has {first_names(sorted(files))}: rename it, or take it out")
    if names and not files:
        raise LabError(
            f"{part.folder} holds pictures without class folders, but the classes are {first_names(names)}: sort them"
        )
    if files and loose:
        ignored["pictures outside class folders"] += len(loose)
    grouped = [files.get(name, []) for name in names] if names else [sorted(chain(loose, *files.values()), key=encoded)]
    return names, grouped


def bounds_of(root: Path, holdout: float, classes: Sequence[str]) -> list[str]:
    """Where the division of a folder's pictures lies: where it is kept, pictures that are added later move none of them.

    Returns: for each class "<test>:<val>", the hashes of the last picture of test and of val in the order of the hashes; one
        for all classes where they are divided together, and none where nothing is divided.
    """
    part = parts(root, holdout).get("train")
    if part is None or not (part.val or part.test):
        return []
    _, grouped = _grouped(part, classes, Counter())
    together = [name for files in grouped for name in files]
    return [_bounds(files, part) for files in ([together] if _too_few(grouped, part) else grouped)]


def _divided(grouped: list[list[str]], part: Part) -> list[list[str]]:
    """The files of one share of a folder: of each class in the order of a hash, so that it depends on the names alone."""
    if not (part.val or part.test):
        return grouped
    if part.bounds and len(part.bounds) == len(grouped):
        found = [within(files, bounds)[part.share] for files, bounds in zip(grouped, part.bounds, strict=True)]
    elif part.bounds or _too_few(grouped, part):  # divided as one class
        together = [name for files in grouped for name in files]
        kept = set(within(together, part.bounds[0] if part.bounds else _bounds(together, part))[part.share])
        found = [[name for name in files if name in kept] for files in grouped]
    else:
        found = [shares_of(files, part.val, part.test)[part.share] for files in grouped]
    if not any(found):
        count = sum(map(len, grouped))
        what = "1 picture" if count == 1 else f"{count} pictures"
        raise LabError(f"{part.folder} has {what}, too few to divide ({part.rule}): add some")
    return found


def _too_few(grouped: list[list[str]], part: Part) -> bool:
    """Whether a split would be empty with each class divided by itself."""
    divided = [shares_of(files, part.val, part.test) for files in grouped]
    sizes = {"train": 1, "val": part.val, "test": part.test}
    return not all(any(found[share] for found in divided) for share, size in sizes.items() if size)


def shares_of(names: Sequence[str], val: float, test: float) -> dict[str, list[str]]:
    """Split -> its part of the names, in their order, chosen by a hash of the names alone.

    All are for training where there are not enough for every split.
    """
    return within(names, _bounds(names, Part(Path(), "train", val, test, "")))


def within(names: Sequence[str], bounds: str) -> dict[str, list[str]]:
    """Split -> its part of the names, in their order, by the bounds that `bounds_of` gives for a class."""
    test, val = bounds.split(":")
    found: dict[str, list[str]] = {"test": [], "val": [], "train": []}
    for name in names:
        place = _hash(name)
        found["test" if place <= test else "val" if place <= val else "train"].append(name)
    return found


def _bounds(names: Sequence[str], part: Part) -> str:
    order = sorted(map(_hash, names))
    enough = len(names) > (part.val > 0) + (part.test > 0)
    tests = max(1, int(len(names) * part.test + 0.5)) if enough and part.test else 0
    vals = min(max(1, int(len(names) * part.val + 0.5)), len(names) - tests - 1) if enough and part.val else 0
    test = order[tests - 1] if tests else ""
    return f"{test}:{order[tests + vals - 1] if vals else test}"


def _hash(name: str) -> str:
    return blake2b(b"0/" + encoded(name), digest_size=8).hexdigest()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(filter(_resolves, found), key=lambda entry: entry.name)
    except OSError as error:
        raise LabError(f"{folder} cannot be read: {error.strerror or error}") from None


def _resolves(entry: os.DirEntry[str]) -> bool:
    """Whether what an entry is can be found out: not of a link that leads back to itself."""
    try:
        entry.is_dir()
    except OSError:
        return False
    return True


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if visible(entry.name) and entry.is_dir()]


def _class_folders(folder: Path, ignored: Counter[str] | None = None) -> dict[str, list[Path]]:
    """Class -> its folders; names are compared in Unicode's composed form, as one system writes them and another does not."""
    found: dict[str, list[Path]] = {}
    for entry in _entries(folder):
        if entry.is_dir() and visible(entry.name):
            found.setdefault(unicodedata.normalize("NFC", entry.name), []).append(Path(entry.path))
        elif ignored is not None and not visible(entry.name):
            ignored["hidden or system entries"] += 1
    return dict(sorted(found.items()))


def _loose(folder: Path, ignored: Counter[str] | None = None) -> Iterator[Path]:
    """Pictures that lie in a folder itself."""
    for entry in _entries(folder):
        if visible(entry.name) and entry.is_file():
            if _is_picture(entry.name):
                yield Path(entry.path)
            elif ignored is not None:
                ignored["files that are no pictures"] += 1


def _has_loose(folder: Path) -> bool:
    return next(_loose(folder), None) is not None


def _pictures(folder: Path, ignored: Counter[str] | None = None, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Pictures in a folder and the folders below it; a link that leads back to a folder above is not followed."""
    above = (*above, os.path.realpath(folder))
    for entry in _entries(folder):
        if not visible(entry.name):
            if ignored is not None:
                ignored["hidden or system entries"] += 1
        elif entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in above and Path(real) not in Path(above[0]).parents:
                yield from _pictures(Path(entry.path), ignored, above)
        elif entry.is_file() and _is_picture(entry.name):
            yield Path(entry.path)
        elif ignored is not None:
            ignored["files that are no pictures"] += 1


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].casefold() in PICTURES


def _in_order(paths: Iterable[Path], folder: Path) -> list[str]:
    """Names relative to the folder, in an order that does not depend on how a file system composes umlauts."""
    return sorted((path.relative_to(folder).as_posix() for path in paths), key=encoded)


def first_names(names: Sequence[str]) -> str:
    """Names in a message: the first ten, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"


def _ignored_words(ignored: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in ignored.items()) or "it is empty"
