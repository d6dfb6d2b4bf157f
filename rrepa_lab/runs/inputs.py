"""Pictures in, what the flow takes out: the one place where the instruments enter the space of a run."""

from typing import Any

from torch import Tensor

from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.finite import check_rows
from rrepa_lab.flow.inputs import as_images
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.run import Run, flow_of
from rrepa_lab.space.config import SPACES
from rrepa_lab.space.contract import Space
from rrepa_lab.space.kinds.pixels import Pixels


def space_of(source: Run | FlowModel) -> Space:
    """The space of a run; for a bare flow that of its own input, as it is."""
    if isinstance(source, Run):
        return source.space
    return Pixels(source.config.image_shape, 0, "gaussian", source.config.noise_std)


def as_pictures(source: Run | FlowModel, pictures: Any) -> Tensor:
    """Pictures (B, C, H, W) of a run, checked and converted as `flow.inputs.as_images` does; of a bare flow its input."""
    shape = space_of(source).picture_shape if isinstance(source, Run) else None
    return as_images(flow_of(source), pictures, shape)


def encoded(source: Run | FlowModel, pictures: Any) -> Tensor:
    """What the flow takes of these pictures (B, C, H, W), without noise: x (B, *shape) on its device and in its dtype.

    Latents of the run's own space, of a shape that no picture of it has, are taken as they are.
    Raises: LabError as `flow.inputs.as_images`, and where the space of the run is not at hand.
    """
    space = space_of(source)
    if isinstance(pictures, Tensor) and pictures.is_floating_point() and _is_x(space, pictures):
        x = for_flow(flow_of(source), pictures)
        check_rows(x, "latents")
        return x
    x = as_pictures(source, pictures)
    return space.encode(x).to(x) if len(x) else x


def _is_x(space: Space, given: Tensor) -> bool:
    return space.shape != space.picture_shape and given.ndim == 4 and given.shape[1:] == space.shape


def for_flow(flow: FlowModel, x: Tensor) -> Tensor:
    """x (B, *shape), with or without noise, on the device and in the dtype of the flow."""
    return x.to(next(flow.parameters()))


def with_statistics(config: RunConfig) -> RunConfig:
    """The configuration with the statistics of its space, as a training stores it.

    Raises: LabError where the space is not at hand, does not fit the flow, or is not the one that `space.stored` describes.
    """
    if config.space.is_pixels:
        return config
    space = SPACES[config.space.kind].make(config.space, config.frame)
    return config.model_copy(update={"space": config.space.model_copy(update={"stored": space.statistics})})
