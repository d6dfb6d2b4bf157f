"""Trajectories between noise and image through a run, and the features of its layers beside the teacher's."""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from page.views import View, linked_as
from server.runs import image_word, label_of, test_images
from server.shipped import SHIPPED_RUNS, shipped, shipped_name
from torch import Tensor

import rrepa_lab as rl
from rrepa_lab.align.aligner import Aligner
from rrepa_lab.errors import LabError
from rrepa_lab.flow.taps import Tap
from rrepa_lab.sampling.denoise import Finished, finish
from rrepa_lab.sampling.sample import noise
from rrepa_lab.studies.alignment import unguided

NOISE, IMAGE = "fresh noise", "test image"
N_IMAGES = 6  # images that share the colours of features: a basis fitted to one image alone says little
MAX_CACHED_VALUES = 2**26  # values of inner states that may be kept for a view; above, only those of the chosen layer


@dataclass(frozen=True)
class ReversePathView(View):
    """What the tab "Reverse path" shows."""

    start: str = NOISE  # or IMAGE
    choice: str = field(default="3", metadata=linked_as("class"))
    image: int = 0  # row of the test split, for IMAGE
    guidance: float = 0.0
    temperature: float = 1.0
    block: int = 3
    layer: int = 2


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The states of some images between the noise and the image, through one run."""

    trace: rl.Trace
    finished: Tensor  # (B, C, H, W) in [-1, 1]
    columns: list[str]  # what each image is
    finish: str  # what the last step was, "" for none


def trajectory_of(run: rl.Run, view: ReversePathView, *taps: str) -> Trajectory:
    """The trajectory of N_IMAGES images, with the states at these taps.

    Of a small flow all layers are kept, so that moving a slider needs no other pass.
    """
    config = run.flow.config
    if N_IMAGES * config.tokens * config.width * sum(config.depths) <= MAX_CACHED_VALUES:
        taps = ("block.*.layer.*",)
    label = label_of(view.choice, run)
    return _trajectory(
        run, view.start, view.seed, view.image, label, rl.Guidance(view.guidance, temperature=view.temperature), taps
    )


@lru_cache(maxsize=16)
def _trajectory(
    run: rl.Run, start: str, seed: int, image: int, label: int, guidance: rl.Guidance, taps: tuple[str, ...]
) -> Trajectory:
    """Decode fresh noise (seeds from `seed` on), or test images encoded first (rows from `image` on)."""
    flow = run.flow
    if start == NOISE:
        source: Tensor = noise(flow, range(seed, seed + N_IMAGES))
        columns = [f"seed {number}" for number in range(seed, seed + N_IMAGES)]
    else:
        x, _ = test_images(run)
        rows = [(image + step) % len(x) for step in range(N_IMAGES)]
        source, columns = x[rows], [f"{image_word(run)} {row}" for row in rows]
    labels = torch.full((N_IMAGES,), label, device=run.device) if flow.config.classes else None
    trace = rl.trace(run, source, labels, "reverse", taps, guidance=guidance)
    made = trace.x["block.1.in"].to(run.device)
    done = finish(run, made, labels) if start == NOISE else Finished(run.space.decode(made), "")
    return Trajectory(trace, done.images.clamp(-1, 1).cpu(), columns, done.how)


@lru_cache(maxsize=8)
def aligner_of(run: rl.Run) -> tuple[Aligner | None, str]:
    """The alignment with the run's teacher, and why there is none; the page downloads no teacher, and loads each once."""
    own = run.config.align.with_self
    if not run.config.teachers and not own:
        return None, "the run has no teacher"
    try:
        if not own:
            run.encoder(download=False)
        return run.aligner(), ""
    except LabError:
        models = " and ".join(one.model for one in run.config.teachers)
        weights = ", ".join("timm's own" if one.weights == "pretrained" else one.weights for one in run.config.teachers)
        what = f"its teacher {models} is" if len(run.config.teachers) == 1 else f"its teachers {models} are"
        return None, f"{what} not shown: no weights on this machine ({weights})"


@lru_cache(maxsize=16)
def teacher_of(run: rl.Run, trajectory: Trajectory) -> Tensor | None:
    """The encoder's features (B, T, E) of the finished images; None for a run without an encoder on this machine."""
    aligner, _ = aligner_of(run)
    return None if aligner is None else aligner.target(trajectory.finished.to(run.device)).cpu()


def tap_in(run: rl.Run, block: int, layer: int) -> Tap:
    """The layer of the sliders; in a smaller flow or a shallower block the last there is."""
    number = min(block, run.flow.config.blocks)
    return Tap(number, min(layer, run.flow.config.layers_of(number)))


def strip(trajectory: Trajectory) -> dict[str, Tensor]:
    """The first image's stages by caption, from the noise on."""
    blocks = len(trajectory.trace.images) - 1
    captions = ["noise", *(f"after block {number}" for number in range(blocks, 0, -1))]
    stages = {caption: image[0] for caption, image in zip(captions, trajectory.trace.images.values(), strict=True)}
    return stages | {"finished": trajectory.finished[0]}


def features(run: rl.Run, trajectory: Trajectory, tap: Tap) -> dict[str, dict[str, Tensor]]:
    """Strips of pictures in [-1, 1]: the images as the block leaves them, the layer's features, and the teacher's.

    At an aligned tap also the features as the projector sends them to the teacher, in the colours of the teacher's own.
    """
    side = run.flow.config.side
    after = trajectory.trace.images[Tap(1, "in").name if tap.block == 1 else Tap(tap.block - 1, "out").name]
    rows = {f"images after block {tap.block}": after} | _coloured(
        {f"features, {tap.name}": trajectory.trace.states[tap.name]}, side
    )
    teacher = teacher_of(run, trajectory)
    if teacher is not None:
        compared = {"the teacher's, of the finished images": teacher}
        if tap.name in run.projectors.taps:
            compared = {"features through the projector": project(run, trajectory, tap)} | compared
        rows |= _coloured(compared, side)
    return {name: dict(zip(trajectory.columns, images, strict=True)) for name, images in rows.items()}


def _coloured(states: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    return {name: 2 * image - 1 for name, image in rl.patch_colours(states, side).items()}


@torch.no_grad()
def project(run: rl.Run, trajectory: Trajectory, tap: Tap) -> Tensor:
    """The features at an aligned tap in the teacher's space, (B, T, E)."""
    return run.projectors.project(tap.name, trajectory.trace.states[tap.name].to(run.device)).cpu()


def facts(name: str, run: rl.Run, trajectory: Trajectory, tap: Tap) -> str:
    """Measurements of a trajectory in a line."""
    parts = [f"round-trip error {float(trajectory.trace.error.max()):.1e}"]
    teacher = teacher_of(run, trajectory)
    if teacher is not None and tap.name in run.projectors.taps:
        states = trajectory.trace.states[tap.name].to(run.device)
        cosine = float(run.aligner().similarity(tap.name, states, teacher.to(run.device)).mean())
        parts.append(f"cosine with the teacher through the projector {cosine:.3f}")
    missing = aligner_of(run)[1]
    if missing:
        parts.append(missing)
    parts += shipped_cka(name, run, tap.name)
    return f"**{name}**, `{tap.module_path}`: {'; '.join(parts)}."


def shipped_cka(name: str, run: rl.Run, tap: str) -> list[str]:
    """Linear CKA of a bundled run's layer with the encoder, from the shipped tables, in words; nothing for other runs."""
    table = shipped_name(run, SHIPPED_RUNS)
    if table is None:
        return []
    rows = unguided(shipped(table), "cka")
    rows = rows[(rows["run"] == name) & (rows["tap"] == tap)]
    return [f"linear CKA with the teacher {row.value:.2f} over {row.n:,} test images" for row in rows.head(1).itertuples()]
