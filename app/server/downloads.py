"""Files for visitors to take away."""

import tempfile
import time
from pathlib import Path

_downloads = tempfile.TemporaryDirectory(prefix="rrepa-lab-")


def keep_file(name: str, data: bytes) -> str:
    """A file for a visitor to take away, kept for an hour at least; returns its path."""
    now = time.time()
    for old in Path(_downloads.name).glob("*/*"):
        if now - old.stat().st_mtime > 3600:
            old.unlink(missing_ok=True)
            old.parent.rmdir()
    path = Path(tempfile.mkdtemp(dir=_downloads.name)) / name
    path.write_bytes(data)
    return str(path)
