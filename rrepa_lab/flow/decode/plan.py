"""How a flow is decoded fastest on a kind of device."""

from pydantic import Field

from rrepa_lab.config import Config


class DecodePlan(Config):
    """How a flow is best decoded on one kind of device, found by `rl.calibrate`."""

    device: str = Field("cpu", description="cpu or cuda")
    windows: list[int] = Field([], description="jacobi: tokens read at once in each block, block 1 first")
    upto: int = Field(0, ge=0, description="auto: jacobi up to so many images times branches of the guidance, above it cached")
