"""Where the bundled files and the runs of this machine are, in a clone, an editable install and a wheel alike."""

import os
from pathlib import Path

import platformdirs

from rrepa_lab.errors import LabError

_PACKAGE = Path(__file__).parent
# a clone (and an editable install of it) has the folders beside the package, a wheel inside it
_ROOT = _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else _PACKAGE


def bundled(name: str) -> Path:
    """The folder `assets`, `app` or `notebooks`; LabError if it did not come along."""
    folder = _ROOT / name
    if not folder.is_dir():
        raise LabError(f"the folder {name!r} of rrepa_lab is missing: install the package again, or clone it whole")
    return folder


def assets() -> Path:
    """The bundled models: runs, encoders, evaluators."""
    return bundled("assets")


def runs_root() -> Path:
    """Where local runs are looked for by name: $RREPA_RUNS, or ./runs; anywhere in a clone, the clone's runs."""
    if "RREPA_RUNS" in os.environ:
        return Path(os.environ["RREPA_RUNS"])
    return _ROOT / "runs" if _ROOT in Path.cwd().parents else Path("runs")


def cache_root() -> Path:
    """Where decoded pictures, latents and features are kept: $RREPA_CACHE, or the user's cache directory."""
    if os.environ.get("RREPA_CACHE"):
        return Path(os.environ["RREPA_CACHE"]).expanduser()
    return platformdirs.user_cache_path("rrepa_lab", appauthor=False)


def data_root() -> Path:
    """Where published data sets are looked for without a data.path: $RREPA_DATA, or `sets` in the cache directory."""
    if os.environ.get("RREPA_DATA"):
        return Path(os.environ["RREPA_DATA"]).expanduser().absolute()
    return cache_root() / "sets"
