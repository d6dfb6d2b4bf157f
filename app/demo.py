"""The page: `python app/demo.py` opens it on this machine only, filled with a real picture."""

from collections.abc import Sequence

import gradio as gr
import tabs
from page import compose
from page.serve import serve
from server import endpoints


def build_demo(names: Sequence[str] = ()) -> gr.Blocks:
    """The page with the tabs of these names, all by default; not launched."""
    return compose.build_demo(tabs.load(names), endpoints.build)


def main() -> None:
    """Command line of the page."""
    serve(build_demo, list(tabs.MODULES))


if __name__ == "__main__":
    main()
