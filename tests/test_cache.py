"""Arrays on disk: made once, resumed after an interruption, and made again where they do not fit."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import rrepa_lab as rl
from rrepa_lab.data import cache
from rrepa_lab.data.cache import ArraySpec, cached_array, entries, is_complete, remove

VALUES = np.random.default_rng(0).integers(0, 255, (1000, 3, 2), np.uint8)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RREPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spec(**about: object) -> ArraySpec:
    return ArraySpec("pictures", VALUES.shape, "uint8", {"data": "abc", **about})


class Filler:
    """Fills from VALUES, counting rows; stops with an error before row `until`."""

    def __init__(self, until: int = len(VALUES), error: BaseException | None = None) -> None:
        self.until, self.error, self.rows = until, error or KeyboardInterrupt(), 0

    def __call__(self, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        for rows in ranges:
            if rows.stop > self.until:
                raise self.error
            self.rows += len(rows)
            yield VALUES[rows.start : rows.stop]


def never(ranges: Sequence[range]) -> Iterable[np.ndarray]:
    raise AssertionError("made again")


def test_an_array_is_made_once_and_read_from_disk() -> None:
    first = cached_array(spec(), Filler())
    assert isinstance(first, np.memmap)
    assert not first.flags.writeable
    np.testing.assert_array_equal(first, VALUES)
    np.testing.assert_array_equal(cached_array(spec(), never), VALUES)
    np.testing.assert_array_equal(np.load(spec().folder / "array.npy"), VALUES)


def test_other_data_or_settings_are_another_array() -> None:
    cached_array(spec(), Filler())
    other = Filler()
    cached_array(spec(size=4), other)
    assert other.rows == len(VALUES)
    assert len(entries()) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), rl.LabError("a.png: truncated"), MemoryError()])
def test_an_interrupted_build_resumes(error: BaseException) -> None:
    with pytest.raises(type(error)):
        cached_array(spec(), Filler(600, error))
    assert not is_complete(spec())
    assert [(e.complete, e.rows) for e in entries()] == [(False, 1000)]
    rest = Filler()
    np.testing.assert_array_equal(cached_array(spec(), rest), VALUES)
    assert rest.rows == 1000 - 512  # two ranges of 256 were on disk


def test_bytes_that_were_written_after_the_last_note_are_dropped() -> None:
    with pytest.raises(KeyboardInterrupt):
        cached_array(spec(), Filler(600))
    with (spec().folder / cache.PARTIAL).open("ab") as file:
        file.write(b"x" * 5)
    np.testing.assert_array_equal(cached_array(spec(), Filler()), VALUES)


def truncate(folder: Path) -> None:
    with (folder / "array.npy").open("r+b") as file:
        file.truncate(200)


def other_version(folder: Path) -> None:
    values = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(values | {"format": 99}))


def no_json(folder: Path) -> None:
    (folder / "about.json").write_text("{")


def no_about(folder: Path) -> None:
    (folder / "about.json").unlink()


@pytest.mark.parametrize("damage", [truncate, other_version, no_json, no_about])
def test_what_is_damaged_or_of_another_version_is_made_again(damage: Callable[[Path], None]) -> None:
    cached_array(spec(), Filler())
    damage(spec().folder)
    again = Filler()
    np.testing.assert_array_equal(cached_array(spec(), again), VALUES)
    assert again.rows == len(VALUES)


def test_a_note_of_progress_beyond_the_file_is_not_believed() -> None:
    with pytest.raises(KeyboardInterrupt):
        cached_array(spec(), Filler(600))
    with (spec().folder / cache.PARTIAL).open("r+b") as file:
        file.truncate(100)
    again = Filler()
    np.testing.assert_array_equal(cached_array(spec(), again), VALUES)
    assert again.rows == len(VALUES)


def test_no_space_is_an_error_before_anything_is_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(root.parent)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(rl.LabError, match=r"needs .* MiB are free; free some space there, .*--cache DIR"):
        cached_array(spec(), never)
    assert not root.exists()


def test_a_full_disk_in_the_middle_leaves_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(rl.LabError, match=r"cache .* cannot be written: No space left"):
        cached_array(spec(), Filler(600, OSError(28, "No space left on device")))
    assert not is_complete(spec())
    np.testing.assert_array_equal(cached_array(spec(), Filler()), VALUES)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RREPA_CACHE", str(tmp_path / "file"))
    with pytest.raises(rl.LabError, match=r"cache .*/file/pictures.* cannot be written: Not a directory"):
        cached_array(spec(), never)


def test_removal_leaves_other_folders(root: Path) -> None:
    cached_array(spec(), Filler())
    (root / "holiday-pictures").mkdir()
    (found,) = entries()
    assert (found.kind, found.rows, found.complete, found.about) == ("pictures", 1000, True, {"data": "abc"})
    assert found.bytes > VALUES.nbytes
    remove(found)
    assert [path.name for path in root.iterdir()] == ["holiday-pictures"]


def test_an_empty_array_is_complete() -> None:
    empty = ArraySpec("features", (0, 4), "float16", {})
    assert cached_array(empty, never).shape == (0, 4)
    assert is_complete(empty)
