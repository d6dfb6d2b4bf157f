"""Named runs, as functions."""

from collections.abc import Callable
from pathlib import Path

from rrepa_lab.align.config import AlignConfig
from rrepa_lab.align.teacher import EncoderConfig
from rrepa_lab.data.config import DataConfig
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.tarflow.config import FlowConfig
from rrepa_lab.readers import MissingFileError, read_json, validate
from rrepa_lab.runs.config import RunConfig, TrainConfig
from rrepa_lab.runs.store import LARGEST_CONFIG

DIGITS_VIT = EncoderConfig(
    model="vit_tiny_patch16_224",
    weights="random",
    image_size=8,
    channels=1,
    args={"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4, "class_token": False, "global_pool": "avg"},
)

ALIGNED: tuple[str, ...] = ("none", "forward", "detach", "reverse")


def digits(strategy: str) -> RunConfig:
    """scikit-learn's 8x8 digits, a few minutes on two CPU cores.

    The augmentation and the stopping rule were chosen on the validation split (`studies.digits shifts`).
    """
    return RunConfig(
        name=f"digits-{strategy}",
        data=DataConfig(name="digits", image_size=8, channels=1, holdout=0.2, shift=1, shift_probability=0.25),
        flow=FlowConfig(image_size=8, channels=1, patch_size=2, width=64, blocks=4, layers=4, classes=10, noise_std=0.2),
        align=AlignConfig(strategy=strategy, blocks=[3, 4], layers=[2], weight=0.5, projector_width=256),
        encoder=DIGITS_VIT.override({"weights": "bundled:digits"}),
        train=TrainConfig(steps=1500, batch=64, lr=6e-3, warmup=50, ema_decay=0.99, keep="nats_per_dim", patience=3),
    )


def imagefolder_tiny(strategy: str) -> RunConfig:
    """Any image folder at 32x32 in 64 tokens, a few minutes on two CPU cores; set data.path. Demo size: blurred shapes.

    The aligned ones take an encoder of `rrepa-lab encoder train --data`, by `--encoder DIR`.
    """
    config = _photographs("imagefolder-tiny", strategy, size=32, patch=4, width=64, blocks=4, layers=3, classes=-1, steps=600)
    return config.override(
        {
            "data.holdout": 0.1, "flow.noise_std": 0.1, "align.weight": 0.5, "align.projector_width": 256,
            "train.batch": 32, "train.lr": 2e-3, "train.warmup": 50, "train.ema_decay": 0.99, "train.keep": "nats_per_dim",
            "train.log_every": 20, "train.eval_every": 100, "train.save_every": 200,
        }
    )  # fmt: skip


def imagefolder(strategy: str) -> RunConfig:
    """Any image folder at 32x32, a middle size to start from; set data.path."""
    config = _photographs("imagefolder", strategy, size=32, patch=2, width=256, blocks=8, layers=4, classes=-1, steps=50_000)
    return config.override({"data.holdout": 0.1})


def imagenet64(strategy: str) -> RunConfig:
    """The paper's setting: ImageNet at 64x64, blocks 7 and 8 at layer 6, DINOv2-B, batch 256, lr 1e-4; set data.path.

    Linear warm-up, the cosine decay of the learning rate and the limit of the gradient norm are ours: the paper names none.
    """
    return _photographs("imagenet64", strategy, size=64, patch=4, width=1024, blocks=8, layers=8, classes=1000, steps=400_000)


def _photographs(
    name: str, strategy: str, size: int, patch: int, width: int, blocks: int, layers: int, classes: int, steps: int
) -> RunConfig:
    return RunConfig(
        name=f"{name}-{strategy}",
        data=DataConfig(name="folder", image_size=size, channels=3, flip=True),
        flow=FlowConfig(
            image_size=size, channels=3, patch_size=patch, width=width, blocks=blocks, layers=layers, classes=classes,
            noise_std=0.05,
        ),
        # counted from the end, so that they hold for other sizes too
        align=AlignConfig(strategy=strategy, blocks=[-2, -1], layers=[layers * 3 // 4 - layers - 1], weight=0.1),
        encoder=EncoderConfig(),
        train=TrainConfig(
            steps=steps, batch=256, lr=1e-4, warmup=1000, ema_decay=0.9999,
            log_every=50, eval_every=5000, save_every=5000,
        ),
    )  # fmt: skip


_FAMILIES: dict[str, Callable[[str], RunConfig]] = {
    "digits": digits,
    "imagefolder-tiny": imagefolder_tiny,
    "imagefolder": imagefolder,
    "imagenet64": imagenet64,
}


def names() -> list[str]:
    """Every preset: family and strategy."""
    return [f"{family}-{strategy}" for family in _FAMILIES for strategy in ALIGNED]


def preset(name: str) -> RunConfig:
    """The configuration of this name; LabError with the nearest name if there is none.

    Example:
        >>> preset("imagenet64-reverse").align.place
        'on blocks -2,-1 at layer -3'
    """
    family, _, strategy = name.rpartition("-")
    if family not in _FAMILIES or strategy not in ALIGNED:
        raise unknown("preset", name, names())
    return _FAMILIES[family](strategy)


def read_config(source: str | Path | RunConfig) -> RunConfig:
    """A configuration from a preset's name, the path of a config.json (bare or of a run), or itself."""
    if isinstance(source, RunConfig):
        return source
    if str(source).endswith(".json") or Path(source).is_file():
        return config_file(Path(source))
    return preset(str(source))


def config_file(path: Path) -> RunConfig:
    """A RunConfig from a JSON file: a run's config.json, or its `config` part alone."""
    try:
        values = read_json(path, LARGEST_CONFIG)
    except MissingFileError:
        raise LabError(f"no configuration at {path}") from None
    if "format" in values and "config" in values:
        return validate(RunConfig, values["config"], str(path), stored=True)
    return validate(RunConfig, values, str(path))
