"""The page: `python app/demo.py` opens it on this machine only, filled with a real picture.

Each tab is a file of this folder that can also be launched alone, `python app/samples.py`.
"""

from types import ModuleType

import classify
import endpoints
import feature_map
import frame
import gradio as gr
import layers
import reverse_path
import samples
import serving
import training

TABS: list[ModuleType] = [reverse_path, layers, classify, samples, feature_map, training]


def build_demo() -> gr.Blocks:
    """The whole page, not launched."""
    return frame.build_demo(TABS, endpoints.build)


def main() -> None:
    """Command line of the page."""
    serving.serve(TABS, endpoints.build)


if __name__ == "__main__":
    main()
