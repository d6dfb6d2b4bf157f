"""Where the bundled files and the runs of this machine are, in a clone, an editable install and a wheel alike."""

import os
from pathlib import Path

from rrepa_lab.errors import LabError

_PACKAGE = Path(__file__).parent


def bundled(name: str) -> Path:
    """The folder `assets` or `app`: beside the package in a clone, inside it in an installed wheel."""
    for folder in (_PACKAGE.parent / name, _PACKAGE / name):
        if folder.is_dir() and (_PACKAGE.parent / "pyproject.toml").exists() == (folder.parent == _PACKAGE.parent):
            return folder
    raise LabError(f"the folder {name!r} of rrepa_lab is missing: install the package again, or clone it whole")


def assets() -> Path:
    """The bundled models: runs, encoders, evaluators."""
    return bundled("assets")


def runs_root() -> Path:
    """Where local runs are looked for by name: $RREPA_RUNS, or ./runs."""
    return Path(os.environ.get("RREPA_RUNS", "runs"))
