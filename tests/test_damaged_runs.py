"""Folders among the runs that are no runs, or damaged ones: left out of lists, and one line when named."""

import json
import os

import pytest

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.errors import LabError


def damage(folder, kind, good):
    """Put a config.json of this kind into the folder."""
    path = folder / "config.json"
    config = good["config"]
    texts = {
        "null": "null", "list": "[]", "number": "1e999", "empty": "", "cut off": json.dumps(good)[:80], "not text": "",
        "classes null": json.dumps(good | {"classes": None}),
        "classes of numbers": json.dumps(good | {"classes": list(range(10))}),
        "fewer classes": json.dumps(good | {"classes": ["0", "1"]}),
        "config null": json.dumps(good | {"config": None}),
        "another format": json.dumps(good | {"format": "x" * 1000}),
        "unknown key": json.dumps(good | {"config": config | {"flow": {"wdith": 3}}}),
        "a billion blocks": json.dumps(good | {"config": config | {"flow": config["flow"] | {"blocks": 10**9}}}),
        "a huge width": json.dumps(good | {"config": config | {"flow": config["flow"] | {"width": 64 * 10**9}}}),
        "a huge number": '{"format": 1, "classes": [], "config": {"train": {"steps": ' + "9" * 5000 + "}}}",
        "nested deeply": '{"format": 1, "classes": [], "config": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}",
        "of another program": '{"model_type": "bert"}',
    }  # fmt: skip
    if kind in texts:
        path.write_bytes(b"\xff\xfe\x00" if kind == "not text" else texts[kind].encode())
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "large":
        with path.open("wb") as stream:
            stream.truncate(2**30)


KINDS = [
    "null", "list", "number", "empty", "cut off", "not text", "classes null", "classes of numbers", "fewer classes",
    "config null", "another format", "unknown key", "a billion blocks", "a huge width", "a huge number", "nested deeply",
    "of another program", "a folder", "a pipe", "a link to itself", "a device", "large",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_is_left_out_and_one_line_when_named(tmp_path, monkeypatch, capsys, trained, kind):
    good = json.loads((trained / "config.json").read_text())
    odd = tmp_path / "runs" / "odd"
    odd.mkdir(parents=True)
    damage(odd, kind, good)
    monkeypatch.setenv("RREPA_RUNS", str(tmp_path / "runs"))
    names = {info.name for info in rl.available()}
    assert "digits-none" in names
    assert "odd" not in names
    assert main(["describe"]) == 0
    capsys.readouterr()
    for name in ("odd", odd):
        with pytest.raises(LabError) as caught:
            rl.load(name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000
    with pytest.raises(LabError, match="unknown run 'nobody'"):
        rl.load("nobody")


def test_a_byte_order_mark_is_read(tmp_path, trained):
    run = tmp_path / "run"
    run.mkdir()
    for path in trained.iterdir():
        (run / path.name).write_bytes((b"\xef\xbb\xbf" if path.name == "config.json" else b"") + path.read_bytes())
    assert rl.load(run).config == rl.load(trained).config
    assert main(["train", str(run / "config.json"), "--dry-run", "--json"]) == 0


@pytest.mark.parametrize("jobs", ["0", "-2", "-100"])
def test_jobs_out_of_range_are_one_line(tmp_path, capsys, jobs):
    assert main(["batch", "00_start_here", "--out", str(tmp_path / "out"), "--jobs", jobs]) == 2
    assert "--jobs takes" in capsys.readouterr().err
