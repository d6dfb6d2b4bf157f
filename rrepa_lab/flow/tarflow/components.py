"""Parts of a block that can be read or changed while it computes, by name.

| name | state, (B, T, d) in image token order |
|---|---|
| `block.3.layer.2` | the residual stream after layer 2 of block 3, d = D; the tap of this name |
| `block.3.layer.2.attention`, `.mlp` | what that part of the layer adds to it, d = D |
| `block.3.layer.2.head.1` | the output of one head before the projection, d = D / heads |
| `block.3` | what the block predicts: alpha and mu, of the next token in the block's order, side by side, d = 2 P |

Blocks, layers and heads count from 1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rrepa_lab.errors import LabError
from rrepa_lab.flow.contract import FlowModel
from rrepa_lab.flow.taps import depth_words
from rrepa_lab.flow.tarflow.block import AffineBlock
from rrepa_lab.flow.tarflow.transformer import Layer

Change = Callable[[Tensor], Tensor]  # the state of a component (B, T, d) -> what takes its place
SUBLAYERS = ("attention", "mlp")


class Component(NamedTuple):
    """One name of the table above; numbers count from 1."""

    block: int
    layer: int | None = None
    sublayer: str = ""  # "attention" or "mlp"
    head: int | None = None

    @property
    def name(self) -> str:
        """As it is typed."""
        parts = [f"block.{self.block}"]
        parts += [] if self.layer is None else [f"layer.{self.layer}"]
        parts += [] if self.head is None else [f"head.{self.head}"]
        return ".".join([*parts, self.sublayer] if self.sublayer else parts)


def components(flow: FlowModel) -> list[Component]:
    """All parts of a flow, from the image to the noise: blocks, their layers, the sublayers and heads of these.

    Raises: LabError for a flow of another family than TARFlow.
    """
    found = []
    for number in range(1, flow.config.blocks + 1):
        found.append(Component(number))
        for index, layer in enumerate(affine_block(flow, number).transformer.layers, start=1):
            heads = range(1, cast(Layer, layer).attention.heads + 1)
            found += [Component(number, index), *(Component(number, index, sublayer) for sublayer in SUBLAYERS)]
            found += [Component(number, index, head=head) for head in heads]
    return found


def resolve_components(flow: FlowModel, patterns: Sequence[str]) -> list[Component]:
    """The parts that names or glob patterns ("block.3.layer.*.head.1") stand for, in flow order, each once.

    Raises: LabError when a pattern matches nothing.
    """
    known = {one.name: one for one in components(flow)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            forms = "block.<t>, block.<t>.layer.<l>, or that with .attention, .mlp or .head.<h>"
            size = depth_words(flow.config.blocks, flow.config.layers)
            heads = max(one.head or 0 for one in known.values())
            raise LabError(f"this flow has no part {pattern!r}; write {forms} (it has {size}, {heads} heads, counted from 1)")
    return [one for name, one in known.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]


def affine_block(flow: FlowModel, number: int) -> AffineBlock:
    """A block of a TARFlow; LabError for one of another family."""
    block = flow.block(number)
    if not isinstance(block, AffineBlock):
        raise LabError(f"parts of blocks are known for TARFlow alone, not for {type(flow).__name__}")
    return block


class Edit(NamedTuple):
    """A change of the state of one component.

    With `update` the change of a layer is that of what it adds to the residual stream, not of the stream itself.
    """

    component: Component
    change: Change
    update: bool = False


@contextmanager
def edited(block: AffineBlock, edits: Sequence[Edit]) -> Iterator[None]:
    """Within it the block computes with these changes; afterwards it is as before.

    The changes act on passes over all tokens at once (`affine`, `encode`, `features`), not on decoding token by token.
    """
    with ExitStack() as stack:
        for edit in edits:
            stack.callback(_attach(block, edit).remove)
        yield


def _attach(block: AffineBlock, edit: Edit) -> RemovableHandle:
    component, order = edit.component, block.to_block_order

    def changed(state: Tensor) -> Tensor:
        return order(edit.change(order(state)))

    if component.layer is None:
        return block.proj_out.register_forward_hook(lambda _module, _inputs, out: changed(out))
    layer = cast(Layer, block.transformer.layers[component.layer - 1])
    if component.head is not None:
        width = layer.attention.head_width
        part = slice((component.head - 1) * width, component.head * width)

        def change_head(_module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
            heads = inputs[0].clone()
            heads[..., part] = changed(heads[..., part])
            return (heads,)

        return layer.attention.proj.register_forward_pre_hook(change_head)

    def change_output(_module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return inputs[0] + changed(out - inputs[0]) if edit.update and not component.sublayer else changed(out)

    return (getattr(layer, component.sublayer) if component.sublayer else layer).register_forward_hook(change_output)
