"""Settings of version 0.1 under their old names: read with a hint where a person types them, silently from stored runs."""

import json
import warnings

import pytest

import rrepa_lab as rl
from rrepa_lab.cli import main
from rrepa_lab.errors import LabWarning
from rrepa_lab.paths import assets
from rrepa_lab.runs.config import ReadConfig, TrainConfig

OLD = {
    "train.lr_floor": ("train.min_lr_ratio", 0.5), "train.clip": ("train.grad_clip_norm", 0.5),
    "train.ema": ("train.ema_decay", 0.5), "train.workers": ("train.num_workers", 3),
    "train.report_every": ("train.log_every", 7), "train.look_every": ("train.eval_every", 7),
    "read.draws": ("read.n_noise_samples", 4),
}  # fmt: skip


def test_every_renamed_setting_is_tried():
    assert {path.split(".")[1] for path in OLD} == {*TrainConfig.renamed, *ReadConfig.renamed}


@pytest.mark.parametrize(("old", "new", "value"), [(old, *rest) for old, rest in OLD.items()])
def test_an_old_name_is_read_with_a_hint(old, new, value):
    config = rl.preset("digits-none")
    with pytest.warns(LabWarning, match=f"the setting {old} is called {new} now"):
        changed = config.override({old: value})
    assert changed.flat()[new] == value
    values = config.to_dict()
    room, name = old.split(".")
    del values[room][new.split(".")[1]]
    values[room][name] = value
    with pytest.warns(LabWarning, match=f"the setting {name} is called {new.split('.')[1]} now"):
        assert rl.RunConfig.from_dict(values) == changed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rl.RunConfig.from_dict(values, stored=True) == changed


def test_both_names_of_a_setting_are_refused():
    with pytest.raises(rl.LabError, match="train: ema and ema_decay are one setting: give ema_decay alone"):
        rl.RunConfig.from_dict({"train": {"ema": 0.5, "ema_decay": 0.9}})


def test_a_run_of_format_1_loads_and_is_saved_in_format_2(tmp_path):
    stored = json.loads((assets() / "runs" / "digits-reverse" / "config.json").read_text("utf-8"))
    assert stored["format"] == 1, "the bundled runs were written by version 0.1"
    assert {"ema", "clip", "look_every"} <= stored["config"]["train"].keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = rl.load("digits-reverse")
    assert run.config.train.ema_decay == stored["config"]["train"]["ema"]
    assert run.config.train.eval_every == stored["config"]["train"]["look_every"]
    run.save(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert saved["format"] == 2
    assert "ema" not in saved["config"]["train"]
    assert rl.load(tmp_path / "run").config == run.config


def test_the_command_line_prints_the_hint(capsys):
    assert main(["train", "digits-none", "--dry-run", "--json", "--set", "train.ema=0.5"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["config"]["train"]["ema_decay"] == 0.5
    assert "note: the setting train.ema is called train.ema_decay now" in err
