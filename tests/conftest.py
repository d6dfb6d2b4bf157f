"""Fixtures shared by all tests: perturbed float64 flows, and small real data."""

import atexit
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import rrepa_lab as rl
from rrepa_lab.align.strategy import STRATEGIES, Features
from rrepa_lab.data.config import DataConfig
from rrepa_lab.data.splits import load_split
from rrepa_lab.data.subset import whole
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.perturb import perturb
from rrepa_lab.flow.taps import Tap
from rrepa_lab.paths import bundled

# under pytest-xdist the workers share the cores, with the kernels and commands they start
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
# one cache for each session of tests, which never is the user's own
os.environ["RREPA_CACHE"] = tempfile.mkdtemp(prefix="rrepa-test-cache-")
atexit.register(shutil.rmtree, os.environ["RREPA_CACHE"], ignore_errors=True)

# small, and different in everything that can differ
collect_ignore = ["extend", "golden"]  # doctests would import them, and so register what is in extend
CONFIGS = {
    "plain": rl.FlowConfig(classes=10, width=32, head_width=16, blocks=3, layers=2),
    "rotary-swiglu": rl.FlowConfig(classes=10, width=32, head_width=16, blocks=2, layers=3, positions="rotary", mlp="swiglu"),
    "unconditional": rl.FlowConfig(classes=0, width=16, head_width=8, blocks=4, layers=1, patch_size=4),
    "volume-preserving": rl.FlowConfig(classes=4, width=32, head_width=16, blocks=2, layers=2, volume_preserving=True),
    "colour": rl.FlowConfig(classes=3, channels=3, image_size=12, patch_size=3, width=32, head_width=32, blocks=2, layers=1),
}


def make_flow(config: rl.FlowConfig, seed: int = 0) -> rl.TarFlow:
    """A float64 flow away from its zero start: on fresh weights every check below would hold by accident."""
    torch.manual_seed(seed)
    flow = rl.TarFlow(config).double()
    perturb(flow, seed, std=0.05)
    if flow.prior_var is not None:
        flow.prior_var.uniform_(0.5, 2.0)
    return flow


def features(
    flow: FlowModel,
    x: torch.Tensor,
    y: torch.Tensor | None,
    strategy: str,
    taps: list[Tap],
    refinements: int = 0,
    plain: bool = False,
) -> Features:
    """The encoding pass and the aligned features of a strategy."""
    return STRATEGIES[strategy].features(flow, x, flow.condition(y, len(x)), taps, refinements, plain)


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


# of the presets: what most tests can do without; bfloat16, which some processors are faster with, rounds too much to compare
PLAIN = {"data.shift": 0, "data.holdout": 0.0, "train.keep": "last", "train.patience": 0, "train.precision": "float32"}


@pytest.fixture
def tiny() -> rl.RunConfig:
    """digits-reverse made small enough to train within a second or two."""
    return rl.preset("digits-reverse").override(PLAIN | {
        "name": "tiny", "flow.width": 16, "flow.head_width": 16, "flow.blocks": 2, "flow.layers": 2, "align.blocks": [1, 2],
        "align.projector_width": 16, "train.steps": 12, "train.batch": 32, "train.warmup": 2, "train.log_every": 2,
        "train.eval_every": 6, "train.save_every": 4,
    })  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained run directory, not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    config = rl.preset("digits-reverse").override(PLAIN | {
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


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def served(command: list[str], address: str, folder: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers at its address, started in `folder` and ended afterwards."""
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | env)
    end = time.monotonic() + 90
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, f"no answer from {address}"
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """A page of a headless Chromium that goes nowhere by itself."""
    sync = pytest.importorskip("playwright.sync_api")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync.sync_playwright() as player:
        browser = player.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox", *quiet]
        )
        yield browser.new_page(viewport={"width": width, "height": height})
        browser.close()


@pytest.fixture(scope="session")
def page_server(page_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Address and process id of `python app/demo.py`, started as a person starts it, from another folder."""
    port = free_port()
    command = [sys.executable, str(bundled("app") / "demo.py"), "--port", str(port), "--run-dir", str(page_runs)]
    address = f"http://127.0.0.1:{port}"
    with served(command, address, tmp_path_factory.mktemp("elsewhere"), HF_HUB_OFFLINE="1") as process:
        yield address, process.pid


@pytest.fixture(scope="session")
def page(page_server: tuple[str, int]) -> str:
    """The address of the page."""
    return page_server[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Of a browser test that failed, print what the page showed: a machine without a screen has nothing else to tell."""
    report = yield
    view = getattr(item, "funcargs", {}).get("view")
    if report.when == "call" and report.failed and view is not None and not view.is_closed():
        empty = view.locator("[aria-label='Empty value']").count()
        shown = f"console: {view.errors}\n{empty} empty charts; text of the page:\n{view.locator('body').inner_text()}"
        report.sections.append(("the page", shown))
    return report


@pytest.fixture
def view(page: str) -> Iterator[Any]:
    """The page in a browser; `view.errors` is what its console complained of, `view.strays` are requests to elsewhere."""
    with chromium() as opened:
        opened.set_default_timeout(180_000)  # a machine may be busy; how fast the page is, `rrepa-lab bench page` says
        opened.errors, opened.strays = [], []
        opened.on("console", lambda message: opened.errors.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.on("request", lambda r: opened.strays.append(r.url) if not r.url.startswith((page, "data:", "blob:")) else None)
        opened.goto(page)
        opened.wait_for_selector("#way img")
        yield opened


def reopen(view: Any, address: str) -> None:
    """Leave the page without a complaint so far, and open another view of it.

    Leaving breaks off the page's streams, and it says so in its console, at times a moment later: those words are
    dropped.
    """
    assert view.errors == []
    view.goto("about:blank")
    view.wait_for_timeout(200)
    view.errors.clear()
    view.goto(address)


@pytest.fixture(scope="session")
def client(page: str) -> Iterator[Any]:
    """Gradio's own client of the page."""
    gradio_client = pytest.importorskip("gradio_client")
    connected = gradio_client.Client(page, verbose=False)
    yield connected
    connected.close()


@pytest.fixture(scope="session")
def printed() -> Callable[[int], Image.Image]:
    """A digit as a printer would write it, black on white with a margin."""

    def draw(digit: int) -> Image.Image:
        image = Image.new("RGB", (200, 200), "white")
        ImageDraw.Draw(image).text((100, 100), str(digit), fill="black", font=ImageFont.load_default(120), anchor="mm")
        return image

    return draw
