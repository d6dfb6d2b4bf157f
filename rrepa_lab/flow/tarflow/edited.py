"""A flow with changes inside its blocks is a flow again: invertible, with an exact density.

A change of the state of token i moves mu and alpha of the tokens after i alone. So a block with changes is still z = (x - mu) *
exp(-alpha) with mu and alpha of a token from the tokens before it: it is inverted token by token, and its log-determinant is
minus the sum of alpha. This holds for changes that are constants, or act on each token by itself.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from rrepa_lab.flow.condition import Condition
from rrepa_lab.flow.contract import Affine, BlockOutput, FlowModel, InverseOutput
from rrepa_lab.flow.decode.jacobi import decode_windows
from rrepa_lab.flow.finite import NotFiniteError, cause, check_rows, listed, rows_not_finite
from rrepa_lab.flow.stack import BlockFlow
from rrepa_lab.flow.taps import Taps
from rrepa_lab.flow.tarflow.block import AffineBlock
from rrepa_lab.flow.tarflow.components import Edit, affine_block, edited

P = ParamSpec("P")
R = TypeVar("R")


class EditedBlock(nn.Module):
    """A block that computes with changes of its components.

    Args:
        block: shared, not copied; outside of a call it is as before.
        edits: changes of components of this block.
    """

    def __init__(self, block: AffineBlock, edits: Sequence[Edit]) -> None:
        super().__init__()
        self.block, self.edits = block, list(edits)

    def forward(self, operation: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """What an operation on this block returns; see `flow.contract.Block`."""
        return operation(*args, **kwargs)

    def affine(self, x: Tensor, condition: Condition, keep: Collection[int] = ()) -> Affine:
        """As `AffineBlock.affine`, with the changes."""
        with edited(self.block, self.edits):
            return self.block(self.block.affine, x, condition, keep)

    def encode(self, x: Tensor, condition: Condition, keep: Collection[int] = ()) -> BlockOutput:
        """As `AffineBlock.encode`, with the changes."""
        with edited(self.block, self.edits):
            return self.block(self.block.encode, x, condition, keep)

    def features(self, x: Tensor, condition: Condition, layers: Collection[int]) -> dict[int, Tensor]:
        """As `AffineBlock.features`, with the changes."""
        with edited(self.block, self.edits):
            return self.block(self.block.features, x, condition, layers)

    @torch.no_grad()
    def invert(self, z: Tensor, condition: Condition, keep: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Generate: (B, T, P) -> x (B, T, P) and layer outputs; no graph.

        By Jacobi iteration on all tokens: after k iterations the first k are exact, so T suffice, and it ends earlier once
        nothing changes by more than rounding. Without changes token by token with a cache.
        """
        x = self._jacobi(z, condition) if self.edits else self.block(decode_windows, self.block, z, condition).tokens
        return x, self.features(x, condition, keep) if keep else {}

    def _jacobi(self, z: Tensor, condition: Condition) -> Tensor:
        x, new = z, z
        for _ in range(z.shape[1]):
            mu, alpha, _ = self.affine(x, condition)
            new = mu + torch.exp(alpha) * z
            if bool(((new - x).abs() <= 4 * torch.finfo(x.dtype).eps * x.abs().clamp(min=1)).all()):
                break
            x = torch.where(new.isfinite(), new, x)  # a guess that overflows would spoil tokens that do not depend on it
        return new

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Those of the block."""
        return self.block.parameter_groups()


class EditedFlow(BlockFlow):
    """A flow that computes with changes inside its blocks; encoding, decoding and density are those of the changed map.

    Args:
        flow: a TARFlow, whose weights are shared.
        edits: the changes.

    Example:
        >>> from rrepa_lab.flow.tarflow.components import Component
        >>> from rrepa_lab.flow.tarflow.config import FlowConfig
        >>> from rrepa_lab.flow.tarflow.model import TarFlow
        >>> flow = TarFlow(FlowConfig(classes=10))
        >>> without = EditedFlow(flow, [Edit(Component(3, layer=2, head=1), torch.zeros_like)])
        >>> without.log_prob(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2])
    """

    def __init__(self, flow: FlowModel, edits: Sequence[Edit]) -> None:
        super().__init__(flow.config)
        self.register_buffer("prior_var", flow.prior_var, persistent=False)
        self.blocks = nn.ModuleList()
        for number in range(1, flow.config.blocks + 1):
            own = [edit for edit in edits if edit.component.block == number]
            self.blocks.append(EditedBlock(affine_block(flow, number), own))

    @torch.no_grad()
    def inverse(
        self,
        z: Tensor,
        y: Tensor | Condition | None = None,
        guidance: float = 0.0,
        annealed: bool = False,
        temperature: float = 1.0,
        method: Any = "auto",
        taps: Taps = (),
        *,
        progress: Any = None,
    ) -> InverseOutput:
        """As `TarFlow.inverse`, without a graph, see `EditedBlock.invert`.

        `method` and `progress` have no effect.
        """
        self.check_noise(z)
        wanted = self.resolve(taps)
        check_rows(z, "noise")

        def check(number: int, tokens: Tensor) -> None:
            rows = rows_not_finite(tokens)
            if rows:
                what = f"numbers stop being finite in block {number} while generating, in row {listed(rows)} of {len(z)}"
                raise NotFiniteError(f"{what}: the change is too large, or {cause(self)}", rows, number)

        condition = self.condition(y, len(z), guidance, annealed, temperature)
        return self.invert_blocks(z, condition, wanted, check)._replace(method="jacobi")
