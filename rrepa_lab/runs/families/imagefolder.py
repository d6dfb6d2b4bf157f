"""Any image folder; set data.path."""

from rrepa_lab.data.config import DataConfig
from rrepa_lab.runs.config import RunConfig
from rrepa_lab.runs.families.family import TINY_ALIGN, TINY_FLOW, TINY_TRAIN, Family, run_config


def _data(size: int) -> DataConfig:
    return DataConfig(name="folder", image_size=size, channels=3, flip=True, holdout=0.1)


def tiny(strategy: str) -> RunConfig:
    """Any image folder at 32x32 in 64 tokens. Demo size: blurred shapes.

    The aligned ones take an encoder of `rrepa-lab encoder train --data`, by `--encoder DIR`.
    """
    flow = {**TINY_FLOW, "patch_size": 4, "classes": -1, "noise_std": 0.1}
    config = run_config("imagefolder-tiny", _data(32), flow, strategy=strategy, train=TINY_TRAIN)
    return config.override(TINY_ALIGN)


def middle(strategy: str) -> RunConfig:
    """Any image folder at 32x32, a middle size to start from."""
    flow = {"patch_size": 2, "width": 256, "blocks": 8, "layers": 4, "classes": -1}
    return run_config("imagefolder", _data(32), flow, strategy=strategy, train={"steps": 50_000})


FAMILIES = {
    "imagefolder-tiny": Family(tiny, "any image folder at 32x32, demo size, minutes on two cores"),
    "imagefolder": Family(middle, "any image folder at 32x32, a middle size for one GPU"),
}
