"""The named protocols of sample scores: a name such as FID[adm] fixes network, reference, labels, resize and bytes.

Numbers of two protocols are not comparable: the same samples give another FID under each.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from rrepa_lab.errors import LabError
from rrepa_lab.evaluation.networks.contract import FeatureNetwork
from rrepa_lab.evaluation.networks.named import INCEPTION, default_network, find_network
from rrepa_lab.runs.run import Run

LabelRule = Literal["in turn", "random"]
ENCODER = "encoder"  # the protocol whose network is chosen by the data
FD, SFD, IS, KD, PRECISION, RECALL, VENDI = "FD", "sFD", "IS", "KD", "precision", "recall", "Vendi"


class Protocol(NamedTuple):
    """How samples are scored.

    Args:
        name: in the names of its metrics: FID[adm].
        network: by its name; "" for the one that suits the data.
        metrics: Fréchet distances are called FID and sFID where the network is Inception.
        labels: of the samples: classes in turn (balanced), or drawn at random with equal probabilities.
        reference: "split": the one that is evaluated; "train": the training split; "file": a file that must be named.
        mirrored: the reference also holds the mirror image of every picture.
        samples: how many the published protocol takes; 0 where there is none.
        meaning: in one sentence.
    """

    name: str
    network: str
    metrics: tuple[str, ...]
    labels: LabelRule = "in turn"
    reference: Literal["split", "train", "file"] = "split"
    mirrored: bool = False
    samples: int = 0
    meaning: str = ""


PROTOCOLS: dict[str, Protocol] = {
    one.name: one
    for one in (
        Protocol(
            ENCODER, "", (FD, SFD, KD, PRECISION, RECALL, VENDI),
            meaning="features of an encoder at hand (digits: the bundled evaluator), against the split that is scored; offline",
        ),
        Protocol(
            "adm", INCEPTION, (FD, SFD, IS, PRECISION, RECALL), reference="file", samples=50_000,
            meaning="ADM's evaluator (arXiv 2105.05233): Inception, its reference file, balanced labels, 50,000 samples",
        ),
        Protocol(
            "tarflow", INCEPTION, (FD,), labels="random", reference="train", mirrored=True, samples=50_000,
            meaning="TARFlow's code (arXiv 2412.06329): Inception, statistics of the training images with flips, random "
            "labels, 4,096 samples in ablations and 50,000 in main tables",
        ),
    )
}  # fmt: skip


class Chosen(NamedTuple):
    """A protocol with its network at hand."""

    protocol: Protocol
    network: FeatureNetwork

    @property
    def label(self) -> str:
        """What stands in the brackets of its metrics."""
        return self.network.name if self.protocol.name == ENCODER else self.protocol.name

    def metric(self, kind: str) -> str:
        """The name of a metric: FID[adm], sFD[efficientnet-lite0], KD[digits]."""
        if self.network.name == INCEPTION:
            kind = {FD: "FID", SFD: "sFID"}.get(kind, kind)
        return f"{kind}[{self.label}]"


def choose(names: str | Sequence[str] | None, run: Run | None = None) -> list[Chosen]:
    """Protocols by name; a name that is none of them is that of a network, under the protocol "encoder".

    Args:
        names: None: "encoder".
        run: whose data decide on the network of "encoder".

    Raises: LabError for an unknown name, one that is given twice, and a network that is not at hand.
    """
    listed = [ENCODER] if names is None else [names] if isinstance(names, str) else list(names)
    if not listed:
        raise LabError(f"name at least one protocol: {', '.join(PROTOCOLS)}, or a network")
    found = [_one(name, run) for name in listed]
    labels = [one.label for one in found]
    for label in labels:
        if labels.count(label) > 1:
            raise LabError(f"protocol {label} is named twice")
    return found


def _one(name: str, run: Run | None) -> Chosen:
    if name == ENCODER:
        if run is None:
            raise LabError("which encoder? Without a run name a network: --protocol efficientnet-lite0, or adm")
        return Chosen(PROTOCOLS[ENCODER], default_network(run.config))
    if name in PROTOCOLS:
        return Chosen(PROTOCOLS[name], find_network(PROTOCOLS[name].network))
    data = None if run is None else run.config.data
    return Chosen(PROTOCOLS[ENCODER], find_network(name, data, kind="protocol", also=list(PROTOCOLS)))
