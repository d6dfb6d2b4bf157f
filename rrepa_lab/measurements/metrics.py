"""The metrics of the kit: name, label, unit and which value is better, each once."""

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """What a column `metric` of a table names."""

    name: str
    label: str  # in the middle of a sentence
    unit: str = ""
    better: Literal["higher", "lower", ""] = ""  # "" where neither is


_ACCURACIES = {
    "linear": "accuracy of a linear probe", "knn": "accuracy of a k-NN probe", "gradient": "one gradient step",
    "bayes": "Bayes' rule", "iterated": "gradient ascent",
}  # fmt: skip
METRICS: dict[str, Metric] = {
    one.name: one
    for one in (
        *(Metric(f"{name}_accuracy", label, "fraction", "higher") for name, label in _ACCURACIES.items()),
        Metric("nats_per_dim", "negative log-likelihood", "nats/dim", "lower"),
        Metric("bits_per_dim", "negative log-likelihood", "bits/dim", "lower"),
        Metric("held_out_nats_per_dim", "negative log-likelihood of held-out images", "nats/dim", "lower"),
        Metric("held_out_accuracy", "one-step accuracy on held-out images", "fraction", "higher"),
        Metric("similarity", "cosine with the encoder, aligned taps", "cosine", "higher"),
        Metric("frechet_distance", "Fréchet distance", "evaluator units^2", "lower"),
        Metric("reconstruction_psnr", "PSNR of reconstructions", "dB", "higher"),
        Metric("reconstruction_frechet_distance", "Fréchet distance of reconstructions", "evaluator units^2", "lower"),
        Metric("label_agreement", "samples that the evaluator classifies as their label", "fraction", "higher"),
        Metric("cknna", "CKNNA", "", "higher"),
        Metric("cka", "linear CKA", "", "higher"),
        Metric("mutual_knn", "mutual k-NN", "fraction", "higher"),
        Metric("teacher_cosine", "cosine to the teacher", "cosine", "higher"),
        Metric("expected_calibration_error", "expected calibration error", "fraction", "lower"),
        Metric("mean_confidence", "mean confidence", "fraction"),
    )
}


def metric_of(name: str) -> Metric:
    """The metric of this name; one without label and unit of its own for a name that is not in METRICS.

    Example:
        >>> metric_of("nats_per_dim").unit, metric_of("my_score").label
        ('nats/dim', 'my_score')
    """
    return METRICS.get(name, Metric(name, name))


def title_of(name: str) -> str:
    """The label with a capital, for titles and axes."""
    label = metric_of(name).label
    return label[:1].upper() + label[1:]
