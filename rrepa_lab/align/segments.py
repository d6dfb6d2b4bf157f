"""Features for `detach` and `reverse` from the encoding pass alone: no second forward pass, no second set of activations.

The pseudo-reverse pass needs, block by block, what the encoding pass has just computed: only its gradient differs.
So each block from the lowest aligned one up starts from a detached leaf. Its graph is then a segment of which several
vector-Jacobian products (VJPs) can be taken, with other cotangents:

(a) from the last block to the first, the likelihood's cotangent to the LEAF: the upstream cotangent of the block below;
(b) from the first block to the last, for `reverse`, the features' cotangent to the LEAF, added to c, the cotangent of the
    rebuilt tokens;
(c) one VJP to the PARAMETERS, with the sum of all cotangents: on the block's output the likelihood's minus c * exp(alpha)
    (the same as c sent through mu and alpha), on alpha the likelihood's, on the features their own. Then c becomes
    c * exp(alpha), the cotangent of the rebuilt tokens of the next block.

The gradients are those of the strategies' own passes (`Strategy.passes`), which make a second one: tests hold them to
1e-10 in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rrepa_lab.align.strategy import FeaturePass, Features, by_block, by_tap
from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import Block, FlowModel, FlowOutput
from rrepa_lab.flow.taps import Tap


@dataclass
class _Segment:
    """One block's part of the graph."""

    leaf: Tensor  # (B, T, P) the input tokens
    z: Tensor  # (B, T, P) the output tokens
    alpha: Tensor  # (B, T, P)
    features: list[Tensor]  # (B, T, D) each
    parameters: list[nn.Parameter]

    def vjp(
        self, wanted: list[Any], z: Tensor | None, alpha: Tensor | None, features: list[Tensor | None], keep: bool
    ) -> list[Any]:
        """Gradients of the wanted tensors for these cotangents, None where nothing arrives."""
        pairs: list[tuple[Tensor, Tensor | None]] = [
            (self.z, z),
            (self.alpha, alpha),
            *zip(self.features, features, strict=True),
        ]
        pairs = [(out, cotangent) for out, cotangent in pairs if cotangent is not None and out.requires_grad]
        if not pairs or not wanted:
            return [None] * len(wanted)
        outputs, cotangents = zip(*pairs, strict=True)
        return list(torch.autograd.grad(outputs, wanted, cotangents, retain_graph=keep, allow_unused=True))


class _Segments(torch.autograd.Function):
    """Encode by the blocks given; (tokens, *parameters) -> (z, logdet, *features)."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: list[tuple[Block, Condition, list[int]]],
        reverse: bool,
        tokens: Tensor,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, ...]:
        segments: list[_Segment] = []
        z, logdet = tokens, tokens.new_zeros(len(tokens))
        for block, condition, layers in blocks:
            leaf = z.detach().requires_grad_()
            with torch.enable_grad():
                mu, alpha, states = block(block.affine, leaf, condition, layers)
                z = (leaf - mu) * torch.exp(-alpha)
            logdet = logdet - alpha.detach().sum(dim=(1, 2))
            own = [parameter for parameter in block.parameters() if parameter.requires_grad]
            segments.append(_Segment(leaf, z, alpha, [states[layer] for layer in layers], own))
        ctx.segments, ctx.reverse = segments, reverse
        ctx.set_materialize_grads(False)
        return z.detach(), logdet, *(state.detach() for segment in segments for state in segment.features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, z: Tensor | None, logdet: Tensor | None, *features: Tensor | None) -> tuple[Tensor | None, ...]:
        segments: list[_Segment] = ctx.segments
        if not segments:
            raise RuntimeError("the backward pass of an aligned step can run once: retain_graph does not keep its segments")
        ctx.segments = []
        alpha = None if logdet is None else -logdet[:, None, None].expand_as(segments[0].alpha)
        given = list(features)
        upstream, outputs = z, list[Tensor | None]()
        gradients: dict[int, list[Any]] = {}
        for number in range(len(segments) - 1, -1, -1):  # (a)
            segment = segments[number]
            outputs.insert(0, upstream)
            leaf = [segment.leaf] if number or ctx.needs_input_grad[2] else []
            none: list[Tensor | None] = [None] * len(segment.features)
            if ctx.reverse or segment.features:
                (upstream,) = segment.vjp(leaf, upstream, alpha, none, keep=True) or [None]
            else:
                upstream, *gradients[number] = segment.vjp(
                    [segment.leaf, *segment.parameters], upstream, alpha, none, keep=False
                )
        rebuilt: Tensor | None = None
        for number, segment in enumerate(segments):
            if number in gradients:
                continue
            mine, given = given[: len(segment.features)], given[len(segment.features) :]
            output = outputs[number]
            if ctx.reverse:
                if any(cotangent is not None for cotangent in mine):  # (b)
                    (added,) = segment.vjp([segment.leaf], None, None, mine, keep=True)
                    rebuilt = added if rebuilt is None else rebuilt + added
                if rebuilt is not None:
                    rebuilt = rebuilt * torch.exp(segment.alpha.detach())
                    output = -rebuilt if output is None else output - rebuilt
            gradients[number] = segment.vjp(segment.parameters, output, alpha, mine, keep=False)  # (c)
        return None, None, upstream, *(gradient for number in range(len(segments)) for gradient in gradients[number])


def encode_with_features(
    flow: FlowModel, x: Tensor, condition: Condition, layers: Mapping[int, set[int]], reverse: bool
) -> tuple[FlowOutput, dict[int, dict[int, Tensor]]]:
    """Encode images (B, C, H, W), and the features of layers, block -> layer -> (B, T, D), that go with it.

    Args:
        condition: no gradient reaches its class weights from the aligned blocks.
        layers: block -> the layers whose features are wanted.
        reverse: the features' gradient is that of the pseudo-reverse pass; else it stays in their own block, and does
            not go below its features (`detach`).

    The encoding is an ordinary one: `z` and `logdet` are differentiable in x and in all parameters.
    """
    lowest = min(number for number, wanted in layers.items() if wanted)
    tokens, logdet = flow.encode_blocks(flow.tokenize(x), condition, range(1, lowest))
    numbers = range(lowest, flow.config.blocks + 1)
    blocks = [(flow.block(t), condition.of_block(t), sorted(layers.get(t, ()))) for t in numbers]
    parameters = [parameter for block, _, _ in blocks for parameter in block.parameters() if parameter.requires_grad]
    z, term, *features = _Segments.apply(blocks, reverse, tokens, *parameters)
    found: dict[int, dict[int, Tensor]] = {}
    for number, (_, _, wanted) in zip(numbers, blocks, strict=True):
        for layer in wanted:
            found.setdefault(number, {})[layer] = features.pop(0)
    return FlowOutput(z, logdet + term, {}), found


def segmented(reverse: bool) -> FeaturePass:
    """The one-pass form of `reverse` or of `detach`, for `Strategy`."""

    def one_pass(flow: FlowModel, x: Tensor, condition: Condition, taps: list[Tap], refinements: int) -> Features:
        encoded, found = encode_with_features(flow, x, condition, by_block(taps), reverse)
        return Features(encoded, by_tap(found, taps))

    return one_pass
