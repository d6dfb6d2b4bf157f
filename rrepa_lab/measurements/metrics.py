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
        Metric("gradient_accuracy[clean]", "one gradient step on clean images", "fraction", "higher"),
        Metric("nats_per_dim", "negative log-likelihood", "nats/dim", "lower"),
        Metric("bits_per_dim", "negative log-likelihood", "bits/dim", "lower"),
        Metric("held_out_nats_per_dim", "negative log-likelihood of held-out images", "nats/dim", "lower"),
        Metric("held_out_accuracy", "one-step accuracy on held-out images", "fraction", "higher"),
        Metric("similarity", "cosine with the encoder, aligned taps", "cosine", "higher"),
        Metric("reconstruction_psnr", "PSNR of reconstructions", "dB", "higher"),
        *(
            Metric(f"{name}_top5_accuracy", f"{label}, label among the best five", "fraction", "higher")
            for name, label in _ACCURACIES.items()
            if name not in ("linear", "knn")
        ),
        Metric("classifier_accuracy", "accuracy of the classifier that labels samples, on real images", "fraction", "higher"),
        Metric("class_diversity", "spread within a class, as a part of that of real images", ""),
        Metric("nearest_train_distance", "distance of samples to the nearest training image, median", "rms of a pixel"),
        Metric("held_out_train_distance", "the same of held-out images", "rms of a pixel"),
        Metric("closer_than_held_out", "samples closer to a training image than 99 % of held-out images", "fraction", "lower"),
        Metric("label_agreement", "samples that the evaluator classifies as their label", "fraction", "higher"),
        Metric("cknna", "CKNNA", "", "higher"),
        Metric("cka", "linear CKA", "", "higher"),
        Metric("mutual_knn", "mutual k-NN", "fraction", "higher"),
        Metric("teacher_cosine", "cosine to the teacher", "cosine", "higher"),
        Metric("lds", "local-versus-distant similarity (LDS)", "cosine"),
        Metric("cds", "correlation decay slope (CDS)", "cosine/token"),
        Metric("rmsc", "root mean square spatial contrast (RMSC)"),
        Metric("expected_calibration_error", "expected calibration error", "fraction", "lower"),
        Metric("mean_confidence", "mean confidence", "fraction"),
        Metric("patch_cost", "log p lost by an exchange of states", "nats/dim"),
        Metric("patch_position", "position between target (0) and source (1)"),
        Metric("patch_source_class", "images classified as the source's class", "fraction"),
        Metric("patch_target_class", "images classified as the target's class", "fraction"),
        Metric("upper_position", "position of the upper half between target (0) and source (1)"),
        Metric("lower_position", "position of the lower half between target (0) and source (1)"),
        Metric("steer_cost", "log p lost by steering", "nats/dim"),
        Metric("steer_class", "images classified as the class steered to", "fraction"),
        Metric("ablation_cost", "log p lost by removal", "nats/dim"),
    )
}


# metrics whose name goes on with a protocol or a network in brackets, see evaluation.protocols
FAMILIES: dict[str, Metric] = {
    one.name: one
    for one in (
        Metric("FID", "FID", "", "lower"),
        Metric("sFID", "sFID", "", "lower"),
        Metric("IS", "Inception score", "", "higher"),
        Metric("FD", "Fréchet distance", "feature units^2", "lower"),
        Metric("sFD", "Fréchet distance of spatial features", "feature units^2", "lower"),
        Metric("rFD", "Fréchet distance of reconstructions", "feature units^2", "lower"),
        Metric("accuracy", "accuracy of one gradient step", "fraction", "higher"),
        Metric("KD", "kernel distance", "", "lower"),
        Metric("precision", "precision", "fraction", "higher"),
        Metric("recall", "recall", "fraction", "higher"),
        Metric("Vendi", "Vendi score", "pictures", "higher"),
        Metric("real Vendi", "Vendi score of real pictures", "pictures"),
    )
}
# names of version 0.1
_PRESENT = {"frechet_distance": "FD[digits]", "reconstruction_frechet_distance": "rFD[digits]"}


def present_metric(name: str) -> str:
    """The present name of a metric: version 0.1 wrote "frechet_distance" for "FD[digits]".

    Example:
        >>> present_metric("frechet_distance")
        'FD[digits]'
    """
    return _PRESENT.get(name, name)


def family_of(name: str) -> str:
    """What stands before the brackets.

    Example:
        >>> family_of("FD[efficientnet-lite0]"), family_of("nats_per_dim")
        ('FD', 'nats_per_dim')
    """
    return name.partition("[")[0]


def metric_of(name: str) -> Metric:
    """The metric of this name; one without label and unit of its own for a name that is not in METRICS.

    Example:
        >>> metric_of("nats_per_dim").unit, metric_of("FD[digits]").label, metric_of("my_score").label
        ('nats/dim', 'Fréchet distance [digits]', 'my_score')
    """
    family, bracket, inside = name.partition("[")
    if bracket and family in FAMILIES:
        return FAMILIES[family]._replace(name=name, label=f"{FAMILIES[family].label} [{inside}")
    return METRICS.get(name, Metric(name, name))


def title_of(name: str) -> str:
    """The label with a capital, for titles and axes."""
    label = metric_of(name).label
    return label[:1].upper() + label[1:]
