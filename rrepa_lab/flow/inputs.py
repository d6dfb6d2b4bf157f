"""What the instruments accept as images, noise and labels, and how it is converted.

| given | converted to |
|---|---|
| float32, float64, float16, bfloat16 | values in [-1, 1], in the flow's dtype |
| uint8 | 0..255, scaled to [-1, 1]: x / 127.5 - 1 |
| numpy arrays of these | the same |
| bool, other integers, complex | refused |
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rrepa_lab.errors import LabError, LabWarning, unknown
from rrepa_lab.flow.condition import Condition, Guidance
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.finite import check_rows

FAR = 5.0  # pixels beyond this, or beyond six sigma of the training noise around [-1, 1], are a warning


@contextmanager
def gradients() -> Iterator[None]:
    """Within it gradients are recorded, also where the caller is in `torch.no_grad` or `torch.inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def leaf(x: Tensor) -> Tensor:
    """A copy of the values that gradients can be taken of; call it within `gradients`."""
    return usable(x).detach().requires_grad_()


def usable(x: Tensor) -> Tensor:
    """The tensor, copied if it was made under inference mode, so that a graph can hold it; call it within `gradients`."""
    return x.clone() if x.is_inference() else x


def as_images(flow: FlowModel, x: Any, shape: tuple[int, int, int] | None = None) -> Tensor:
    """Images (B, C, H, W) on the device and in the dtype of the flow, in [-1, 1]; see the table above.

    Args:
        shape: (C, H, W) of the pictures where the flow does not model these themselves, but latents of them.

    Raises: LabError for another type or shape, and for rows with NaN or infinite pixels. Warns of pixels far outside
        [-1, 1].
    """
    x = _tensor(x, "images")
    like = next(flow.parameters())
    if x.dtype == torch.uint8:
        _check_shape(flow, x, shape)
        return x.to(like) / 127.5 - 1
    if not x.is_floating_point():
        raise LabError(f"images of {_name(x)} have no stated scale: give floats in [-1, 1], or uint8 in 0..255")
    _check_shape(flow, x, shape)
    x = x.to(like)
    check_rows(x, "images")
    if x.numel():
        low, high = (float(value) for value in x.detach().aminmax())
        limit = max(FAR, 1 + 6 * flow.config.noise_std)
        if max(-low, high) > limit:
            warnings.warn(
                f"pixels reach from {low:.4g} to {high:.4g}, far outside [-1, 1], which flows are trained on: scale them first",
                LabWarning,
                stacklevel=3,
            )
    return x


def _check_shape(flow: FlowModel, x: Tensor, shape: tuple[int, int, int] | None) -> None:
    if shape is None or shape == flow.config.image_shape:
        flow.check_shape(x)
    elif x.ndim != 4 or x.shape[1:] != shape:
        c, h, w = shape
        raise LabError(f"images must be (B, {c}, {h}, {w}) for this run, not {tuple(x.shape)}")


def as_noise(flow: FlowModel, z: Any) -> Tensor:
    """Noise (B, T, P) on the device and in the dtype of the flow; LabError for another type, shape, or rows not finite."""
    z = _tensor(z, "noise")
    if not z.is_floating_point():
        raise LabError(f"noise must be floats, not {_name(z)}")
    flow.check_noise(z)
    z = z.to(next(flow.parameters()))
    check_rows(z, "noise")
    return z


def as_labels(flow: FlowModel, labels: Any, count: int, classes: Sequence[str] | None = None, of: str = "seeds") -> Tensor:
    """Labels in any form -> class ids (count,) int64 on the CPU, -1 for no label.

    Args:
        labels: one for all or one for each: integers of Python, numpy or torch, class names (a string is a name if the run
            has such a class, else an index), None for no label.
        classes: the run's class names; without them a string is an index.
        of: what the labels belong to, for messages.

    Raises: LabError for another type, another number of labels, an unknown name, or an id out of range.
    """
    if isinstance(labels, (Tensor, np.ndarray)):
        if labels.ndim > 1:
            raise LabError(f"labels must be one for all or ({count},), not {tuple(labels.shape)}")
        if str(labels.dtype).removeprefix("torch.") in ("bool", "bfloat16") or "float" in str(labels.dtype):
            raise LabError(f"labels must be integers or class names, not {labels.dtype}")
        labels = labels.tolist()
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Sequence):
        ids = [_label(flow, labels, classes)] * count
    else:
        ids = [_label(flow, label, classes) for label in labels]
        if len(ids) != count:
            raise LabError(f"{len(ids)} labels for {count} {of}: give one label, or one for each")
    return torch.tensor(ids, dtype=torch.int64)


def as_condition(
    flow: FlowModel, y: Any, count: int, guidance: float | Guidance = 0.0, classes: Sequence[str] | None = None
) -> Condition:
    """Labels as `as_labels` takes them, or class weights as `TarFlow.forward` does, with guidance, on the flow's device.

    Raises: LabError as `as_labels`, and for guidance out of range.
    """
    if y is None or isinstance(y, Condition):
        return flow.condition(y, count, guidance)
    device = next(flow.parameters()).device
    if isinstance(y, Tensor) and y.is_floating_point() and y.ndim > 1:
        return flow.condition(y.to(device), count, guidance)
    return flow.condition(as_labels(flow, y, count, classes, of="images").to(device), count, guidance)


def _label(flow: FlowModel, label: Any, classes: Sequence[str] | None) -> int:
    if label is None:
        return -1
    if isinstance(label, str):
        return label_by_name(label, classes, flow.config.classes)
    if isinstance(label, (bool, np.bool_)) or not hasattr(label, "__index__"):
        raise LabError(f"a label must be a class id, a class name or None, not {label!r}")
    try:
        number = int(label.__index__())
    except TypeError:
        raise LabError(f"a label must be a class id, a class name or None, not {label!r}") from None
    return check_label(number, flow.config.classes)


def check_label(number: int, count: int) -> int:
    """The id itself; LabError if it is not in -1..count - 1."""
    if number == -1:
        return number
    if not count:
        raise LabError("this flow has no classes: leave the label out")
    if not 0 <= number < count:
        raise LabError(f"label {number} is out of range: 0..{count - 1}, or -1 for no label")
    return number


def label_by_name(text: str, classes: Sequence[str] | None, count: int) -> int:
    """The id of a class by its name, or by its index where no class has this name; LabError for neither."""
    names = list(classes or ())[:count]
    if text in names:
        return names.index(text)
    digits = text.strip()
    if digits.removeprefix("-").isdecimal():
        return check_label(int(digits), count)
    raise unknown("class", text, names or map(str, range(count)))


def _tensor(x: Any, what: str) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, np.ndarray):
        raise LabError(f"{what} must be a tensor or a numpy array, not {type(x).__name__}")
    if x.dtype.kind not in "fiub" or x.dtype.itemsize > 8:
        raise LabError(f"{what} of numpy {x.dtype} cannot be read: give floats in [-1, 1], or uint8 in 0..255")
    return torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("=")))


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
