"""Serving a page: its flags, its theme and limits, and its end."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import gradio as gr
from page.scripts import STATIC
from server.guard import guards, trusted_hosts
from server.settings import server_settings

from rrepa_lab.errors import LabError
from rrepa_lab.runs.store import pick_device
from rrepa_lab.signals import ending_signals


def launch(demo: gr.Blocks, host: str, port: int | None, hosts: Sequence[str] = (), **more: Any) -> Any:
    """Serve the page with its theme and its limits, under `trusted_hosts`; `more` goes to `gr.Blocks.launch`."""
    return demo.queue(max_size=64, default_concurrency_limit=8).launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Soft(
            primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
        css_paths=STATIC / "page.css",
        footer_links=["api"],
        run_history=False,
        max_file_size="10mb",
        show_error=True,
        ssr_mode=False,
        app_kwargs=guards(trusted_hosts(host, bool(more.get("share")), hosts)),
        **more,
    )


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _parser(tabs: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Open the page of rrepa_lab.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than this machine's can then reach the page"
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="another host name the page may be called by"
    )
    parser.add_argument("--tab", action="append", choices=tabs, help="open this tab alone; may be repeated (default: all)")
    parser.add_argument("--share", action="store_true", help="open a public tunnel to this page")
    parser.add_argument(
        "--run-dir", type=Path, help="folder whose runs are offered in addition to the bundled ones (default: runs)"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for these; also from $RREPA_AUTH")
    parser.add_argument("--mcp", action="store_true", help="offer the endpoints to MCP clients too (needs gradio[mcp])")
    return parser


def serve(build: Callable[[Sequence[str]], gr.Blocks], tabs: Sequence[str]) -> None:
    """Command line of a page: read the flags, open it, and stay until a signal ends it.

    Args:
        build: makes the page of tabs by name, of all when none is given.
        tabs: the names that can be given.
    """
    parser = _parser(tabs)
    given = parser.parse_args()
    auth = given.auth or os.environ.get("RREPA_AUTH")
    if auth and ":" not in auth:
        parser.error("--auth takes USER:PASSWORD")
    if given.run_dir is not None:
        if not given.run_dir.is_dir():
            parser.error(f"--run-dir {given.run_dir} is no folder")
        os.environ["RREPA_RUNS"] = str(given.run_dir.resolve())
    try:
        server_settings.device = str(pick_device(given.device))
    except LabError as error:
        parser.error(str(error))
    if given.mcp:
        try:
            import_module("mcp")
        except ImportError:
            parser.error('--mcp needs one more package: pip install "gradio[mcp]"')
    open_to_others = given.share or given.host not in ("127.0.0.1", "localhost", "::1")
    server_settings.may_train = not open_to_others or bool(auth)
    if open_to_others:
        print(
            "This page can be reached by others: they can draw samples and classify pictures with every run it lists"
            + (", and train, once they gave the password." if auth else "; training is off without --auth.")
        )
    for number in ending_signals():  # all end the page like Ctrl-C, so that a training is saved
        signal.signal(number, _interrupt)
    try:
        launch(
            build(given.tab or ()), given.host, given.port, given.allow_host, share=given.share, mcp_server=given.mcp,
            auth=tuple(auth.split(":", 1)) if auth else None,
        )  # fmt: skip
    except OSError as error:
        sys.exit(f"error: {error}; another page may be open there: choose another --port")
