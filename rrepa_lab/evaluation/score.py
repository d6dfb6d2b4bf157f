"""Pictures of any origin under the named protocols: no run is needed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rrepa_lab.data.layout import SPLITS
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.adm import write_statistics
from rrepa_lab.evaluation.collect import BATCH
from rrepa_lab.evaluation.pictures import picture_set
from rrepa_lab.evaluation.protocols import ENCODER, Chosen, choose
from rrepa_lab.evaluation.reference import Reference, find_reference, split_reference
from rrepa_lab.evaluation.sample_labels import label_rows
from rrepa_lab.evaluation.scores import Scored, score_pictures
from rrepa_lab.measurements.schema import arrange
from rrepa_lab.processes import is_main
from rrepa_lab.progress import progress
from rrepa_lab.runs.run import Run

BAR = 500  # pictures from which a bar of progress is shown


def score(
    samples: Any,
    reference: Any,
    protocols: str | Sequence[str] = "adm",
    *,
    run: Run | None = None,
    device: str = "cpu",
    batch: int = BATCH,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare pictures with a reference under named protocols.

    Args:
        samples: a .npz file in ADM's layout (arr_0, uint8 NHWC), a folder of pictures of one size, a tensor (n, C, H, W) of
            bytes or of floats in [-1, 1], or an array (n, H, W, C) of bytes.
        reference: a .npz file of statistics (mu, sigma, mu_s, sigma_s) or of pictures, a folder, a tensor or an array; with a
            run also one of its splits: "train", "val", "test".
        protocols: "adm" (FID, sFID, IS, precision and recall), "tarflow" (FID), or a network whose features are compared:
            "efficientnet-lite0", "digits", "dinov2-b", the folder of an encoder.
        run: whose splits `reference` may name, whose data decide on the network of "encoder", and whose classes the labels
            of a file (arr_1) count: then label_agreement and class_diversity are measured too.
        device: cpu, or cuda with a number.
        batch: pictures that a network reads at once; no number depends on it.
        seed: of the bootstrap.

    Returns: one row a metric; columns metric, value, unit, n, protocol, standard_error, low, high, interval, reference,
        reference_sha256, n_reference, network, network_sha256, features, resize, bytes, dtype, batch, device.

    Raises: LabError for what cannot be read, pixels that are not finite, a reference of another network, and weights that are
        not at hand, with where they are to be had. Warns (LabWarning) of fewer pictures than features.

    Example:
        >>> import rrepa_lab as rl
        >>> run = rl.load("digits-none")
        >>> table = rl.score(run.data("train", 200).x, run.data("test").x, "digits")
        >>> table.metric[0], table.n.unique().tolist()
        ('FD[digits]', [200])
    """
    pictures, against = picture_set(samples), find_reference(reference, run)
    chosen = choose(protocols, run)
    with progress(len(pictures), "picture", len(pictures) < BAR or not is_main(), "reading") as bar:
        pairs = [(one, against) for one in chosen]
        found = score_pictures(pictures, pairs, device=torch.device(device), batch=batch, seed=seed, watch=bar.update)
    words = f"{len(pictures)} pictures of {pictures.words} ({pictures.sha256})"
    rows = [{"protocol": words, "device": device} | row for one in found for row in _rows(one, run)]
    return arrange(pd.DataFrame(rows), ["metric", "value", "unit", "n", "protocol"])


def _rows(one: Scored, run: Run | None) -> Iterator[dict[str, Any]]:
    """Rows of a protocol; where samples have labels and a run says what they mean, also whether they show these classes."""
    yield from one.rows
    labels = one.samples.labels
    labelled = labels is not None and bool((labels >= 0).any())
    if run is not None and run.flow.config.classes and labelled and one.chosen.protocol.name == ENCODER:
        common = {name: one.rows[0][name] for name in ("network", "network_sha256", "reference", "reference_sha256")}
        for row in label_rows(run, one):
            yield common | row


def save_reference(
    path: Path | str, source: Any, protocol: str | Chosen = "adm", *, run: Run | None = None, device: str = "cpu"
) -> Reference:
    """Write the statistics of real pictures to a .npz file under ADM's names, to be used as a reference.

    Args:
        path: of the file.
        source: of the pictures: a split of the run's data, a folder, a .npz file of pictures, a tensor.
        protocol: whose network reads them; "tarflow" also takes the mirror image of every picture of a split.

    Returns: the reference that was read.

    Raises: LabError as `score`, and where the file cannot be written.

    Example:
        >>> import rrepa_lab as rl
        >>> import tempfile
        >>> run = rl.load("digits-none")
        >>> with tempfile.TemporaryDirectory() as out:
        ...     written = rl.save_reference(f"{out}/digits.npz", "test", "digits", run=run)
        >>> written.words, len(written.pictures)
        ('test split of digits', 360)
    """
    chosen = choose([protocol], run)[0] if isinstance(protocol, str) else protocol
    if isinstance(source, str) and run is not None and source in SPLITS:
        against = split_reference(run, source, chosen.protocol.mirrored)
    else:
        against = find_reference(source, run)
    if against.pictures is None:
        raise LabError(f"{against.words} holds statistics already: give pictures")
    found = against.statistics(chosen.network, device)
    if is_main():
        write_statistics(path, found.pooled, found.spatial, chosen.network.name, chosen.network.sha256)
    return against
