"""`rrepa-lab app`: open the page."""

import os
import sys
from collections.abc import Sequence

from rrepa_lab.cli.arguments import Commands


def register(commands: Commands) -> None:
    """Add the command to the list of the help; its arguments are parsed by app/demo.py."""
    commands.add_parser("app", help="Open the page; takes the arguments of app/demo.py.")


def run(arguments: Sequence[str]) -> int:
    """Replace this process by app/demo.py with these arguments; it does not return."""
    from rrepa_lab.paths import bundled

    os.execv(sys.executable, [sys.executable, str(bundled("app") / "demo.py"), *arguments])
