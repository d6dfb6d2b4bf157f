"""Picture files given on the command line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rrepa_lab.runs.run import Run


def load_pictures(run: "Run", paths: list[str]) -> tuple["Tensor", list[str]]:
    """Picture files as the flow of the run takes them.

    Returns: (B, C, H, W) in [-1, 1] on the device of the run, and per picture the changes made to it (empty for none).
    Raises:  LabError for a file that is missing or no picture.
    """
    import torch

    from rrepa_lab.data.pictures import read_picture
    from rrepa_lab.data.prepare import prepare

    images = [prepare(read_picture(path), run.config.data) for path in paths]
    return torch.cat([image.x for image in images]).to(run.device), [image.how for image in images]
