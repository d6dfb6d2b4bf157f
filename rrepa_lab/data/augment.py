"""Random changes of training images that keep their label."""

import torch
from torch import Tensor


def shifted(x: Tensor, most: int, probability: float, draw: torch.Generator) -> Tensor:
    """Move each image by whole pixels, at random; what comes in from outside is background.

    Args:
        x: (B, C, H, W) in [-1, 1].
        most: largest shift in either direction, pixels; rows and columns are drawn independently, uniformly.
        probability: of an image to be moved.

    Returns: (B, C, H, W).
    """
    count, _, height, width = x.shape
    moves = torch.randint(-most, most + 1, (count, 2), generator=draw)
    moves = moves * (torch.rand(count, 1, generator=draw) < probability)
    padded = torch.nn.functional.pad(x, (most, most, most, most), value=-1.0)
    rows = torch.arange(height) + most - moves[:, :1]
    columns = torch.arange(width) + most - moves[:, 1:]
    images = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
