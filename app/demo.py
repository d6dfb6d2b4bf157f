"""The page: `python app/demo.py` opens it on this machine only, filled with a real picture.

Each tab is a file of its own; this one composes and launches them.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import endpoints
import gradio as gr
from tabs import classify, samples

TABS = {"Samples": samples.build, "Classify": classify.build}
CSS = ".gradio-container {max-width: 1180px !important; margin: 0 auto}"


def build_demo() -> gr.Blocks:
    """The whole page, not launched."""
    with gr.Blocks(title="R-REPA lab", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.Markdown(
            "# R-REPA lab\nNormalizing flows map images to noise exactly, and back. These small ones were trained on "
            "scikit-learn's 8x8 digits, with and without aligning their features to a frozen vision encoder."
        )
        with gr.Tabs():
            for name, build in TABS.items():
                with gr.Tab(name):
                    build()
        endpoints.build()
    return demo


def launch(demo: gr.Blocks, host: str, port: int | None, **more: Any) -> Any:
    """Serve the page with its look and its limits; `more` goes to `gr.Blocks.launch`."""
    return demo.queue(max_size=64).launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Soft(
            primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
        css=CSS,
        footer_links=["api"],
        run_history=False,
        max_file_size="10mb",
        show_error=True,
        ssr_mode=False,
        **more,
    )


def main() -> None:
    """Command line of the page."""
    parser = argparse.ArgumentParser(
        description="Open the page of rrepa_lab.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than this machine's can then reach the page"
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="open a public tunnel to this page")
    given = parser.parse_args()
    if given.share or given.host not in ("127.0.0.1", "localhost", "::1"):
        print("This page can be reached by others: they can draw samples and classify pictures with every run it lists.")
    launch(build_demo(), given.host, given.port, share=given.share)


if __name__ == "__main__":
    main()
