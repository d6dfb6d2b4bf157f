"""Images to tokens and back.

Tokens are non-overlapping patches in row-major order; the P numbers of a token are laid out as
`torch.nn.functional.unfold` gives them: channel, row, column.
"""

from torch import Tensor
from torch.nn import functional as F


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, T, P) with T = (H / p) * (W / p) and P = C * p * p."""
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


def unpatchify(tokens: Tensor, patch_size: int, image_size: int) -> Tensor:
    """(B, T, P) -> (B, C, H, W), the inverse of `patchify` for square images."""
    return F.fold(tokens.transpose(1, 2), (image_size, image_size), patch_size, stride=patch_size)
