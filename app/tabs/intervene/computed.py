"""The images and answers of the tab "Intervene", kept by what they depend on."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from page.views import View
from server.runs import get_run, image_word, missing_data, test_images
from tabs.trajectories import tap_in
from torch import Tensor

import rrepa_lab as rl
from rrepa_lab.errors import LabError
from rrepa_lab.values import number_range

TEST, GENERATED = "test images", "generated images"
PATCH, STEER, REMOVE = "patch", "steer", "remove"
LAYER, ATTENTION, PERCEPTRON, BLOCK, TOKENS = "layer", "attention", "perceptron", "block", "tokens before the block"
PARTS = (LAYER, ATTENTION, PERCEPTRON, BLOCK, TOKENS)
HEAD, COMPONENT = "head ", "component "
N_COMPONENTS = 3
N_VECTOR_IMAGES = 400  # that a vector to steer along is computed from
REVERSE, FORWARD = "the noise", "the image"  # what is kept
DIRECTIONS = {REVERSE: "reverse", FORWARD: "forward"}


@dataclass(frozen=True)
class InterveneView(View):
    """What the tab shows."""

    images: str = TEST  # or GENERATED
    target: int = 1  # row of the test images, or added to the seed
    source: int = 3
    action: str = PATCH
    part: str = LAYER  # of PARTS, or a head
    block: int = 3
    layer: int = 2
    tokens: str = ""  # numbers of tokens, "0..3,7"; "" for all
    strength: float = 1.0
    towards: str = "3"  # class or principal component; the first class in runs that have no such class
    keep: str = REVERSE


def part_name(run: rl.Run, view: InterveneView) -> str:
    """The part of the flow, as `rl.patch` takes it; in a smaller flow the nearest there is."""
    tap = tap_in(run, view.block, view.layer)
    if view.part in (BLOCK, TOKENS):
        return f"block.{tap.block}" + (".in" if view.part == TOKENS else "")
    if view.part.startswith(HEAD):
        return f"{tap.name}.head.{view.part.removeprefix(HEAD)}"
    return tap.name + {ATTENTION: ".attention", PERCEPTRON: ".mlp"}.get(view.part, "")


def part_choices(run: rl.Run) -> list[str]:
    """The parts that can be chosen."""
    config = run.flow.config
    return [*PARTS, *(f"{HEAD}{number}" for number in range(1, config.width // config.head_width + 1))]


def towards_choices(run: rl.Run) -> list[str]:
    """What a state can be moved towards."""
    return [*(run.classes if run.flow.config.classes else []), *(f"{COMPONENT}{k}" for k in range(1, N_COMPONENTS + 1))]


def towards_of(run: rl.Run, view: InterveneView) -> str:
    """What the state is moved towards; the first choice in runs that have no such class."""
    choices = towards_choices(run)
    return view.towards if view.towards in choices else choices[0]


def token_numbers(text: str) -> tuple[int, ...] | None:
    """ "0..3,7" as (0, 1, 2, 3, 7); None for all. Raises: LabError."""
    try:
        found = [number for part in text.split(",") if part.strip() for number in number_range(part.strip(), "tokens")]
    except ValueError:
        raise LabError(f"tokens {text!r} must be numbers and ranges such as 0..3,7") from None
    return tuple(dict.fromkeys(found)) or None


def fits_tokens(run: rl.Run, text: str) -> bool:
    """Whether a flow has the tokens of a text."""
    try:
        return max(token_numbers(text) or (0,)) < run.flow.config.tokens
    except LabError:
        return False


@dataclass(frozen=True, eq=False)
class Answer:
    """An intervention on the target."""

    target: Tensor  # (1, C, H, W) in [-1, 1]
    source: Tensor
    names: tuple[str, str]  # of both
    found: rl.Intervention
    what: str  # was done, in words


def answer_of(name: str, view: InterveneView) -> Answer:
    """The answer of a run of the page."""
    run = get_run(name)
    tokens = token_numbers(view.tokens)
    towards = towards_of(run, view) if view.action == STEER else ""
    return _answer(run, _place(view), view.action, part_name(run, view), tokens, view.strength, towards, view.keep)


class _Place(NamedTuple):
    """Where target and source come from."""

    generated: bool
    target: int
    source: int
    seed: int  # 0 for test images, which do not depend on it


def _place(view: InterveneView) -> _Place:
    generated = view.images == GENERATED
    return _Place(generated, view.target, view.source, view.seed if generated else 0)


def images_of(run: rl.Run, view: InterveneView) -> tuple[Tensor, tuple[str, str]]:
    """Target and source (2, C, H, W), and their names."""
    return _images(run, _place(view))


@lru_cache(maxsize=64)
def _images(run: rl.Run, place: _Place) -> tuple[Tensor, tuple[str, str]]:
    generated, target, source, seed = place
    if generated:
        seeds = [seed + target, seed + source]
        return rl.sample(run, seeds).images.clamp(-1, 1), (f"seed {seeds[0]}", f"seed {seeds[1]}")
    x, y = test_images(run)
    rows = [min(row, len(x) - 1) for row in (target, source)]
    names = [f"{image_word(run)} {row}" + (f", {run.classes[int(y[row])]}" if int(y[row]) >= 0 else "") for row in rows]
    return x[rows], (names[0], names[1])


@lru_cache(maxsize=32)
def vector_of(run: rl.Run, tap: str, towards: str) -> rl.SteeringVector:
    """The vector to steer along, of training images, or of samples where these are not at hand."""
    of: dict[str, Any] = {"images": rl.Images("train", limit=N_VECTOR_IMAGES)}
    if missing_data(run):
        of = {"protocol": rl.FeatureProtocol("reverse", samples=N_VECTOR_IMAGES, feed_label=True)}
    if towards.startswith(COMPONENT):
        return rl.steering_vector(run, tap, "component", component=int(towards.removeprefix(COMPONENT)), **of)
    return rl.steering_vector(run, tap, "class", label=towards, **of)


@lru_cache(maxsize=64)
def _answer(
    run: rl.Run, place: _Place, action: str, part: str, tokens: tuple[int, ...] | None, strength: float, towards: str, keep: str
) -> Answer:
    x, names = _images(run, place)
    given: dict[str, Any] = {"tokens": tokens, "direction": DIRECTIONS[keep], "noise": 0 if place.generated else None}
    x = x.to(run.device)
    if action == PATCH:
        found = rl.patch(run, x[1:], x[:1], part, strength, **given)
        what = f"{part} of {names[1]}"
    elif action == REMOVE:
        found, what = rl.ablate(run, x[:1], part, strength, **given), f"without {part}"
    else:
        if part not in {tap.name for tap in run.flow.resolve("*")}:
            raise LabError(
                f"a vector is computed at a layer, or at the tokens before a block, not at {part}: choose one of these"
            )
        vector = vector_of(run, part, towards)
        found, what = rl.steer(run, x[:1], part, vector, strength, **given), f"{part}: {vector.words}"
    return Answer(x[:1].cpu(), x[1:].cpu(), names, found, what)
