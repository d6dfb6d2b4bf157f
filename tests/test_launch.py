"""The examples of assets/processes.md: their commands parse, the script runs, and a training in two processes does."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import rrepa_lab as rl
from rrepa_lab.cli import _parser
from rrepa_lab.paths import assets

PAGE = (assets() / "processes.md").read_text(encoding="utf-8")
# what SLURM has that this machine lacks: the names of the nodes, and the start of a command on each (here it is printed)
STAND_INS = {"scontrol": 'echo "node1\nnode2"', "srun": 'printf "%s\\n" "$@"'}


def lines() -> list[list[str]]:
    """The words of every command of the page's shell blocks."""
    found = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in found for line in block.splitlines()]


def kit_words(words: list[str]) -> list[str]:
    """The arguments of our command line."""
    return words[words.index("rrepa_lab.cli") + 1 :] if "rrepa_lab.cli" in words else words[1:]


def test_every_command_parses():
    names = [words[0] for words in lines()]
    assert {"torchrun", "accelerate", "rrepa-lab"} == set(names)
    for words in lines():
        _parser().parse_args(kit_words(words))
        if words[0] == "torchrun":
            assert get_args_parser().parse_args(words[1:]).training_script == "rrepa_lab.cli"


@pytest.mark.parametrize("again", [False, True])
def test_the_slurm_script_starts_the_training_and_goes_on_with_it(tmp_path, again):
    (script,) = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "job").write_text(script, encoding="utf-8")
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        path.chmod(0o755)
    if again:
        (tmp_path / "runs" / "imagenet64").mkdir(parents=True)
        (tmp_path / "runs" / "imagenet64" / "train_state.pt").touch()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[1-2]"}
    env = {**os.environ, **slurm, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": "/home/me"}
    done = subprocess.run(["bash", "-eu", "job"], cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    words = done.stdout.splitlines()
    launch = get_args_parser().parse_args(words[1:])
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_endpoint) == ("2", "4", "node1:29500")
    args = _parser().parse_args(kit_words(words))
    assert args.resume == again
    assert args.source == ("runs/imagenet64/config.json" if again else "imagenet64-reverse")
    assert args.set == ([] if again else ["data.path=/home/me/imagenet"])


@pytest.mark.processes
def test_the_commands_for_one_machine_run(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    small = {"train.steps": 12, "train.batch": 32, "flow.width": 16, "flow.head_width": 16, "train.parallel": "fsdp"}
    for words in (words for words in lines() if words[0] != "rrepa-lab"):
        more = {
            "train": ["--device", "cpu", *(word for key, value in small.items() for word in ("--set", f"{key}={value}"))],
            "evaluate": ["--samples", "0", "--noise-samples", "1"],
        }.get(kit_words(words)[0], [])
        subprocess.run([*words, *more], cwd=tmp_path, env=env, check=True, capture_output=True, timeout=300)
    for name in ("two", "other"):
        assert rl.load(tmp_path / "runs" / name).step == 12
    assert (tmp_path / "grid.png").stat().st_size > 1000
