"""Fixtures shared by all tests: perturbed float64 flows, and small real data."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rrepa_lab as rl
from rrepa_lab.align.routing import perturb
from rrepa_lab.data.datasets import DataConfig, load_split, whole
from rrepa_lab.places import bundled

# under pytest-xdist the workers share the cores, with the kernels and commands they start
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# small, and different in everything that can differ
CONFIGS = {
    "plain": rl.FlowConfig(classes=10, width=32, head_width=16, blocks=3, layers=2),
    "rotary-swiglu": rl.FlowConfig(classes=10, width=32, head_width=16, blocks=2, layers=3, positions="rotary", mlp="swiglu"),
    "unconditional": rl.FlowConfig(classes=0, width=16, head_width=8, blocks=4, layers=1, patch_size=4),
    "colour": rl.FlowConfig(classes=3, channels=3, image_size=12, patch_size=3, width=32, head_width=32, blocks=2, layers=1),
}


def make_flow(config: rl.FlowConfig, seed: int = 0) -> rl.TarFlow:
    """A float64 flow away from its zero start: on fresh weights every check below would hold by accident."""
    torch.manual_seed(seed)
    flow = rl.TarFlow(config).double()
    perturb(flow, seed, std=0.05)
    return flow


@pytest.fixture(params=CONFIGS, scope="module")
def flow(request: pytest.FixtureRequest) -> rl.TarFlow:
    return make_flow(CONFIGS[request.param])


@pytest.fixture(scope="module")
def batch(flow: rl.TarFlow) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Three images, with an ordinary, a dropped and the last label."""
    x = torch.randn(3, *flow.config.image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([1, -1, flow.config.classes - 1]) if flow.config.classes else None
    return x, y


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = whole(load_split(DataConfig(), "test"))
    return x, y


@pytest.fixture
def tiny() -> rl.RunConfig:
    """digits-reverse made small enough to train within a second or two."""
    return rl.preset("digits-reverse").override({
        "name": "tiny", "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 2, "align.blocks": [1, 2],
        "align.projector_width": 16, "train.steps": 12, "train.batch": 32, "train.warmup": 2, "train.report_every": 2,
        "train.look_every": 6, "train.save_every": 4,
    })  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained run directory, not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    config = rl.preset("digits-reverse").override({
        "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 2, "align.blocks": [2],
        "align.projector_width": 16, "train.steps": 4, "train.batch": 32,
    })  # fmt: skip
    assert list(rl.train(config, out, device="cpu"))
    return out


@pytest.fixture(scope="session")
def page_runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of local runs that the page is started with: a small one, and one whose weights are damaged."""
    root = tmp_path_factory.mktemp("page-runs")
    for name in ("small", "damaged"):
        shutil.copytree(trained, root / name)
    (root / "damaged" / "model.safetensors").write_bytes(b"no weights at all")
    return root


@pytest.fixture(scope="session")
def page(page_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `python app/demo.py`, started as a person starts it, from another folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("elsewhere")
    log = folder / "log"
    command = [sys.executable, str(bundled("app") / "demo.py"), "--port", str(port), "--run-dir", str(page_runs)]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    address = f"http://127.0.0.1:{port}"
    for _ in range(900):
        with contextlib.suppress(OSError), urllib.request.urlopen(address) as answer:
            if answer.status == 200:
                break
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    yield address
    process.terminate()
    process.wait(10)


@pytest.fixture
def view(page: str) -> Iterator[Any]:
    """The page in a headless Chromium; `view.errors` are what its console complained of, `view.strays` requests to elsewhere."""
    sync = pytest.importorskip("playwright.sync_api")
    quiet = [
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
    ]
    with sync.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=quiet)
        opened = browser.new_page(viewport={"width": 1280, "height": 1000})
        opened.errors, opened.strays = [], []
        opened.on("console", lambda message: opened.errors.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.on("request", lambda r: opened.strays.append(r.url) if not r.url.startswith((page, "data:", "blob:")) else None)
        opened.goto(page)
        opened.wait_for_selector("#way img")
        yield opened
        browser.close()
