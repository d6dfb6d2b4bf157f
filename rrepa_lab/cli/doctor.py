"""`rrepa-lab doctor`: check the installation."""

import argparse
import os
import platform
from importlib import metadata, util
from typing import TYPE_CHECKING, TypeAlias

from rrepa_lab.cli.arguments import Commands, add_command
from rrepa_lab.cli.printing import hint, print_rows
from rrepa_lab.errors import LabError
from rrepa_lab.files import sha256
from rrepa_lab.paths import assets

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "gradio", "plotly",
    "jupyterlab", "ipywidgets", "anywidget", "papermill", "umap-learn", "scikit-learn",
)  # fmt: skip
Check: TypeAlias = tuple[str, str, bool, str]  # check, found, ok, advice


def register(commands: Commands) -> None:
    """Add the command."""
    add_command(commands, "doctor", run, "Check the installation: versions, device, bundled files.")


def run(args: argparse.Namespace) -> int:
    """Print one row per check; status 1 if one failed."""
    table = examine()
    print_rows(table.to_dict("records"), args.json)
    if table["ok"].all():
        hint(args, "all checks passed; open the page: rrepa-lab app")
        return 0
    return 1


def examine() -> "pd.DataFrame":
    """One row per check: check, found, ok, advice (empty where it passed)."""
    import pandas as pd

    rows = [("python", platform.python_version(), True, "")]
    rows += [_package(name) for name in PACKAGES]
    rows += [_vision(), _device(), _threads(), _inception(), *_bundled()]
    return pd.DataFrame(rows, columns=["check", "found", "ok", "advice"])


def _package(name: str) -> Check:
    try:
        return name, metadata.version(name), True, ""
    except metadata.PackageNotFoundError:
        return name, "missing", False, f"pip install {name}"


def _vision() -> Check:
    """torchvision must be built for the installed torch: timm imports it."""
    check = "torch and torchvision match"
    try:
        torch_version = metadata.version("torch").split("+")[0]
        required = [need for need in metadata.requires("torchvision") or [] if need.replace(" ", "").startswith("torch==")]
    except metadata.PackageNotFoundError as missing:
        return check, f"{missing} is missing", False, "pip install torch torchvision"
    wanted = required[0].split("==")[1].split(";")[0].strip(" ()") if required else torch_version
    if wanted != torch_version:
        return check, f"torch {torch_version}, torchvision asks for {wanted}", False, "pip install --upgrade torch torchvision"
    try:
        import torchvision.ops  # noqa: F401
    except Exception as error:
        return check, f"import fails: {error}", False, "pip install --force-reinstall torch torchvision"
    return check, f"torch {torch_version}", True, ""


def _device() -> Check:
    if util.find_spec("torch") is None:
        return "device", "no torch", False, "pip install torch"
    import torch

    return "device", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", True, ""


def _threads() -> Check:
    import torch

    return "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores", True, ""


def _inception() -> Check:
    """Whether FID, sFID and IS can be measured; they are optional."""
    from rrepa_lab.evaluation.networks.inception import find_weights

    check = "Inception (FID, sFID, IS; optional)"
    if util.find_spec("torch_fidelity") is None:
        return check, 'not installed: pip install "rrepa-lab[metrics]"', True, ""
    try:
        return check, str(find_weights()), True, ""
    except LabError:
        return check, "no weights: rrepa-lab evaluate RUN --protocol adm says where they go", True, ""


def _bundled() -> list[Check]:
    """Every bundled file against assets/SHA256SUMS."""
    from rrepa_lab.readers import read_text

    try:
        root = assets()
        listed = read_text(root / "SHA256SUMS").splitlines()
    except LabError as error:
        return [("bundled files", str(error), False, "install the package again, or clone it whole")]
    wrong = []
    for line in listed:
        digest, name = line.split(maxsplit=1)
        if not (root / name).is_file():
            wrong.append(f"{name} is missing")
        elif sha256(root / name) != digest:
            wrong.append(f"{name} has changed")
    if wrong:
        return [("bundled files", problem, False, "restore it: git checkout assets, or install again") for problem in wrong]
    return [("bundled files", f"{len(listed)} hashes agree", True, "")]
