"""Training an autoencoder: a small VAE, or the decoder of a frozen encoder's features.

Reconstruction by an L1 or L2 distance and, for the VAE, a small KL term (arXiv 2112.10752 uses these beside perceptual losses,
which are left out here). A training that was stopped goes on from its last state.
"""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F

from rrepa_lab.data.augment import drawn_mirrors, mirrored, shifted
from rrepa_lab.data.decoded import prepare
from rrepa_lab.data.images import Batch, ImageSet
from rrepa_lab.data.loaders import SeededBatches, seeded, stream
from rrepa_lab.data.splits import read_split
from rrepa_lab.data.streams import RowStreams, normal_rows
from rrepa_lab.data.subset import limited
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_atomically
from rrepa_lab.runs.config import TrainConfig
from rrepa_lab.space.autoencoder import AutoencoderConfig, is_autoencoder
from rrepa_lab.space.kinds.features import Features, fresh
from rrepa_lab.space.kinds.small_vae import SmallVae
from rrepa_lab.space.networks import kl_to_standard_normal, sampled
from rrepa_lab.training.fit import FitReport, FitSettings, minimize
from rrepa_lab.training.folder import LOCK, take
from rrepa_lab.training.state import NAME as STATE

CHUNK = 256  # pictures in one pass of the statistics
POSTERIOR, NOISE, FLIP, SHIFT = 2, 3, 4, 5  # purposes of random streams


class Training:
    """One training of an autoencoder on the training split of its data; `run` takes the steps, then `finish` the statistics.

    Raises: LabError where `out` holds an autoencoder already, is written to by another training, or (with `resume`) holds a
        state of other settings.
    """

    def __init__(self, config: AutoencoderConfig, out: Path, device: torch.device, resume: bool = False) -> None:
        self.config, self.out, self.device = config, out, device
        self.images = prepare(read_split(config.data, "train"))
        if is_autoencoder(out):
            raise LabError(f"{out} holds a trained autoencoder already: choose another --out")
        if out.exists() and not out.is_dir():
            raise LabError(f"{out} is a file: choose another --out")
        others = [path.name for path in out.iterdir() if path.name[0] != "."] if out.exists() else []
        if others and STATE not in others:
            raise LabError(f"{out} is not empty and holds no autoencoder: choose another --out")
        if STATE in others and not resume:
            raise LabError(f"{out} holds the state of a training that was stopped: --resume goes on with it")
        if resume and STATE not in others:
            raise LabError(f"nothing to resume: {out} holds no {STATE}")
        self.lock = FileLock(out / LOCK)
        self.start = 0
        self.model = self._model().to(device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        if resume:
            self._load()

    def _model(self) -> SmallVae | Features:
        with seeded(self.config.seed):
            if self.config.kind == "small-vae":
                return SmallVae(self.config)
            return fresh(self.config, self.images)

    def run(self) -> Generator[FitReport, None, None]:
        """The steps still to take, each yielded; the state is saved every `save_every` steps and where it ends early."""
        c = self.config
        take(self.out, self.lock)
        try:
            batches = SeededBatches(len(self.images), c.batch, c.seed, self.start, c.steps)
            settings = FitSettings(c.steps, c.lr, c.weight_decay, warmup=c.steps // 20)
            workers = TrainConfig().worker_count
            pairs = zip(batches, stream(self.images, batches, workers), strict=True)
            steps = minimize([], pairs, self._loss, settings, start=self.start, optimizer=self.optimizer)
            self.model.train()
            done = self.start
            try:
                for report in steps:
                    done = report.step
                    if done % c.save_every == 0 and done < c.steps:
                        self._save(done)
                    yield report
            except BaseException:
                if 0 < done < c.steps:
                    self._save(done)
                raise
            self.model.eval()
        finally:
            self.lock.release()

    def _loss(self, step: int, given: tuple[list[int], Batch]) -> Tensor:
        c, data, (rows, (x, _)) = self.config, self.config.data, given
        epoch = step // max(1, len(self.images) // min(c.batch, len(self.images)))

        def draws(purpose: int) -> RowStreams:
            return RowStreams((c.seed, purpose, epoch), rows)

        if data.flip:
            x = mirrored(x, drawn_mirrors(draws(FLIP)))
        if data.shift:
            x = shifted(x, data.shift, data.shift_probability, draws(SHIFT))
        x = x.to(self.device)
        made, kl = self._reconstruct(x, draws)
        distance = F.l1_loss(made, x) if c.loss == "l1" else F.mse_loss(made, x)
        return distance + c.kl_weight * kl

    def _reconstruct(self, x: Tensor, draws: Callable[[int], RowStreams]) -> tuple[Tensor, Tensor]:
        """Reconstructions under the noise of the training, and the KL divergence of the latents."""
        c = self.config

        def normal(purpose: int, like: Tensor) -> Tensor:
            return normal_rows(like.shape, draws(purpose)).to(like)

        if isinstance(self.model, SmallVae):
            mean, log_variance = self.model.moments(x)
            latents = sampled(mean, log_variance, normal(POSTERIOR, mean))
            if c.noise_std:
                latents = latents + c.noise_std * mean.detach().std() * normal(NOISE, mean)
            return self.model.decode(latents), kl_to_standard_normal(mean, log_variance)
        with torch.no_grad():
            latents = self.model.encode(x)
        if c.noise_std:
            latents = latents + c.noise_std * normal(NOISE, latents)
        return self.model.decode(latents), x.new_zeros(())

    @torch.no_grad()
    def finish(self) -> None:
        """Bring the latents to unit variance in each channel, by the means over training pictures; features have it already."""
        if not isinstance(self.model, SmallVae):
            return
        images = limited(self.images, self.config.statistics_images)
        total, square, count = torch.zeros(()).double(), torch.zeros(()).double(), 0
        for x, _ in in_chunks(images):
            mean = self.model.moments(x.to(self.device))[0].double()
            total, square = total + mean.sum(dim=(0, 2, 3)), square + mean.square().sum(dim=(0, 2, 3))
            count += mean[:, 0].numel()
        average = total / count
        variance = square / count - average.square()
        if not bool((variance > 1e-12).all()):
            dead = int((variance <= 1e-12).sum())
            raise LabError(
                f"{dead} of {len(variance)} latent channels are constant: lower kl_weight or channels, or train longer"
            )
        self.model.statistics = {"mean": average.tolist(), "std": variance.sqrt().tolist(), "images": len(images)}
        self.model.scale(self.model.statistics, self.out)

    def clear(self) -> None:
        """Remove the state, once the result was written."""
        (self.out / STATE).unlink(missing_ok=True)

    def _save(self, step: int) -> None:
        values = {
            "step": step, "config": self.config.to_dict(), "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        write_atomically(self.out / STATE, lambda temporary: torch.save(values, temporary))

    def _load(self) -> None:
        path = self.out / STATE
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
            old, now = AutoencoderConfig.from_dict(values["config"]).flat(), self.config.flat()
        except LabError:
            raise
        except Exception as error:  # torch has no exception of its own for a damaged file
            raise LabError(f"{path} is damaged or of another program ({type(error).__name__})") from error
        for key in sorted({*old, *now}):
            if old.get(key) != now.get(key):
                raise LabError(f"{self.out} was trained with {key} {old.get(key)}, now {now.get(key)}: --resume needs the same")
        self.model.load_state_dict(values["model"], strict=False)
        self.optimizer.load_state_dict(values["optimizer"])
        self.start = int(values["step"])


def in_chunks(images: ImageSet) -> Iterator[Batch]:
    """A set in parts, in its order."""
    chunks = [part.tolist() for part in torch.arange(len(images)).split(CHUNK)]
    return stream(images, chunks, TrainConfig().worker_count)
