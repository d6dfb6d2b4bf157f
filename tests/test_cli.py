"""The command line as a person or a program meets it."""

import argparse
import json
import pkgutil
import re
import signal
import subprocess
import sys
import time
from importlib import import_module

import pandas as pd
import pytest
import torch
from PIL import Image

import rrepa_lab as rl
from rrepa_lab import cli
from rrepa_lab.cli import main
from rrepa_lab.cli.arguments import parse_labels
from rrepa_lab.cli.commands import COMMANDS
from rrepa_lab.data.pictures import from_picture
from rrepa_lab.errors import LabWarning
from rrepa_lab.progress import progress
from rrepa_lab.viz.images import picture


def run(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_train_then_sample_then_classify(capsys, tmp_path):
    out = tmp_path / "mine"
    small = [
        "flow.width=16",
        "flow.head_width=16",
        "flow.blocks=2",
        "flow.layers=2",
        "align.blocks=[1,2]",
        "align.projector_width=16",
    ]
    flags = [
        word for setting in [*small, "train.steps=4", "train.batch=16", "train.log_every=2"] for word in ("--set", setting)
    ]
    status, text, err = run(capsys, "train", "digits-reverse", "--out", out, "--device", "cpu", "--seed", 5, *flags)
    assert status == 0
    assert "rrepa-lab sample" in text, "it names the next useful command"
    assert rl.load(out).config.train.seed == 5
    status, text, err = run(capsys, "train", "digits-reverse", "--out", out, "--device", "cpu", "--seed", 5, *flags, "--resume")
    assert (status, "is finished" in err) == (2, True)

    sheet = tmp_path / "grid.png"
    status, text, err = run(
        capsys, "sample", out, "--labels", "0..2", "--seeds", "0..3", "--guidance", 2, "--out", sheet, "--json"
    )
    assert status == 0
    assert json.loads(text)["images"] == 12
    with Image.open(sheet) as opened:
        assert opened.size == (4 * 9 * 8 + 8, 3 * 9 * 8 + 8)

    x, _ = rl.load(out).data("test", 1)
    picture(x[0], scale=4).save(tmp_path / "digit.png")
    status, text, err = run(capsys, "classify", "digits-reverse", tmp_path / "digit.png", "--json")
    assert status == 0
    row = json.loads(text)[0]
    expected = rl.classify(rl.load("digits-reverse"), x)
    assert row["label"] == str(int(expected.label))
    assert row["scores"]["3"] == pytest.approx(float(expected.scores[0, 3]), abs=0.05)  # the picture has 8 bits


def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    words = [
        "train",
        "digits-none",
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
        "--set",
        "train.log_every=1",
        "--set",
        "train.steps=400",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "rrepa_lab.cli", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "--resume" in out
    step = rl.load(tmp_path / "run").step
    assert 2 <= step < 400
    reports = rl.train(
        "digits-none", tmp_path / "run", settings={"train.log_every": 1, "train.steps": 400}, resume=True, device="cpu"
    )
    assert next(reports).step == step + 1
    reports.close()


def test_the_time_that_is_left_does_not_count_what_came_before_the_first_step():
    with progress(100, "step") as bar:
        bar.start_t -= 60  # pictures were decoded for a minute
        bar.update(20)  # of an earlier part of the training
        bar.start_t -= 1
        bar.update(10)
        left = re.search(r"30/100.*<(\d\d:\d\d)|, (\d\d:\d\d) left", str(bar))
    assert left is not None
    assert next(filter(None, left.groups())) in ("00:06", "00:07", "00:08")  # 70 steps, of which ten take a second


def test_dry_run_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text, _ = run(capsys, "train", "imagenet64-reverse", "--dry-run", "--json")
    facts = json.loads(text)
    assert status == 0
    assert facts["config"]["align"]["blocks"] == [7, 8]
    assert list(tmp_path.iterdir()) == []


def test_describe(capsys):
    status, text, _ = run(capsys, "describe", "--json")
    assert {"digits-none", "digits-reverse"} <= {row["name"] for row in json.loads(text)}
    status, text, _ = run(capsys, "describe", "digits-reverse", "--json")
    assert json.loads(text)["strategy"] == "reverse"
    assert json.loads(text)["step"] == rl.load("digits-reverse").step
    status, text, _ = run(capsys, "describe", "imagenet64-detach")
    assert status == 0
    assert "blocks.6.transformer.layers.5" in text
    status, text, _ = run(capsys, "describe", "digits-reverse", "--routing")
    assert status == 0
    assert "block.4.layer.4" in text
    status, text, _ = run(capsys, "describe", "digits-reverse", "--routing", "--json")
    rows = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {row["cosine_with_exact"] for row in rows if row["gradient_norm"] == 0} == {None}


def test_doctor(capsys):
    status, text, _ = run(capsys, "doctor", "--json")
    checks = {row["check"]: row for row in json.loads(text)}
    assert status == 0, [row for row in checks.values() if not row["ok"]]
    assert checks["torch and torchvision match"]["ok"]
    assert "hashes agree" in checks["bundled files"]["found"]


def test_doctor_notices_a_changed_file(capsys, tmp_path, monkeypatch):
    import shutil

    from rrepa_lab.cli import doctor
    from rrepa_lab.paths import assets

    shutil.copytree(assets(), tmp_path / "assets")
    with (tmp_path / "assets" / "runs" / "digits-none" / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    monkeypatch.setattr(doctor, "assets", lambda: tmp_path / "assets")
    status, text, _ = run(capsys, "doctor")
    assert status == 1
    assert "runs/digits-none/model.safetensors has changed" in text


def test_encoder_train_and_score(capsys, tmp_path):
    status, text, _ = run(
        capsys, "encoder", "train", "--out", tmp_path / "e", "--set", "steps=3", "--set", "batch=32", "--json"
    )
    assert status == 0
    status, text, _ = run(capsys, "encoder", "score", tmp_path / "e", "--json")
    assert [row["features"] for row in json.loads(text)] == ["encoder", "raw pixels", "untrained encoder"]


def test_trace(capsys, tmp_path):
    from safetensors.torch import load_file

    words = ["trace", "digits-reverse", "--taps", "block.4.layer.2,block.1.*", "--rows", "0..3", "--label", "own"]
    files = ["--out", tmp_path / "s.safetensors", "--picture", tmp_path / "p.png", "--csv", tmp_path / "t.csv"]
    status, text, _ = run(capsys, *words, *files)
    assert status == 0
    assert "blocks.3.transformer.layers.1" in text
    assert "largest difference of a state between the directions" in text
    saved = load_file(tmp_path / "s.safetensors")
    loaded = rl.load("digits-reverse")
    x, y = (part[:4] for part in loaded.data("test"))  # a limit would draw a balanced subset
    expected = rl.trace(loaded, x, y, "reverse", ["block.4.layer.2", "block.1.*"])
    assert torch.equal(saved["block.4.layer.2"], expected.states["block.4.layer.2"])
    assert torch.equal(saved["path.block.4.out"], expected.images["block.4.out"])
    with Image.open(tmp_path / "p.png") as opened:
        assert opened.size == (5 * 9 * 8 + 8, 4 * 9 * 8 + 8)
    table = pd.read_csv(tmp_path / "t.csv")
    assert table.relative_gap.max() < 1e-4
    assert list(table.tap) == [tap.name for tap in loaded.flow.resolve(["block.4.layer.2", "block.1.*"])]

    status, text, _ = run(capsys, "trace", "digits-none", "--seeds", "3,5", "--label", 2, "--guidance", 1.5, "--json")
    rows = json.loads(text)
    assert status == 0
    assert len(rows) == 16
    assert "relative_gap" not in rows[0], "fresh noise has no way there"
    assert rows[0]["n"] == 2
    assert rows[0]["round_trip_error"] < 1e-3


def test_trace_of_a_picture(capsys, tmp_path):
    x, _ = rl.load("digits-none").data("test", 1)
    picture(x[0], scale=4).save(tmp_path / "digit.png")
    status, text, _ = run(capsys, "trace", "digits-none", tmp_path / "digit.png", "--direction", "forward", "--json")
    assert status == 0
    assert {row["direction"] for row in json.loads(text)} == {"forward"}


def test_classify_a_split(capsys, tmp_path):
    words = ["classify", "digits-reverse", "--split", "test", "--limit", 50, "--method", "bayes"]
    status, text, _ = run(capsys, *words, "--csv", tmp_path / "images.csv")
    assert status == 0
    assert "rows: true class; columns: predicted class" in text
    images = pd.read_csv(tmp_path / "images.csv")
    loaded = rl.load("digits-reverse")
    x, y = loaded.data("test", 50)
    right = float((rl.classify(loaded, x, "bayes").label == y).float().mean())
    assert images["right"].mean() == pytest.approx(right)
    status, text, _ = run(capsys, *words, "--json")
    answer = json.loads(text)
    assert set(answer) == {"summary", "per_class", "confusion", "calibration"}
    assert answer["summary"][0]["value"] == pytest.approx(right)
    assert answer["summary"][1]["standard_error"] is None


def test_the_confusion_of_many_classes_is_a_line_for_each(capsys, monkeypatch):
    from rrepa_lab.cli import classify

    monkeypatch.setattr(classify, "MAX_MATRIX", 9)
    status, text, _ = run(capsys, "classify", "digits-reverse", "--split", "test", "--limit", 50, "--method", "bayes")
    assert status == 0
    assert "digits-reverse, bayes, split test, 50 of 360, class-balanced, seed 0; digits" in text
    report = rl.classification_report(rl.load("digits-reverse"), "bayes", images=rl.Images(limit=50))
    (three,) = [line.split() for line in text.splitlines() if line.startswith("3 ")]
    known = report.per_class.set_index("class").loc["3"]
    assert three[1:3] == [f"{known['accuracy']:.4f}", str(known["n"])]
    assert three[3:5] == ["3", str(round(known["accuracy"] * known["n"])) + ("," if len(three) > 5 else "")]
    assert max(map(len, text.splitlines())) < 120


@pytest.mark.parametrize("flag", ["--noise-samples", "--draws"])
def test_classify_options_reach_the_library(capsys, tmp_path, flag):
    loaded = rl.load("digits-none")
    x, _ = loaded.data("test", 1)
    picture(x[0], scale=1).save(tmp_path / "digit.png")
    words = ["classify", "digits-none", tmp_path / "digit.png", "--json", flag, 2, "--blocks", "3..4", "--seed", 5]
    status, text, _ = run(capsys, *words)
    with Image.open(tmp_path / "digit.png") as opened:
        seen = from_picture(opened, 1, 8)
    expected = rl.classify(loaded, seen, noise=rl.NoiseSamples(2, seed=5), blocks=[3, 4])
    assert status == 0
    assert list(json.loads(text)[0]["scores"].values()) == pytest.approx(expected.scores[0].tolist(), abs=1e-4)
    status, text, _ = run(capsys, *words[:4], "--method", "iterated", "--steps", 3, "--step-size", 0.1)
    expected = rl.classify(loaded, seen, "iterated", ascent=rl.Ascent(3, step_size=0.1))
    assert list(json.loads(text)[0]["scores"].values()) == pytest.approx(expected.scores[0].tolist(), abs=1e-4)


@pytest.mark.parametrize("flag", ["--noise-samples", "--draws"])
def test_evaluate_averages_over_the_noise_samples_of_its_flag(capsys, monkeypatch, flag):
    given = list[object]()

    def evaluate(run, split, samples, n_noise_samples, *_, **__):
        given.extend([run.name, split, samples.n, n_noise_samples])
        return pd.DataFrame([{"metric": "nats_per_dim", "value": 0.2}])

    monkeypatch.setattr("rrepa_lab.evaluation.evaluate.evaluate", evaluate)
    status, text, _ = run(capsys, "evaluate", "digits-none", "--samples", 0, flag, 2, "--json")
    assert (status, given) == (0, ["digits-none", ["test"], 0, 2])
    assert json.loads(text)[0]["metric"] == "nats_per_dim"


def test_probe_says_which_images_were_read(capsys):
    status, text, _ = run(capsys, "probe", "digits-none", "--limit", 60, "--taps", "block.1.layer.1", "--metrics", "knn")
    assert status == 0
    loaded = rl.load("digits-none")
    assert f"digits-none: {loaded.data_words}, pixels; test: 60 of 360, class-balanced, seed 0; probes fitted on 60" in text


def test_samples_that_cannot_be_scored_are_told(capsys, monkeypatch):
    from rrepa_lab.evaluation.networks import named

    monkeypatch.setattr(named, "find_evaluator", lambda data: None)
    monkeypatch.setattr(named, "OFFLINE", ("not-installed",))
    words = ["evaluate", "digits-none", "--limit", 10, "--noise-samples", 1]
    status, text, notes = run(capsys, *words)
    assert status == 0
    assert "samples are not scored: samples of photographs are compared in the features of not-installed" in notes
    assert "FD[" not in text
    assert "not scored" not in run(capsys, *words, "--samples", 0)[2]


def test_probe(capsys, tmp_path):
    words = ["probe", "digits-none", "digits-reverse", "--limit", 120, "--taps", "block.4.layer.*"]
    more = ["--metrics", "linear,cka,teacher_cosine", "--classifiers", "gradient", "--neighbours", 7]
    files = ["--csv", tmp_path / "t.csv", "--figure", tmp_path / "f.html"]
    status, text, _ = run(capsys, *words, *more, *files)
    assert status == 0
    assert "best layer by linear_accuracy: digits-reverse block.4.layer." in text
    assert "encoder" in text
    table = pd.read_csv(tmp_path / "t.csv")
    runs = [rl.load("digits-none"), rl.load("digits-reverse")]
    expected = rl.probe(runs, "block.4.layer.*", probes=["linear"], classifiers=["gradient"], limit=120)
    assert table[table.metric.str.endswith("accuracy")].value.tolist() == pytest.approx(expected.value.tolist())
    cosines = table[table.metric == "teacher_cosine"]
    assert list(cosines.run) == ["digits-reverse"]
    page = (tmp_path / "f.html").read_text()
    assert page.count("plotly-graph-div") == 6, "curves and a map for each of three metrics"
    assert "<script src" not in page, "it opens without a network"
    status, text, _ = run(capsys, *words, "--metrics", "mutual_knn", "--json")
    assert {row["neighbours"] for row in json.loads(text)} == {10}


def test_bench(capsys, tmp_path, monkeypatch):
    from rrepa_lab import bench

    monkeypatch.setattr(bench, "CLASSES", (10, 20))
    status, text, _ = run(capsys, "bench", "classify", "--repeats", 1, "--csv", tmp_path / "b.csv")
    assert status == 0
    assert "gradient, 10 classes" in text
    assert len(pd.read_csv(tmp_path / "b.csv")) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "digits-backward", "--out", "x"], "unknown preset 'digits-backward'; did you mean"),
        (["train", "digits-reverse"], "add --out runs/NAME"),
        (["train", "digits-reverse", "--out", "x", "--set", "train.stepps=3"], "unknown setting 'train.stepps'"),
        (["train", "digits-reverse", "--out", "x", "--set", "steps"], "--set takes KEY=VALUE"),
        (["train", "digits-reverse", "--out", "x", "--device", "tpu"], "unknown device 'tpu'"),
        (["sample", "nobody"], "unknown run 'nobody'"),
        (["sample", "digits-none", "--labels", "0..11", "--out", "x.png"], "label 10 is out of range: 0..9"),
        (["sample", "digits-none", "--labels", "three"], "unknown class 'three'; known: 0, 1, 2"),
        (["sample", "digits-none", "--seeds", "5..1"], "--seeds 5..1 is empty"),
        (["sample", "digits-none", "--out", "x.txt"], "a picture must be a .png, .webp or .jpg file, not x.txt"),
        (["sample", "digits-none", "--guidance", "-1", "--out", "x.png"], "guidance must be >= 0"),
        (["classify", "digits-none", "nothing.png"], "no picture at nothing.png"),
        (["classify", "digits-none", __file__], "is not a picture: give a PNG"),
        (["classify", "digits-none"], "give picture files, or --split test"),
        (["classify", "digits-none", "--split", "test", "--blocks", "5"], "blocks [5] must be some of 1..4"),
        (["classify", "digits-none", "--split", "test", "--method", "guess"], "unknown classification method 'guess'"),
        (["trace", "digits-none", "--taps", "block.1.layer.7"], "did you mean 'block.1.layer.4' or"),
        (["trace", "digits-none", "--rows", "0", "--taps", ""], "--taps is empty: give names or patterns of states"),
        (["trace", "digits-none", "--rows", "0..360"], "the test split has rows 0..359"),
        (["trace", "digits-none", "--seeds", "1", "--label", "own"], "--label own needs rows of a split"),
        (["trace", "digits-none", "--seeds", "1", "--direction", "forward"], "noise cannot be encoded"),
        (["trace", "digits-none", "--out", "states.pt"], "--out must be a .safetensors file"),
        (["trace", "digits-none", "--picture", "path.txt"], "a picture must be a .png, .webp or .jpg file"),
        (["probe", "digits-none", "--metrics", "lineer"], "unknown metric 'lineer'; did you mean 'linear'"),
        (["probe", "digits-none", "--feed-label"], "or insist with force=True (--force)"),
        (["probe", "digits-none", "--figure", "layers.png"], "--figure must be an .html file"),
        (["probe", "digits-none", "--metrics", "teacher_cosine"], "teacher_cosine needs"),
        (["bench", "everything"], "unknown benchmark 'everything'"),
        (["evaluate", "digits-none", "--split", "valid"], "unknown split 'valid'; known: train, val, test"),
        (["encoder", "score", "nowhere"], "no encoder at nowhere"),
        (["describe", "digits-rever"], "did you mean 'digits-reverse'"),
    ],
)
def test_mistakes_are_told_in_one_line_with_status_2(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, text, err = run(capsys, *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert text == ""
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_usage_errors_have_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2


COMMAND_NAMES = (
    "train", "sample", "classify", "probe", "trace", "evaluate", "compare", "batch", "bench", "encoder", "import-tarflow",
    "describe", "doctor", "app", "read-noise",
)  # fmt: skip
ACTIONS = [[name] for name in COMMAND_NAMES if name not in ("encoder", "app")] + [["encoder", "train"], ["encoder", "score"]]


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_every_command_has_its_own_file(name):
    module = import_module(f"rrepa_lab.cli.{name.replace('-', '_')}")
    assert module in COMMANDS
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    module.register(commands)
    assert list(commands.choices) == [name], "it adds this command, and no other"


def test_every_file_with_a_command_is_listed():
    modules = [
        import_module(f"rrepa_lab.cli.{info.name}") for info in pkgutil.iter_modules(cli.__path__) if info.name[0] != "_"
    ]
    assert {module for module in modules if hasattr(module, "register")} == set(COMMANDS)
    assert len(COMMANDS) == len(set(COMMANDS))


@pytest.mark.parametrize("words", ACTIONS, ids=" ".join)
def test_every_command_has_help_and_json(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert text.startswith(f"usage: rrepa-lab {' '.join(words)} ")
    assert "--json" in text


def test_help_imports_nothing_heavy():
    heavy = {"torch", "pandas", "numpy", "pydantic", "plotly", "tqdm"}
    code = (
        "import contextlib, io, sys\nfrom rrepa_lab.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n    main(['--help'])\n"
        f"assert 'import-tarflow' in out.getvalue()\nprint(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_is_light():
    heavy = {"timm", "torchvision", "gradio", "umap", "plotly", "papermill", "accelerate"}
    code = f"import sys, rrepa_lab as rl; rl.load('digits-reverse'); print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_app_hands_its_flags_to_the_page():
    command = [sys.executable, "-m", "rrepa_lab.cli", "app", "--port", "7999", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--run-dir" in done.stdout


NAMED = ["cat", "dog", "7"]


@pytest.mark.parametrize(
    ("text", "classes", "labels"),
    [
        ("all", NAMED, [0, 1, 2]), ("dog", NAMED, [1]), ("dog, cat", NAMED, [1, 0]), ("0..1", NAMED, [0, 1]), ("7", NAMED, [2]),
        ("cat,2", NAMED, [0, 2]), ("a..b", ["a..b", "c"], [0]),
    ],
)  # fmt: skip
def test_labels_are_names_or_numbers(text, classes, labels):
    assert parse_labels("--labels", text, classes) == labels


def test_a_number_that_is_a_name_is_the_name_and_said_so():
    with pytest.warns(LabWarning, match=r"--labels 1 is the class called 1 \(number 0\), not number 1, which is called 2"):
        assert parse_labels("--labels", "1", ["1", "2", "3"]) == [0]
    assert parse_labels("--labels", "3", ["1", "2", "3"]) == [2]


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        ("cow", NAMED, "unknown class 'cow'; known: cat, dog, 7, all"), ("dgo", NAMED, "did you mean 'dog'"),
        ("3", NAMED, "label 3 is out of range: 0..2; classes: cat, dog, 7"), ("-1", NAMED, "out of range"),
        ("2..1", NAMED, "is empty"), ("0", [], "the run has no classes"), ("0..99999999999", NAMED, "--labels"),
    ],
)  # fmt: skip
def test_other_labels_are_one_line(text, classes, message):
    with pytest.raises(rl.LabError, match=re.escape(message)):
        parse_labels("--labels", text, classes)


@pytest.mark.parametrize(
    ("classes", "options"), [(0, "--seeds 0..15"), (3, "--labels all --seeds 0..9"), (1000, "--labels 0..9")]
)
def test_hints_name_labels_that_the_run_has(classes, options):
    from rrepa_lab.cli.printing import sample_options

    assert sample_options(classes).startswith(options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "digits-none", "--out", "/proc/x/g.png"], "/proc/x/g.png cannot be written: "),
        (["sample", "digits-none", "--out", "file/g.png"], "file/g.png cannot be written: Not a directory"),
        (["sample", "digits-none", "--out", "folder.png"], "folder.png cannot be written: it is a folder"),
        (
            ["sample", "digits-none", "--labels", "all", "--seeds", "0..300", "--out", "g.webp"],
            "a WEBP file has at most 16,383",
        ),
        (["sample", "digits-none", "--seeds", "0..999999", "--out", "g.png"], "holds more than 100,000 numbers"),
        (["trace", "digits-none", "--seeds", "0", "--out", "/proc/x/s.safetensors"], "cannot be written: "),
        (["trace", "digits-none", "--seeds", "0", "--picture", "file/p.png"], "cannot be written: "),
        (["classify", "digits-none", "--split", "test", "--csv", "file/t.csv"], "cannot be written: "),
        (["probe", "digits-none", "--figure", "file/f.html"], "cannot be written: "),
        (["compare", "digits-none", "--html", "file/f.html"], "cannot be written: "),
    ],
)
def test_a_file_that_cannot_be_written_is_found_before_the_work(capsys, tmp_path, monkeypatch, words, message):
    def never(*args, **kwargs):
        raise AssertionError("work began")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(rl.TarFlow, "inverse", never)
    monkeypatch.setattr(rl.TarFlow, "forward", never)
    status, _, err = run(capsys, *words)
    assert (status, message in err, err.count("\n")) == (2, True, 1), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"], "nothing is left behind"


def test_a_flow_is_aligned_with_an_encoder_of_its_own_pictures(capsys, tmp_path):
    for name, colour in (("red", (200, 40, 40)), ("green", (40, 200, 40))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(30):
            shade = tuple(min(255, part + 2 * i) for part in colour)
            Image.new("RGB", (20, 20), shade).save(tmp_path / "photos" / name / f"{i}.png")
    words = ["encoder", "train", "--data", tmp_path / "photos", "--size", 16, "--out", tmp_path / "encoder"]
    status, text, _ = run(capsys, *words, "--set", "steps=2", "--set", "batch=16")
    assert status == 0
    assert f"rrepa-lab train imagefolder-tiny-reverse --out runs/mine --encoder {tmp_path / 'encoder'}" in text
    small = {
        "data.path": tmp_path / "photos", "data.image_size": 16, "flow.image_size": 16, "flow.width": 16, "flow.head_width": 16,
        "flow.blocks": 2, "flow.layers": 1, "train.steps": 2, "train.batch": 8, "align.projector_width": 8,
    }  # fmt: skip
    settings = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    words = [
        "train",
        "imagefolder-tiny-reverse",
        "--encoder",
        tmp_path / "encoder",
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    status, _, err = run(capsys, *words, *settings)
    assert status == 0, err
    encoder = rl.load(tmp_path / "run").encoder()
    assert (encoder.grid, encoder.config.channels, encoder.config.image_size) == ((4, 4), 3, 16)
    status, _, err = run(capsys, *words[:3], tmp_path, *words[4:])
    assert (status, "no encoder at" in err) == (2, True)
    status, _, err = run(capsys, "encoder", "train", "--data", tmp_path / "photos", "--size", 18, "--out", tmp_path / "other")
    assert (status, "an image size that 4 divides, 16 or more, not 18" in err) == (2, True)
