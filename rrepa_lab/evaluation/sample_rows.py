"""Rows about the samples of a run: their scores under the named protocols, and whether they show the class that they should."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from rrepa_lab.data.subset import limited
from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.distances import frechet_distance
from rrepa_lab.evaluation.networks.named import is_teacher
from rrepa_lab.evaluation.pictures import PictureSet
from rrepa_lab.evaluation.protocols import ENCODER, Chosen
from rrepa_lab.evaluation.reference import Reference, find_reference, split_reference
from rrepa_lab.evaluation.run_samples import RunSamples, Sampling, saving
from rrepa_lab.evaluation.sample_labels import label_rows
from rrepa_lab.evaluation.scores import Scored, score_pictures
from rrepa_lab.processes import is_main
from rrepa_lab.progress import progress
from rrepa_lab.runs.run import Run

RECONSTRUCTED = 2000  # real images whose reconstructions are compared, at most
BAR = 500  # samples from which a bar of progress is shown


def sample_rows(
    run: Run,
    sampling: Sampling,
    chosen: Sequence[Chosen],
    split: str,
    reference: Any = None,
    save: Path | str | None = None,
    brief: bool = False,
) -> Iterator[dict[str, Any]]:
    """Scores of samples under protocols; samples whose labels follow one rule are drawn once for all of these.

    Args:
        split: the real images of the protocol "encoder".
        reference: in place of the protocols' own, see `evaluation.reference.find_reference`.
        save: a .npz file for the samples.
        brief: leave out of `protocol` what has columns of its own: guidance, last step, seeds.

    Raises: LabError where a protocol needs a file as reference and none is named, or `save` with two rules of labels.
    """
    pairs = [(one, _reference(run, one, split, reference)) for one in chosen]
    rules = list(dict.fromkeys(one.protocol.labels for one in chosen))
    if save is not None and len(rules) > 1:
        raise LabError("these protocols take samples with labels in turn and at random: save those of one protocol at a time")
    for rule in rules:
        samples = RunSamples(run, sampling, rule)
        own = [pair for pair in pairs if pair[0].protocol.labels == rule]
        with ExitStack() as stack:
            pictures: PictureSet = samples
            if save is not None:
                pictures = stack.enter_context(saving(samples, save, own[0][0].network.bytes))
            silent = sampling.n < BAR or not is_main()
            bar = stack.enter_context(progress(sampling.n, "sample", silent, "sampling"))
            scored = score_pictures(pictures, own, device=run.device, seed=sampling.seed, watch=bar.update)
        drawn: dict[str, Any] = {
            "guidance": sampling.rule.scale,
            "temperature": sampling.rule.temperature,
            "strength": sampling.strength,
        }
        drawn |= {"seed": sampling.seed, "finish": samples.finish, "decoding": samples.method, "device": str(run.device)}
        for one in scored:
            facts = drawn | {"labels": rule if run.flow.config.classes else "none"}
            words = "" if not is_teacher(one.chosen.network, run.config) else " (a teacher of this run)"
            for row in [*one.rows, *_further(run, one, pairs, split)]:
                against = f", against {row['n_reference']} real images" if row.get("n_reference") else ""
                protocol = f"{samples.brief if brief else samples.words}{against}"
                yield facts | {"protocol": protocol} | row | {"network": f"{row['network']}{words}"}


def _reference(run: Run, chosen: Chosen, split: str, named: Any) -> Reference:
    if named is not None:
        return find_reference(named, run)
    kind = chosen.protocol.reference
    if kind == "file":
        raise LabError(
            f"protocol {chosen.protocol.name} compares with a published file: --reference VIRTUAL_imagenet64_labeled.npz "
            "(guided-diffusion's evaluations name its address), or another .npz file, or a split: --reference train"
        )
    return split_reference(run, split if kind == "split" else kind, chosen.protocol.mirrored)


def _further(run: Run, one: Scored, pairs: Sequence[tuple[Chosen, Reference]], split: str) -> Iterator[dict[str, Any]]:
    """Rows of the protocol "encoder" about labels, and about the space."""
    if one.chosen.protocol.name != ENCODER:
        return
    reference = next(found for chosen, found in pairs if chosen is one.chosen)
    common = {key: one.rows[0][key] for key in ("network", "network_sha256", "resize", "bytes", "dtype", "batch")}
    held = {"reference": reference.words, "reference_sha256": reference.sha256}
    if not run.config.space.is_pixels and reference.pictures is not None:
        yield common | held | _reconstruction(run, one.chosen, split)
    if run.flow.config.classes:
        for row in label_rows(run, one):
            yield common | held | row


@torch.no_grad()
def _reconstruction(run: Run, chosen: Chosen, split: str) -> dict[str, Any]:
    """The Fréchet distance of real images and the same images, encoded and decoded: what no sample can be better than."""
    images = limited(run.images(split), RECONSTRUCTED)
    network, found = chosen.network, []
    for part in torch.arange(len(images)).split(256):
        x = images.__getitems__(part.tolist()).x.to(run.device)
        again = run.space.decode(run.space.encode(x)).clamp(-1, 1)
        found.append((network(again).pooled.cpu(), network(x).pooled.cpu()))
    made, real = (torch.cat(parts) for parts in zip(*found, strict=True))
    words = f"{len(real)} real images, encoded and decoded, against themselves"
    row = {"metric": chosen.metric("rFD"), "value": frechet_distance(made, real), "unit": "feature units^2", "n": len(real)}
    return row | {"protocol": words, "n_reference": len(real), "features": real.shape[1]}
