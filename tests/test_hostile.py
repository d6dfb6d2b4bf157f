"""Damaged and hostile files at every reader: what cannot be read is a LabError of one line, within seconds.

`pytest -m faults -k hostile -s` runs all of them and prints the counts; the default suite runs a part of each kind.
"""

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pandas as pd
import pytest
import torch
from PIL import Image

import rrepa_lab as rl
from rrepa_lab.align.weights import read_tensors
from rrepa_lab.batch.cell import read_record
from rrepa_lab.batch.notebook import read_notebook
from rrepa_lab.batch.study import cells, load_study
from rrepa_lab.data.pictures import load_picture
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.compare import compare, gather
from rrepa_lab.measurements.results import read_result, write_result
from rrepa_lab.runs.card import read_scores, score_lines, write_card
from rrepa_lab.runs.import_tarflow import _public_name, import_tarflow
from rrepa_lab.runs.presets import config_file
from rrepa_lab.runs.records import Records
from rrepa_lab.studies.alignment import layers_in
from rrepa_lab.training.state import Checkpoint
from rrepa_lab.viz.training import accuracy_curves, loss_curves, loss_parts, similarity_curves

SECONDS = 20  # for one input; the slowest takes below one
VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 10**9, 10**30, float("nan"), float("inf"), "", "x", "\x00", "9" * 400, [], [[]], {}, {"a": 1},
]  # fmt: skip
WHOLE = {
    "empty": b"", "null": b"null", "list": b"[]", "number": b"3", "text": b'"x"', "true": b"true", "a brace": b"{",
    "huge number": b'{"format": ' + b"9" * 5000 + b"}", "infinite": b'{"format": 1e999}', "not a number": b"{\"format\": NaN}",
    "deep list": b"[" * 100_000, "deep object": b'{"a":' * 100_000, "deep and closed": b"[" * 50_000 + b"]" * 50_000,
    "zero bytes": b"\x00" * 100, "latin": "ÄÖÜ".encode("latin-1"), "utf-16": '{"format": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf", "random": random.Random(0).randbytes(1000), "a long line": b"x" * 10**6,
    "yaml tag": b"a: !!python/object/apply:os.system ['true']", "yaml alias": b"a: &a [*a]",
    "commas": b",,,\n,,,\n", "quote": b'a,"b\n', "zip": b"PK\x03\x04" + b"\x00" * 50,
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
}  # fmt: skip


class Reader(NamedTuple):
    """A kind of file, a good one as bytes, and what is done with it."""

    name: str  # of the file
    good: bytes
    read: Callable[[Path], object]


def mutations(good: bytes, rng: random.Random) -> Iterator[tuple[str, bytes | str]]:
    """Descriptions and contents; a text stands for something that is no regular file."""
    yield from WHOLE.items()
    yield from ((kind, kind) for kind in ("a folder", "a pipe", "a device", "a link to itself", "nothing", "large"))
    for part in (1, 2, 3, 5, 10, 30):
        yield f"cut off after {part}/31", good[: len(good) * part // 31]
    for number in range(20):
        damaged = bytearray(good)
        for _ in range(3):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        yield f"damaged bytes, {number}", bytes(damaged)
    try:
        values = json.loads(good)
    except ValueError:
        return
    for path in list(leaves(values)):
        yield f"without {path}", json.dumps(changed(values, path, ...)).encode()
        for value in VALUES:
            yield f"{path} = {str(value)[:20]!r}", json.dumps(changed(values, path, value)).encode()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values inside of a JSON value."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, (*path, key))
    elif isinstance(value, list):
        for place, one in enumerate(value[:3]):
            yield from leaves(one, (*path, place))


def changed(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with the value at this path replaced, or taken out."""
    values = copy.deepcopy(values)
    node = values
    for key in path[:-1]:
        node = node[key]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return values


def put(path: Path, content: bytes | str) -> None:
    """Write the content, or make the kind of thing that a text names."""
    if path.is_symlink() or path.exists():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "a folder":
        path.mkdir()
    elif content == "a pipe":
        os.mkfifo(path)
    elif content == "a device":
        path.symlink_to("/dev/zero")
    elif content == "a link to itself":
        path.symlink_to(path)
    elif content == "large":
        with path.open("wb") as stream:
            stream.truncate(2**38)


def curves(path: Path) -> None:
    """All that is made of the records of a training."""
    table = {"run": Records(path.parent).table()}
    for draw in (loss_curves, loss_parts, similarity_curves, accuracy_curves):
        draw(table)
    write_card(rl.load(path.parent), table["run"])


def scores(folder: Path) -> None:
    """What is made of the scores of a run."""
    table = read_scores(folder)
    if table is not None:
        score_lines(table)


def readers(folder: Path, run: Path) -> dict[str, Reader]:
    """Every reader of files that a user may have from elsewhere, with a good file of its kind."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    loaded = rl.load(folder)
    table = rl.evaluate(loaded, samples=0, limit=20, n_noise_samples=1)
    write_result(folder, "book", table, [loaded], kept=1)
    cell = {"state": "done", "key": "k", "notebook": "n", "parameters": {"x": 1}, "failure": {"kind": "E", "message": "m"}}
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('x: int = 0  # x\nout_dir: str = ""  # out')])
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, folder / "book.ipynb")
    study = {"notebook": "book.ipynb", "grid": [{"x": [1, 2]}], "timeout": 10, "title": "t"}
    study["claims"] = [{"claim": "c", "not_testable": "no"}]
    plan = {"device": "cpu", "windows": [1, 2], "upto": 1}
    each = compare(folder / "result.json", over_seeds=False)
    layer = {"run": "a", "tap": "block.1.layer.1", "block": 1, "layer": 1, "module_path": "m", "metric": "knn_accuracy"}
    layers = pd.DataFrame(
        [layer | {"direction": "forward", "label_fed": "none", "guidance": 0.0, "value": 0.5, "train_seeds": 3}]
    )
    flow = rl.TarFlow(rl.FlowConfig(image_size=4, channels=1, patch_size=2, width=64, blocks=1, layers=1))
    torch.save(
        {_public_name(name): value for name, value in flow.state_dict().items()} | {"var": torch.ones(4, 4)}, folder / "p.pth"
    )
    picture = folder / "p.png"
    Image.new("RGB", (20, 20), (200, 10, 10)).save(picture)

    def import_it(path: Path) -> None:
        shutil.rmtree(folder.parent / "imported", ignore_errors=True)
        import_tarflow(path, folder.parent / "imported", patch_size=2, noise=0.1)

    def result(path: Path) -> None:
        read_result(path)
        compare(path)

    def everything(path: Path) -> None:
        config_file(path)
        rl.load(path.parent)

    return {
        "configuration": Reader("config.json", (folder / "config.json").read_bytes(), everything),
        "records": Reader("metrics.jsonl", (folder / "metrics.jsonl").read_bytes()[:1500], curves),
        "a record": Reader("metrics.jsonl", (folder / "metrics.jsonl").read_bytes().splitlines()[-1], curves),
        "scores": Reader("scores.csv", table.to_csv(index=False).encode(), lambda path: scores(path.parent)),
        "result": Reader("result.json", (folder / "result.json").read_bytes(), result),
        "cell": Reader("cell.json", json.dumps(cell).encode(), lambda path: read_record(path.parent)),
        "study": Reader("s.yaml", json.dumps(study).encode(), lambda path: cells(*load_study(path))),
        "decoding": Reader("decoding.json", json.dumps(plan).encode(), lambda path: rl.load(path.parent)),
        "weights": Reader("model.safetensors", (folder / "model.safetensors").read_bytes(), lambda path: rl.load(path.parent)),
        "measurements": Reader("m.csv", each.to_csv(index=False).encode(), gather),
        "layers": Reader("layers.csv", layers.to_csv(index=False).encode(), lambda path: layers_in(path.parent)),
        "notebook": Reader("book.ipynb", (folder / "book.ipynb").read_bytes(), read_notebook),
        "checkpoint": Reader("train_state.pt", (folder / "train_state.pt").read_bytes(), Checkpoint.load),
        "published": Reader("p.pth", (folder / "p.pth").read_bytes(), import_it),
        "encoder": Reader("e.safetensors", (folder / "model.safetensors").read_bytes(), read_tensors),
        "picture": Reader("p.png", picture.read_bytes(), lambda path: load_picture(path, 3, 8)),
    }  # fmt: skip


KINDS = [
    "configuration", "records", "a record", "scores", "result", "cell", "study", "decoding", "weights", "measurements",
    "layers", "notebook", "checkpoint", "published", "encoder", "picture",
]  # fmt: skip


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """TimeoutError within it after so many seconds, also while a system call waits."""

    def ring(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tried(tmp_path: Path, run: Path, kind: str, every: int) -> Counter[str]:
    """Give a reader every `every`-th of its hostile files; how they ended, where tracebacks are counted by kind."""
    reader = readers(tmp_path / "run", run)[kind]
    path = tmp_path / "run" / reader.name
    ends: Counter[str] = Counter()
    for number, (what, content) in enumerate(mutations(reader.good, random.Random(kind))):
        if number % every:
            continue
        put(path, content)
        try:
            with warnings.catch_warnings(), alarm(SECONDS):
                warnings.simplefilter("ignore")
                reader.read(path)
            ends["read"] += 1
        except LabError as error:
            ends["refused in one line" if "\n" not in str(error) and len(str(error)) < 1000 else f"not one line: {what}"] += 1
        except Exception as error:
            ends[f"traceback: {type(error).__name__}: {str(error)[:80]}; {what}"] += 1
    put(path, reader.good)
    reader.read(path)  # the good file is still read, so that refusals are those of the damage
    return ends


def check(ends: Counter[str]) -> None:
    bad = [end for end in ends if end not in ("read", "refused in one line")]
    assert not bad, f"{len(bad)} of {ends.total()}: " + "\n".join(bad[:20])
    assert ends["refused in one line"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_hostile_files_is_refused_in_one_line(tmp_path, trained, kind):
    good_only = kind in ("records", "a record", "cell")  # what is damaged there is left out
    ends = tried(tmp_path, trained, kind, 7)
    check(ends + Counter({"refused in one line": 1}) if good_only else ends)


@pytest.mark.faults
def test_all_hostile_files_are_refused_in_one_line(tmp_path, trained, capsys):
    total: Counter[str] = Counter()
    for kind in KINDS:
        ends = tried(tmp_path / kind.replace(" ", "-"), trained, kind, 1)
        with capsys.disabled():
            print(f"\n{kind}: {ends.total()} tried, {ends['refused in one line']} refused, {ends['read']} read", end="")
        total += ends
    with capsys.disabled():
        print(f"\nall: {total.total()} tried, {total['refused in one line']} refused in one line, {total['read']} read")
    check(total)
