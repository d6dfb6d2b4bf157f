"""What finishes a generated image: the training noise is taken out of it.

Under Gaussian noise that is one step along the score. Under uniform noise a flow models dequantized values, so the step is
back to the integer whose bin holds the value: half a bin lies between the two scales.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rrepa_lab.checks import real_number
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.finite import NotFiniteError, cause, check_rows, listed, rows_not_finite
from rrepa_lab.flow.inputs import gradients, leaf, usable
from rrepa_lab.runs.inputs import space_of
from rrepa_lab.runs.run import Run, flow_of


class Finished(NamedTuple):
    """Images after the last step of sampling, not clipped, and what that step was."""

    images: Tensor  # (B, C, H, W), decoded where the run models latents
    how: str  # "denoised", "denoised, strength 0.5", "rounded down to 17 levels" or "as generated"; ", decoded by vae"


def denoise_step(flow: FlowModel, x: Tensor, y: Tensor | None = None, strength: float = 1.0) -> Tensor:
    """One step along the score: x + strength * sigma^2 * grad_x log p(x | y), the posterior mean under Gaussian noise.

    Args:
        x: (B, C, H, W), as generated.
        y: the label of the sample; guidance plays no part here.
        strength: of the step, finite and >= 0; 0 changes nothing.

    A flow trained with uniform noise has no sigma to remove: x comes back as it is, see `finish`.
    Raises: LabError for a strength out of range or rows of x that are not finite; NotFiniteError where the score is not.
    Source: TARFlow, arXiv 2412.06329, section 3.3 (Tweedie's formula).
    """
    strength = real_number("strength", strength)
    if flow.config.noise != "gaussian":
        return x
    check_rows(x, "images to denoise")
    with gradients():
        at = leaf(x)
        (score,) = torch.autograd.grad(flow.log_prob(at, None if y is None else usable(y)).sum(), at)
    done = x + strength * flow.config.noise_std**2 * score
    bad = rows_not_finite(done)
    if bad:
        raise NotFiniteError(f"the denoising step is not finite in row {listed(bad)} of {len(x)}: {cause(flow)}", bad)
    return done


def finish(
    run: Run | FlowModel, x: Tensor, y: Tensor | None = None, *, denoise: bool = True, strength: float = 1.0
) -> Finished:
    """The last steps of sampling for x (B, *shape) as generated: the noise is taken out, then pictures are decoded.

    Args:
        denoise: under Gaussian noise, `denoise_step` with this `strength`. Under uniform noise a run's images always go back
            to pixel values, since they lie on another scale before; a bare flow does not know its levels and leaves them.
    """
    flow = flow_of(run)
    if flow.config.noise == "uniform":
        if not isinstance(run, Run):
            return Finished(x, "as generated, on the dequantization scale")
        return Finished(run.space.decode(x), f"rounded down to {run.config.data.levels} levels")
    space, words = space_of(run), "as generated"
    if denoise:
        words = "denoised" if strength == 1.0 else f"denoised, strength {strength:g}"
        x = denoise_step(flow, x, y, strength)
    return Finished(space.decode(x), words if space.name == "pixels" else f"{words}, decoded by {space.name}")
