"""Probes: how much of the class can be read off a flow's features, layer by layer.

A linear probe is a multinomial logistic regression on standardised features; a k-NN probe asks the nearest training
images by cosine. Both are trained on real images that the flow read WITHOUT label, features averaged over tokens: the
recipe of REPA's authors (sihyun-yu/REPA, issues 32 and 55: no label, mean over patches, normalisation and one linear layer).
"""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rrepa_lab.analysis.classify import METHODS, classify
from rrepa_lab.analysis.features import POOLS, Read, Reading, check_spread, image_set, in_turn, together
from rrepa_lab.checks import real_number, whole_number
from rrepa_lab.data.images import Batch, ImageSet, TensorImages
from rrepa_lab.data.loaders import SeededBatches, seeded
from rrepa_lab.errors import LabError, unknown
from rrepa_lab.flow.taps import Tap, Taps
from rrepa_lab.measurements.columns import about, accuracy, place
from rrepa_lab.runs.run import Run, check_names
from rrepa_lab.training.schedule import learning_rate

PROBES = ("linear", "knn")
SOLVERS = ("auto", "sklearn", "torch")
SMALL = 20_000  # training images up to which scikit-learn fits the linear probes


def probe(
    runs: Run | Sequence[Run],
    taps: Taps = "block.*.layer.*",
    *,
    direction: str = "forward",
    probes: Iterable[str] = PROBES,
    classifiers: Iterable[str] = (),
    baselines: bool = True,
    pool: str = "mean",
    draws: int | None = None,
    noise_std: float | None = None,
    neighbours: int = 5,
    solver: str = "auto",
    epochs: int = 20,
    lr: float = 1e-2,
    samples: int = 1000,
    guidance: float = 0.0,
    feed_label: bool = False,
    force: bool = False,
    train: ImageSet | Batch | None = None,
    test: ImageSet | Batch | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 256,
) -> pd.DataFrame:
    """Accuracy of probes on the features of every tap, one row a tap and probe.

    Args:
        direction: "forward" scores the probes on the test split. "reverse" scores them on images that the flow
            generates from fresh noise, read again without label, against the label asked for: whether its own features
            find in a sample the class it was asked for. (At an image's own z both directions have the same features,
            see `agreement`; that would be the forward table again.)
        probes: "linear", "knn".
        classifiers: methods of `rl.classify` scored on the same images, one row each with tap "": with "gradient" the
            table is the paper's Figure 4, a curve over layers with the training-free accuracy as a level.
        baselines: also probe raw pixels (tap "pixels") and the run's encoder (tap "encoder"), which the flow's features
            should be compared with.
        pool: "mean" over tokens, "all" tokens side by side, or "both", with rows for each. The mean forgets where things are:
            a probe of it may stay below one of raw pixels where a probe of all tokens does not.
        draws, noise_std: of the noise on all images that are read, and on those of the classifiers; features are averaged
            over the draws. None is the run's own choice, `config.read`; see `analysis.noise.read_noise`.
        neighbours: of the k-NN probe.
        solver: "sklearn" fits the linear probes to convergence on features held in memory; "torch" trains those of
            all taps together, reading the set `epochs` times and keeping no features; "auto" chooses by size. With
            "torch" the k-NN probe knows the first 20,000 training images.
        epochs, lr: of the torch solver.
        samples, guidance: for "reverse": how many (labels in turn, seeds from `seed` on, denoised), and how guided.
        feed_label: let the flow see the true class while it is read. Every block adds the class vector to all tokens, so a
            probe then reads the label off the label: refused unless `force` is set too. Under "reverse" the features are
            those of the generating pass itself, fed the label that was asked for.
        train, test: image sets or (x, y) batches instead of the run's own splits.
        limit: so many images of each, class-balanced, seed 0.
        seed: of the noise on images, the torch solver, and the first sample.

    Returns: columns run, strategy, train_seed, tap, block, layer, module_path, metric (linear_accuracy, knn_accuracy,
        <method>_accuracy), value, standard_error (binomial), n (images scored), n_train, direction, label_fed, guidance,
        draws, noise_std, pool, probe (what was fitted), seed, device.

    Raises: LabError for a tap that does not exist, an empty or single-class set, features that are constant, more
        neighbours than images, or labels that would leak.
    """
    probes, classifiers = list(probes), list(classifiers)
    for given, known, kind in ((probes, PROBES, "probe"), (classifiers, METHODS, "classification method")):
        for name in given:
            if name not in known:
                raise unknown(kind, name, known)
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    epochs, lr = whole_number("epochs", epochs, 1), real_number("lr", lr, above=True)
    if feed_label and not force:
        raise LabError(
            "features that were fed the label carry it: every block adds the class vector to all tokens, and a probe "
            "would read it back; leave feed_label out, or insist with force=True (--force)"
        )
    if guidance and direction == "forward":
        raise LabError("guidance belongs to generated samples: direction='reverse'")
    ways = [
        Reading(direction, one, noise_std, feed_label, guidance, samples, seed, batch, draws)
        for one in (POOLS if pool == "both" else [pool])
    ]
    measured = [runs] if isinstance(runs, Run) else list(runs)
    check_names(measured)
    tables = []
    for run, how in product(measured, ways):
        if direction == "reverse" and run.flow.config.classes == 0:
            raise LabError(f"run {run.name!r} has no classes to ask for: its samples cannot be scored")
        fitting = image_set(run, "train", train, limit)
        reader = _Reader(run, [tap.name for tap in run.flow.resolve(taps)], baselines, how)
        seen = reader.read(image_set(run, "test", test, limit)) if direction == "forward" else reader.samples()
        large = len(fitting) > SMALL if solver == "auto" else solver == "torch"
        rows = _accuracies(reader, fitting, seen, probes, neighbours, large, epochs, lr)
        for method in classifiers if how is ways[0] else ():
            right = (
                classify(run, seen.x, method, draws=draws, noise_std=noise_std, seed=seed, batch=batch).label.cpu() == seen.y
            )
            rows.append({**place(""), "metric": f"{method}_accuracy", **accuracy(right), "n_train": 0, "probe": "none"})
        tables.append(pd.DataFrame([about(run) | row for row in rows]).assign(**how.columns(run)))
    return pd.concat(tables, ignore_index=True)


class _Reader:
    """Reads image sets the same way for fitting and for scoring, baselines included."""

    def __init__(self, run: Run, taps: list[str], baselines: bool, how: Reading) -> None:
        self.run, self.taps, self.baselines, self.how = run, taps, baselines, how
        self.encoder = run.reference_encoder() if baselines else None

    def batches(self, images: ImageSet, order: Iterable[list[int]] | None = None) -> Iterable[Read]:
        """Features batch after batch."""
        return map(self._with_baselines, self.how.real(self.run, self.taps, images, order))

    def read(self, images: ImageSet, keep_images: bool = True) -> Read:
        """Features of the whole set, with its images if these are to be kept."""
        return together(self.batches(images), keep_images)

    def samples(self) -> Read:
        """Features of generated images: read again as images, or while they are generated if the label is to be fed."""
        labels = in_turn(self.run, self.how.samples)
        if self.how.feed_label:
            return together(map(self._with_baselines, self.how.generated(self.run, self.taps, labels)))
        made = together(self.how.generated(self.run, [], labels))
        return self.read(TensorImages(made.x, made.y, self.run.classes, 0))

    def _with_baselines(self, read: Read) -> Read:
        """The same with the pixels and the encoder's features of the clean images beside it."""
        if self.baselines:
            read.features["pixels"] = read.x.flatten(1)
        if self.encoder is not None:
            read.features["encoder"] = self.how.pooled(self.encoder(read.x.to(self.run.device))).cpu()
        return read


def _accuracies(
    reader: _Reader, fitting: ImageSet, seen: Read, probes: list[str], neighbours: int, large: bool, epochs: int, lr: float
) -> list[dict[str, Any]]:
    """Rows of all probes; of a large set only the first images are kept in memory, for the k-NN probe."""
    rows = []
    if "linear" in probes and large:
        if len(seen.y) > 1:
            for name, features in seen.features.items():
                check_spread(features, f"{name} over {len(features)} images")
        what = f"torch: batch norm and linear, {epochs} epochs, AdamW lr {lr:g}"
        for name, answer in fit_torch(reader, fitting, seen, epochs, lr).items():
            rows.append(_row(name, "linear_accuracy", answer, seen, len(fitting), what))
    if probes == ["linear"] and large:
        return rows
    known = reader.read(image_set(reader.run, "train", fitting, SMALL), keep_images=False)
    check_classes(known.y)
    for name, features in known.features.items():
        check_spread(features, f"{name} over {len(features)} training images")
    if "linear" in probes and not large:
        for name, features in known.features.items():
            answer = fit_linear(features, known.y, seen.features[name])
            rows.append(_row(name, "linear_accuracy", answer, seen, len(features), "sklearn: standardised, logistic, C 1"))
    if "knn" in probes:
        for name, features in known.features.items():
            answer = fit_knn(features, known.y, seen.features[name], neighbours)
            rows.append(_row(name, "knn_accuracy", answer, seen, len(features), f"{neighbours}-NN, cosine"))
    return rows


def _row(name: str, metric: str, answer: Tensor, seen: Read, n_train: int, what: str) -> dict[str, Any]:
    where = place(name if name in ("pixels", "encoder") else Tap.parse(name))
    return {**where, "metric": metric, **accuracy(answer == seen.y), "n_train": n_train, "probe": what}


def check_classes(y: Tensor) -> None:
    """LabError for labels (n,) that hold fewer than two classes."""
    present = y.unique().tolist()
    if len(present) < 2:
        raise LabError(f"every label is {present[0]}: a probe needs at least two classes")


def fit_linear(features: Tensor, y: Tensor, scored: Tensor) -> Tensor:
    """Labels (m,) that a logistic regression on standardised features (n, d), (n,) gives to (m, d); scikit-learn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(features.numpy(), y.numpy())
    return torch.from_numpy(model.predict(scored.numpy()))


def fit_knn(features: Tensor, y: Tensor, scored: Tensor, neighbours: int) -> Tensor:
    """Labels (m,) by majority of the nearest of (n, d), (n,) by cosine; scikit-learn."""
    from sklearn.neighbors import KNeighborsClassifier

    if not 1 <= neighbours <= len(features):
        raise LabError(f"{neighbours} neighbours asked for among {len(features)} images")
    model = KNeighborsClassifier(neighbours, metric="cosine").fit(features.numpy(), y.numpy())
    return torch.from_numpy(model.predict(scored.numpy()))


def fit_torch(reader: _Reader, fitting: ImageSet, seen: Read, epochs: int, lr: float) -> dict[str, Tensor]:
    """Labels (m,) by a linear probe for each tap, all trained together: a batch is read once and moves every probe.

    Each probe is a batch norm without gain and bias, and a linear layer, as in REPA and MAE (arXiv 2111.06377); one
    AdamW with a cosine schedule.
    """
    how, device = reader.how, reader.run.device
    size = min(how.batch, len(fitting))
    if size < 2:
        raise LabError("a probe is trained on batches of at least two images")
    steps = epochs * (len(fitting) // size)
    classes = len(fitting.classes)
    probes: nn.ModuleDict | None = None
    met = torch.zeros(classes, dtype=torch.bool)
    for step, read in enumerate(reader.batches(fitting, SeededBatches(len(fitting), size, how.seed, 0, steps))):
        features = {name.replace(".", "_"): value.float().to(device) for name, value in read.features.items()}
        if probes is None:
            with seeded(how.seed):
                fresh = {name: _linear_probe(value.shape[1], classes) for name, value in features.items()}
            probes = nn.ModuleDict(fresh).to(device)
            optimizer = torch.optim.AdamW(probes.parameters(), lr=lr, weight_decay=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        met[read.y] = True
        y = read.y.to(device)
        losses = [F.cross_entropy(probes[name](value), y) for name, value in features.items()]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # the probes share nothing: each has the gradient of its own loss
        optimizer.step()
    assert probes is not None
    check_classes(met.nonzero()[:, 0])
    probes.eval()
    with torch.no_grad():
        return {
            name: probes[name.replace(".", "_")](value.float().to(device)).argmax(dim=1).cpu()
            for name, value in seen.features.items()
        }


def _linear_probe(dim: int, classes: int) -> nn.Module:
    linear = nn.Linear(dim, classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False), linear)


def best_layer(table: pd.DataFrame, metric: str = "linear_accuracy") -> pd.DataFrame:
    """The row of the best layer for each run and training seed, in a table of `rl.probe` or `rl.similarity`.

    The best of many layers is partly luck: compare it with the same layer of other seeds before believing it.
    """
    rows = table[(table["metric"] == metric) & (table["layer"] > 0)]
    if rows.empty:
        raise LabError(f"the table has no layer measured by {metric}")
    keys = [name for name in ("run", "train_seed") if name in rows]  # a mean over seeds has no seed
    return rows.loc[rows.groupby(keys, sort=False)["value"].idxmax()]
