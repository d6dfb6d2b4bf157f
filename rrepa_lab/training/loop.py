"""The training loop: a generator of reports that leaves a loadable run directory behind at any moment."""

import json
import math
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from rrepa_lab.align.encoder import match_grid
from rrepa_lab.config import Config
from rrepa_lab.data.datasets import Batch, ImageSet, load_split, whole
from rrepa_lab.data.loaders import SeededBatches, generator, stream
from rrepa_lab.data.pixels import add_noise, dequantize
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_atomically
from rrepa_lab.flow.likelihood import HALF_LOG_2PI, nats_per_dim
from rrepa_lab.presets import preset
from rrepa_lab.runs import Run, RunConfig, build, load
from rrepa_lab.training.card import write_card
from rrepa_lab.training.objective import Losses, Objective
from rrepa_lab.training.records import Records
from rrepa_lab.training.schedule import ema_decay, learning_rate

# purposes of the random streams of a step, so that none shares its numbers with another
FLIP, NOISE, DROP = 2, 3, 4


@dataclass(frozen=True)
class StepReport:
    """What happened since the last report; losses are means over those steps."""

    step: int  # steps done, from 1
    steps: int  # steps planned
    loss: float  # L_nf + lambda * L_align
    nats_per_dim: float  # of training images under the training noise
    similarity: dict[str, float]  # aligned tap -> mean cosine with the encoder
    learning_rate: float
    grad_norm: float  # before clipping
    seconds: float  # since this call of train began
    remaining: float  # seconds, at the pace so far
    held_out_nats_per_dim: float | None = field(default=None)  # of averaged weights, when it was looked at


def train(
    source: str | Path | RunConfig,
    out: Path | str,
    *,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    device: str = "auto",
) -> Generator[StepReport, None, None]:
    """Train a run, yielding a `StepReport` every `train.report_every` steps.

    Started by `accelerate launch` or `torchrun`, the same call shares each batch among all processes. Closing the
    generator, or Ctrl-C, saves where it stands. On a CPU a resumed run gives the same numbers as one that was
    never interrupted.

    Args:
        source: a preset's name, a config.json, or a configuration.
        out: the run directory.
        settings: dotted overrides, {"train.steps": 200}.
        resume: go on with the run in `out`; `source` must then configure that run.
        device: "auto", "cpu" or "cuda".

    Raises: LabError before anything is written if the configuration, its data or its encoder cannot be used, and
        when a loss is not finite; the last checkpoint then stands.
    """
    config = read_config(source).override(settings or {})
    return _train(config, Path(out), resume, device)


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
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(f"no configuration at {path}") from None
    except ValueError as error:
        raise LabError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise LabError(f"{path} holds no configuration: it must be a JSON object")
    return RunConfig.from_dict(values["config"] if "format" in values and "config" in values else values)


def _train(config: RunConfig, out: Path, resume: bool, device: str) -> Generator[StepReport, None, None]:
    from accelerate import Accelerator

    if device not in ("auto", "cpu", "cuda"):
        raise LabError(f"unknown device {device!r}; known: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise LabError("device is cuda, but this torch sees no GPU; leave --device out, or see rrepa-lab doctor")
    settings = config.train
    images = load_split(config.data, "train")
    if config.flow.classes not in (0, len(images.classes)):
        raise LabError(f"flow.classes is {config.flow.classes}, but {config.data.name} has {len(images.classes)} classes")
    run, state = _begin(config, images, out, resume)

    accelerator = Accelerator(cpu=device == "cpu")
    objective = Objective(run.flow, run.projectors, config.align)
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    average = AveragedModel(objective, multi_avg_fn=partial(_lerp, limit=settings.ema))
    if state:
        objective.load_state_dict(state["objective"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    average.to(accelerator.device)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    teacher = run.encoder().to(accelerator.device) if config.align.taps else None
    averaged = cast(Objective, average.module)
    kept = Run(averaged.flow, config, run.classes, averaged.projectors, run.step, out)
    records = Records(out)
    look = _held_out(config, accelerator.device)

    def checkpoint() -> None:
        if accelerator.is_main_process:
            kept.step = step
            kept.save(out)
            parts = {"objective": objective.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            write_atomically(out / "train_state.pt", lambda path: torch.save({"step": step, **parts}, path))
            write_card(kept, records.table())

    step = run.step
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        records.rewind(step)
    if not state:
        checkpoint()
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = SeededBatches(len(images), settings.batch, settings.seed, step, settings.steps, rank, world)
    began, first, at_rest = time.perf_counter(), step, True
    sums = torch.zeros(3 + len(config.align.taps), device=accelerator.device)
    counted = 0
    try:
        for batch in stream(images, batches, settings.workers):
            x, y, target = _inputs(batch, config, images.levels, teacher, accelerator.device, (step, rank))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings.steps, settings.lr, settings.warmup, settings.lr_floor)
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                losses = wrapped(x, y, target)
            _check_finite(losses, step + 1)
            optimizer.zero_grad()
            accelerator.backward(losses.total)
            norm = accelerator.clip_grad_norm_(objective.parameters(), settings.clip)
            at_rest = False
            optimizer.step()
            average.update_parameters(objective)
            step += 1
            at_rest = True
            sums += torch.stack([losses.total, losses.flow, norm, *losses.similarity.values()]).detach()
            counted += 1
            if step % settings.save_every == 0 or step == settings.steps:
                checkpoint()
            if step % settings.report_every and step != settings.steps:
                continue
            loss, flow, norm_mean, *near = accelerator.reduce(sums / counted, "mean").tolist()
            seconds = time.perf_counter() - began
            looked = step % settings.look_every < settings.report_every or step == settings.steps
            report = StepReport(
                step=step,
                steps=settings.steps,
                loss=loss,
                nats_per_dim=flow + HALF_LOG_2PI,
                similarity=dict(zip(config.align.taps, near, strict=True)),
                learning_rate=optimizer.param_groups[0]["lr"],
                grad_norm=norm_mean,
                seconds=seconds,
                remaining=seconds / (step - first) * (settings.steps - step),
                held_out_nats_per_dim=_noisy_nats(kept, look) if looked else None,
            )
            sums, counted = torch.zeros_like(sums), 0
            if accelerator.is_main_process:
                records.append(asdict(report))
            yield report
        checkpoint()
    except (KeyboardInterrupt, GeneratorExit):
        if at_rest and step < settings.steps:
            checkpoint()
        raise


def _begin(config: RunConfig, images: ImageSet, out: Path, resume: bool) -> tuple[Run, dict[str, Any]]:
    """A fresh run, or the one in `out` with the state it was left in."""
    there = (out / "config.json").exists()
    if out.exists() and not there and any(out.iterdir()):
        raise LabError(f"{out} is not empty and holds no run: choose another --out")
    if not resume:
        if there:
            raise LabError(f"{out} already holds a run: --resume goes on with it, or choose another --out")
        return build(config, images.classes), {}
    if not there:
        raise LabError(f"nothing to resume: {out} holds no run")
    stored = load(out).config
    if stored != config:
        raise LabError(f"{out} was trained with another configuration ({_difference(stored, config)}): resume with that one")
    path = out / "train_state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        run = build(config, images.classes)
        run.step = int(state["step"])
    except FileNotFoundError:
        raise LabError(f"{path} is missing: this run can be used, but not resumed") from None
    except Exception as error:
        raise LabError(f"{path} is damaged or of another program ({type(error).__name__})") from error
    return run, state


def _difference(a: Config, b: Config) -> str:
    left, right = a.to_dict(), b.to_dict()
    for part, value in left.items():
        if isinstance(value, dict) and isinstance(right[part], dict):
            for key, inner in value.items():
                if right[part].get(key) != inner:
                    return f"{part}.{key} was {inner}, now {right[part].get(key)}"
        elif right[part] != value:
            return f"{part} was {value}, now {right[part]}"
    return "no difference"


def _lerp(averages: list[Tensor], values: list[Tensor], updates: Tensor, limit: float) -> None:
    # AveragedModel hands over parameters by device and dtype, and counts the updates before this one
    torch._foreach_lerp_(averages, values, 1 - ema_decay(int(updates), limit))


def _inputs(
    batch: Batch, config: RunConfig, levels: int, teacher: Any, device: torch.device, key: tuple[int, int]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Noised images, labels with some dropped, and the encoder's features of the clean images."""
    x, y = batch
    seed = config.train.seed
    if config.data.flip:
        mirrored = torch.rand(len(x), generator=generator(seed, FLIP, *key)) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    noise = generator(seed, NOISE, *key)
    clean = x.to(device)
    noised = (
        add_noise(clean, config.flow.noise_std, noise) if config.flow.noise == "gaussian" else dequantize(clean, levels, noise)
    )
    labels = None
    if config.flow.classes:
        dropped = torch.rand(len(y), generator=generator(seed, DROP, *key)) < config.train.label_drop
        labels = torch.where(dropped, -1, y).to(device)
    if teacher is None:
        return noised, labels, None
    return noised, labels, match_grid(teacher(clean), teacher.grid, config.flow.side)


def _check_finite(losses: Losses, step: int) -> None:
    if not math.isfinite(losses.total.item()):
        parts = [f"flow {losses.flow.item():.3g}", *(f"{tap} {value.item():.3g}" for tap, value in losses.similarity.items())]
        raise LabError(f"the loss is {losses.total.item()} at step {step} ({', '.join(parts)}): lower train.lr or train.clip")


def _held_out(config: RunConfig, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Up to 512 held-out images under fixed noise, and their labels."""
    split = "val" if config.data.holdout else "test"
    images = load_split(config.data, split)
    x, y = whole(images, 512)
    noise = generator(0, NOISE)
    noised = (
        add_noise(x, config.flow.noise_std, noise) if config.flow.noise == "gaussian" else dequantize(x, images.levels, noise)
    )
    return noised.to(device), y.to(device) if config.flow.classes else None


@torch.no_grad()
def _noisy_nats(run: Run, held_out: tuple[Tensor, Tensor | None]) -> float:
    return float(nats_per_dim(run.flow.log_prob(*held_out), run.config.flow.dims).mean())
