"""What a flow gives back, and the protocols that a family of flows follows.

Shapes: B images of C channels and H x W; T tokens of P numbers; D width; K classes; blocks t = 1..N from the image to the
noise. A family needs a class with the methods of `FlowModel`, most of which `flow.stack.BlockFlow` has, and blocks with those
of `Block`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

from torch import Tensor, nn

from rrepa_lab.flow.condition import Condition, Guidance
from rrepa_lab.flow.taps import Depths, Tap, Taps

P = ParamSpec("P")
R = TypeVar("R")


class FlowOutput(NamedTuple):
    """An encoded batch.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> x, y = run.data("test", 2)
        >>> z, logdet, states = run.flow(x, y, taps="block.*.out")
        >>> z.shape, logdet.shape, len(states)
        (torch.Size([2, 16, 4]), torch.Size([2]), 4)
    """

    z: Tensor  # (B, T, P), image token order
    logdet: Tensor  # (B,) nats, log |det dz/dx|, summed over T and P
    states: dict[str, Tensor]  # tap -> (B, T, D), or (B, T, P) for block.<t>.in and .out


class InverseOutput(NamedTuple):
    """A generated batch.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-reverse")
        >>> x, y = run.data("test", 2)
        >>> made = run.flow.inverse(run.flow(x, y).z, y, method="jacobi")
        >>> made.method, made.error < 1e-5, bool((made.x - x).abs().max() < 1e-3)
        ('jacobi', True, True)
    """

    x: Tensor  # (B, C, H, W)
    states: dict[str, Tensor]  # as in FlowOutput, recorded while generating
    method: str = "sequential"  # that it was decoded by
    iterations: tuple[
        int, ...
    ] = ()  # passes of the Transformer in each block, block 1 first; the most of any part of the batch
    error: float | None = None  # largest change of a number under one more Jacobi iteration, where it was measured


class Affine(NamedTuple):
    """mu and alpha of every token, (B, T, P) in image order, and the layer outputs that were requested, (B, T, D)."""

    mu: Tensor
    alpha: Tensor
    states: dict[int, Tensor]


class BlockOutput(NamedTuple):
    """Tokens that a block has encoded."""

    z: Tensor  # (B, T, P)
    logdet: Tensor  # (B,) nats
    states: dict[int, Tensor]  # layer -> (B, T, D)


class ParameterGroup(NamedTuple):
    """Parameters of one part of a flow."""

    name: str  # block.<t>.in, block.<t>.layer.<l>, block.<t>.out
    block: int
    parameters: list[nn.Parameter]


class Block(Protocol):
    """An invertible affine block: z = (x - mu) * exp(-alpha), where mu and alpha come from other tokens and the condition.

    Its parameters are used within a call of it alone: `block(block.affine, x, condition)`. The hooks of a module fire on a
    call, so that sharded parameters (FSDP) are gathered before an operation and freed after it. Tokens are in image order,
    whatever order the block works in; conditions are those of one block (`Condition.of_block`).
    """

    def __call__(self, operation: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """What the operation returns: a method of the block, or a function of it."""
        ...

    def encode(self, x: Tensor, condition: Condition, keep: Collection[int] = ()) -> BlockOutput:
        """Tokens (B, T, P) towards the noise, and the outputs of the layers in `keep`."""
        ...

    def affine(self, x: Tensor, condition: Condition, keep: Collection[int] = ()) -> Affine:
        """mu and alpha of all tokens in one parallel pass, given all tokens on the image side (B, T, P)."""
        ...

    def features(self, x: Tensor, condition: Condition, layers: Collection[int]) -> dict[int, Tensor]:
        """Outputs (B, T, D) of these layers for tokens on the image side (B, T, P), of the conditional branch."""
        ...

    def invert(self, z: Tensor, condition: Condition, keep: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Tokens (B, T, P) towards the image, and the outputs of the layers in `keep`; exact and differentiable."""
        ...

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters, by part in the order of computation: in, layer.<l>, out."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As `nn.Module.parameters`."""
        ...


class Geometry(Protocol):
    """The sizes of a flow; a family's configuration has more."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def tokens(self) -> int:
        """T."""
        ...

    @property
    def token_size(self) -> int:
        """P."""
        ...

    @property
    def side(self) -> int:
        """Tokens along one edge of the image."""
        ...

    @property
    def dims(self) -> int:
        """T * P = C * H * W."""
        ...

    @property
    def width(self) -> int:
        """D."""
        ...

    @property
    def blocks(self) -> int:
        """N."""
        ...

    @property
    def layers(self) -> Depths:
        """Of every block, or of each block."""
        ...

    @property
    def classes(self) -> int:
        """K, 0 for none."""
        ...

    @property
    def noise(self) -> str:
        """Of the training: gaussian or uniform."""
        ...

    @property
    def noise_std(self) -> float:
        """Sigma of gaussian noise."""
        ...


class FlowModel(Protocol):
    """An exact, invertible map between images and noise, in blocks."""

    @property
    def config(self) -> Geometry:
        """Sizes."""
        ...

    @property
    def prior_var(self) -> Tensor | None:
        """(T, P) variance of the noise, None where it is 1."""
        ...

    def __call__(self, x: Tensor, y: Tensor | Condition | None = None, taps: Taps = ()) -> FlowOutput:
        """Encode images (B, C, H, W)."""
        ...

    def log_prob(self, x: Tensor, y: Tensor | Condition | None = None) -> Tensor:
        """(B,) nats."""
        ...

    def inverse(
        self,
        z: Tensor,
        y: Tensor | Condition | None = None,
        *,
        method: Any = "auto",
        taps: Taps = (),
        progress: Any = None,
    ) -> InverseOutput:
        """Generate images from noise (B, T, P)."""
        ...

    def encode_blocks(self, tokens: Tensor, condition: Condition, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, P) through these blocks alone, and their logdet (B,) in nats."""
        ...

    def block(self, number: int) -> Block:
        """The block with this number, from 1 at the image."""
        ...

    def tokenize(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, P)."""
        ...

    def untokenize(self, tokens: Tensor) -> Tensor:
        """(B, T, P) -> (B, C, H, W)."""
        ...

    def condition(self, y: Tensor | Condition | None, batch: int, guidance: float | Guidance = 0.0) -> Condition:
        """Labels in any form as class weights."""
        ...

    def check_shape(self, x: Tensor) -> None:
        """LabError unless x is (B, C, H, W) of this flow."""
        ...

    def check_noise(self, z: Tensor) -> None:
        """LabError unless z is (B, T, P) of this flow."""
        ...

    def resolve(self, taps: Taps) -> list[Tap]:
        """The taps that names or glob patterns stand for."""
        ...

    def parameter_groups(self) -> list[ParameterGroup]:
        """All parameters, by block and part."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As `nn.Module.parameters`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As `nn.Module.state_dict`."""
        ...
