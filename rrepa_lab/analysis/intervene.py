"""Interventions: a state of a flow is exchanged, moved or removed, and the answer is exact.

An intervention inside a block (`flow.tarflow.components`) gives a flow again, p' beside the flow's own p: invertible, with an
exact density. So both directions have an answer:

| direction | what is kept | picture | change of log p |
|---|---|---|---|
| reverse | the noise z of the image x | x' that p' generates from z | log p(x') - log p(x): how probable the flow finds it |
| forward | the image x | what p generates from the noise z' of x under p' | log p'(x) - log p(x): what it is worth for x |

The tokens between two blocks (`block.<t>.in` and `.out`) determine image and noise: a change of them gives one image x' in both
directions, and log p(x') - log p(x) by the flow itself.

Source: activation patching, arXiv 2202.05262 (there without a density); steering, arXiv 2308.10248.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor

from rrepa_lab.analysis.noise import NoiseSamples, image_noise
from rrepa_lab.analysis.steering import SteeringVector
from rrepa_lab.analysis.trace import DIRECTIONS, Trace, trace
from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.data.images import Batch
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.decode.plan import Decoding
from rrepa_lab.flow.finite import NotFiniteError, cause, check_rows, listed, rows_not_finite
from rrepa_lab.flow.inputs import as_condition
from rrepa_lab.flow.likelihood import prior_log_prob
from rrepa_lab.flow.taps import Taps
from rrepa_lab.flow.tarflow.components import Change, Component, Edit, resolve_components
from rrepa_lab.flow.tarflow.edited import EditedFlow
from rrepa_lab.flow.tarflow.model import TarFlow
from rrepa_lab.runs.inputs import encoded, for_flow, space_of
from rrepa_lab.runs.run import Run, flow_of


@dataclass(frozen=True)
class Intervention:
    """What an intervention changes; B images, N blocks.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> found = rl.ablate(run, run.data("test", 2).x, "block.3.layer.2.head.1")
        >>> found.images.shape, found.delta_log_prob.shape, found.delta_by_block.shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2]), torch.Size([2, 4]))
    """

    images: Tensor  # (B, C, H, W) pictures afterwards, not clipped; see the table of `analysis.intervene`
    before: Trace  # the pass without it
    after: Trace  # the pass with it; `error` is that of its round trip
    delta_by_block: Tensor  # (B, N) nats, change of each block's log-determinant
    delta_prior: Tensor  # (B,) nats, change of the log density of the noise
    run: Run | FlowModel = field(repr=False)  # with the intervention in it, for other instruments; tokens: as it was

    @property
    def states(self) -> dict[str, Tensor]:
        """The recorded states with the intervention, tap -> (B, T, D) or (B, T, P)."""
        return self.after.states

    @property
    def delta_log_prob(self) -> Tensor:
        """Change of log p (B,) in nats: the sum over blocks and the prior."""
        return self.delta_by_block.sum(dim=1) + self.delta_prior

    @property
    def round_trip(self) -> Tensor:
        """(B,) largest difference of a number after going back through the same map."""
        return self.after.error


@dataclass(frozen=True)
class _Subject:
    """The images of an intervention, and the pass it is made in."""

    run: Run | FlowModel
    x: Tensor  # (B, *shape) what the flow takes
    condition: Condition
    direction: str
    record: Taps

    @classmethod
    def of(
        cls, run: Run | FlowModel, x: Tensor, y: Any, direction: str, noise: int | NoiseSamples | None, record: Taps
    ) -> "_Subject":
        if direction not in DIRECTIONS:
            raise unknown("direction", direction, DIRECTIONS)
        flow, given = flow_of(run), encoded(run, x)
        if not len(given):
            raise LabError("there are no images to intervene on")
        seen = for_flow(flow, next(image_noise(run, noise).views(given)))
        classes = run.classes if isinstance(run, Run) else None
        return cls(run, seen, as_condition(flow, y, len(seen), classes=classes), direction, record)

    @property
    def flow(self) -> FlowModel:
        return flow_of(self.run)

    @cached_property
    def z(self) -> Tensor:
        """The noise (B, T, P) of the images."""
        return self.flow(self.x, self.condition).z

    def tokens(self, block: int) -> Tensor:
        """The tokens (B, T, P) on the image side of a block."""
        return self.flow.encode_blocks(self.flow.tokenize(self.x), self.condition, range(1, block))[0]

    def answer(self, changed: FlowModel, x: Tensor, z: Tensor, images: Tensor | None = None) -> Intervention:
        """What changed between the flow on the images, and `changed` on x (B, *shape) with its noise z (B, T, P).

        Args:
            images: (B, *shape) to show; by default those of the pass.
        """
        run = self.run if changed is self.flow else _with_flow(self.run, changed)
        forward = self.direction == "forward"
        before = self._traced(self.run, self.x if forward else self.z, check=False)
        after = self._traced(run, x if forward else z)
        # under reverse the flow itself judges what was generated, under forward the changed one the image as it is
        by = changed if forward else self.flow
        generated = x if forward else for_flow(self.flow, after.x["block.1.in"])
        delta = log_prob_terms(by, generated, self.condition) - log_prob_terms(self.flow, self.x, self.condition)
        self.check(delta, "log p is")
        shown = space_of(self.run).show(images) if images is not None else after.images["block.1.in"]
        return Intervention(shown, before, after, delta[:, :-1], delta[:, -1], run)

    def check(self, numbers: Tensor, what: str) -> Tensor:
        """The numbers (B, ...) themselves; NotFiniteError where some are not finite."""
        bad = rows_not_finite(numbers)
        if bad:
            text = f"{what} not finite after the change, in row {listed(bad)} of {len(numbers)}"
            raise NotFiniteError(f"{text}: the change is too large, or {cause(self.flow)}", bad)
        return numbers

    def _traced(self, run: Run | FlowModel, source: Tensor, check: bool = True) -> Trace:
        """A pass of all images at once: a change may hold a state for each of them."""
        whole = Decoding(batch=len(self.x))
        return trace(run, source, self.condition, self.direction, self.record, method=whole, check=check)


def log_prob_terms(flow: FlowModel, x: Tensor, condition: Condition) -> Tensor:
    """Terms of log p of x (B, *shape), (B, N + 1) nats: the log-determinant of each block, then the density of the noise."""
    tokens, terms = flow.tokenize(x), []
    for number in range(1, flow.config.blocks + 1):
        tokens, logdet = flow.encode_blocks(tokens, condition, [number])
        terms.append(logdet)
    return torch.stack([*terms, prior_log_prob(tokens, flow.prior_var)], dim=1)


@torch.no_grad()
def patch(
    run: Run | FlowModel,
    source: Tensor | Batch,
    target: Tensor,
    taps: str | Sequence[str],
    strength: float = 1.0,
    *,
    y: Any = None,
    tokens: Collection[int] | None = None,
    direction: str = "reverse",
    noise: int | NoiseSamples | None = None,
    record: Taps = (),
) -> Intervention:
    """Put the states of source images in the place of those of target images.

    Args:
        run: a run or its flow.
        source: images (B, C, H, W) in [-1, 1] that states are taken from, one for all or one for each target; as a `Batch`
            with labels of their own, -1 for none, else with those of the targets.
        target: images whose pass is changed; x of the flow's own shape is taken as it is.
        taps: names or glob patterns of parts of blocks (`flow.tarflow.components`), or the tokens between two blocks,
            "block.<t>.in" or "block.<t>.out": these alone, since they determine all that follows.
        strength: s of (1 - s) target + s source: 1 exchanges the states, 0 changes nothing; any finite number.
        y: labels of the targets, as in `trace`; None is no label.
        tokens: numbers of the tokens whose states are exchanged, from 0, row by row; all by default.
        direction: "reverse" (the noise is kept) or "forward" (the image is kept), see `analysis.intervene`.
        noise: on the images, of which the first sample is taken, as in `classify`; 0 for none, as for generated x.
        record: taps to record with and without the intervention.

    Raises: LabError for a direction, tap, token or label that does not exist, a number of sources that is not that of the
        targets, and images as `trace`; NotFiniteError where numbers overflow.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> x = run.data("test", 2).x
        >>> found = rl.patch(run, x[:1], x[1:], "block.3.layer.2")
        >>> bool(found.delta_log_prob.abs() > 1), bool(found.round_trip < 1e-3)
        (True, True)
    """
    subject, giver = (
        _Subject.of(run, x, label, direction, noise, record)
        for x, label in ((target, y), (source.x, source.y) if isinstance(source, Batch) else (source, y))
    )
    if len(giver.x) not in (1, len(subject.x)):
        raise LabError(f"{len(giver.x)} source images for {len(subject.x)} targets: give one, or one for each")
    chosen = _token_mask(subject.flow, tokens)
    amount = real_number("strength", strength, -float("inf"))
    boundary, parts = _resolved(subject.flow, taps)
    if boundary is not None:
        return _moved(subject, boundary, _exchange(giver.tokens(boundary), chosen, amount))
    states = part_states(giver.flow, giver.x, giver.condition, parts)
    return _within(subject, [Edit(part, _exchange(states[part], chosen, amount)) for part in parts])


@torch.no_grad()
def steer(
    run: Run | FlowModel,
    x: Tensor,
    tap: str,
    vector: Tensor | SteeringVector,
    strength: float = 1.0,
    *,
    y: Any = None,
    tokens: Collection[int] | None = None,
    direction: str = "reverse",
    noise: int | NoiseSamples | None = None,
    record: Taps = (),
) -> Intervention:
    """Add a vector to the states of images.

    Args:
        x: images (B, C, H, W) in [-1, 1]; x of the flow's own shape is taken as it is.
        tap: one name as in `patch`.
        vector: (d,) for every token, or (T, d); or what `steering_vector` gives.
        strength: that the vector is multiplied by; any finite number.
        y, tokens, direction, noise, record: as in `patch`.

    Raises: LabError as `patch`, and for a vector of another shape or tap.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> vector = rl.steering_vector(run, "block.3.layer.2", "class", label=3)
        >>> rl.steer(run, run.data("test", 2).x, "block.3.layer.2", vector, 2.0).images.shape
        torch.Size([2, 1, 8, 8])
    """
    subject = _Subject.of(run, x, y, direction, noise, record)
    amount = real_number("strength", strength, -float("inf"))
    if isinstance(vector, SteeringVector):
        if vector.tap != tap:
            raise LabError(f"this vector is of {vector.tap}, not of {tap}")
        vector = vector.vector
    added = amount * for_flow(subject.flow, vector)
    check_rows(added[None], "a steering vector")
    boundary, parts = _resolved(subject.flow, tap)
    chosen = _token_mask(subject.flow, tokens)
    if len(parts) > 1:
        raise LabError(f"{tap} names {len(parts)} parts: steer one")
    states = part_states(subject.flow, subject.x[:1], subject.condition.rows(slice(1)), parts)
    count, size = states[parts[0]].shape[1:] if parts else (subject.flow.config.tokens, subject.flow.config.token_size)
    if added.shape not in ((size,), (count, size)):
        raise LabError(f"a vector at {tap} must be ({size},) or ({count}, {size}), not {tuple(added.shape)}")
    change = _shift(torch.where(chosen, added, 0.0))
    return _moved(subject, boundary, change) if boundary is not None else _within(subject, [Edit(parts[0], change)])


@torch.no_grad()
def ablate(
    run: Run | FlowModel,
    x: Tensor,
    parts: str | Sequence[str],
    strength: float = 1.0,
    *,
    mean: bool = False,
    y: Any = None,
    tokens: Collection[int] | None = None,
    direction: str = "forward",
    noise: int | NoiseSamples | None = None,
    record: Taps = (),
) -> Intervention:
    """Remove what parts of a flow compute: blocks, layers, attention, perceptrons or heads.

    A block without its prediction passes its tokens unchanged; a layer adds nothing to the residual stream.

    Args:
        x: images (B, C, H, W) in [-1, 1]; x of the flow's own shape is taken as it is.
        parts: names or glob patterns, `flow.tarflow.components`.
        strength: 1 removes all that they compute, 0 nothing; any finite number.
        mean: put the mean over these images, token by token, in the place of what is removed, instead of zero.
        y, tokens, direction, noise, record: as in `patch`; by default the images are kept, and `delta_log_prob` is what
            the parts are worth for them.

    Raises: LabError as `patch`.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> x, y = run.data("test", 8)
        >>> bool(rl.ablate(run, x, "block.1", y=y).delta_log_prob.mean() < 0)  # without it digits are less probable
        True
    """
    subject = _Subject.of(run, x, y, direction, noise, record)
    boundary, found = _resolved(subject.flow, parts)
    if boundary is not None:
        raise LabError("the tokens between blocks cannot be removed: ablate a block, or patch them")
    chosen = _token_mask(subject.flow, tokens)
    amount = real_number("strength", strength, -float("inf"))
    updates = part_states(subject.flow, subject.x, subject.condition, found, update=True)
    replacement = {part: state.mean(dim=0, keepdim=True) * float(mean) for part, state in updates.items()}
    return _within(subject, [Edit(part, _exchange(replacement[part], chosen, amount), update=True) for part in found])


def part_states(
    flow: FlowModel, x: Tensor, condition: Condition, parts: Sequence[Component], update: bool = False
) -> dict[Component, Tensor]:
    """The states (B, T, d) of parts of a flow for x (B, *shape); of layers with `update` what they add."""
    kept: dict[Component, Tensor] = {}

    def keep(part: Component, state: Tensor) -> Tensor:
        kept[part] = state
        return state

    EditedFlow(flow, [Edit(part, partial(keep, part), update) for part in parts])(x, condition)
    return kept


def _within(subject: _Subject, edits: list[Edit]) -> Intervention:
    """The answer to changes inside blocks."""
    flow, condition = EditedFlow(subject.flow, edits), subject.condition
    if subject.direction == "reverse":
        return subject.answer(flow, subject.x, subject.z)
    z = subject.check(flow(subject.x, condition).z, "the noise is")
    return subject.answer(flow, subject.x, z, subject.flow.inverse(z, condition).x)


def _moved(subject: _Subject, block: int, change: Change) -> Intervention:
    """The answer to a change of the tokens on the image side of a block."""
    changed, condition = change(subject.tokens(block)), subject.condition
    z, _ = subject.flow.encode_blocks(changed, condition, range(block, subject.flow.config.blocks + 1))
    subject.check(z, "the noise is")
    return subject.answer(subject.flow, subject.flow.inverse(z, condition).x, z)


def _with_flow(run: Run | FlowModel, flow: FlowModel) -> Run | FlowModel:
    return replace(run, flow=cast(TarFlow, flow), plan=None) if isinstance(run, Run) else flow


def _resolved(flow: FlowModel, names: str | Sequence[str]) -> tuple[int | None, list[Component]]:
    """The block on whose image side tokens lie, or parts of blocks; LabError for names of both, or of several such tokens."""
    patterns = [names] if isinstance(names, str) else list(names)
    if not patterns:
        raise LabError("name what is to be changed: a part of a block such as block.3.layer.2, or block.3.in")
    sides = [tap for tap in flow.resolve("*") if isinstance(tap.layer, str)]
    given = [tap for tap in sides if tap.name in patterns]
    if given:
        if len(patterns) > 1:
            raise LabError(f"{given[0].name} determines all other states: change it alone")
        return given[0].block + (given[0].layer == "out"), []
    return None, resolve_components(flow, patterns)


def _token_mask(flow: FlowModel, tokens: Collection[int] | None) -> Tensor:
    """(T, 1), true for the tokens with these numbers."""
    count = flow.config.tokens
    mask = torch.full((count, 1), tokens is None, device=next(flow.parameters()).device)
    if tokens is not None:
        numbers = [whole_number("token", number) for number in tokens]
        beyond = [number for number in numbers if number >= count]
        if beyond or not numbers:
            raise LabError(f"tokens {listed(beyond) or numbers} must be some of 0..{count - 1}")
        mask[numbers] = True
    return mask


def _exchange(by: Tensor, tokens: Tensor, strength: float) -> Change:
    """States of some tokens (T, 1) moved to `by` (1 or B, T, d): by nothing at strength 0, all the distance at 1."""

    def change(state: Tensor) -> Tensor:
        if len(by) not in (1, len(state)):
            raise LabError(f"this flow holds states of {len(by)} images: give it as many, not {len(state)}")
        return torch.where(tokens, torch.lerp(state, by.to(state.dtype), strength), state)

    return change


def _shift(added: Tensor) -> Change:
    """A vector (T, d) added."""
    return lambda state: state + added
