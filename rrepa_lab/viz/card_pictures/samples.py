"""`samples`: images that the run generates, with labels in turn."""

from rrepa_lab.analysis.features import cycled_labels
from rrepa_lab.runs.model_card import CARD_PICTURES, CardPicture
from rrepa_lab.runs.run import Run
from rrepa_lab.sampling.sample import sample
from rrepa_lab.viz.images import encoded, grid


def samples(run: Run, count: int) -> CardPicture:
    """A sheet of images of the seeds 0, 1, ..., unguided."""
    labels = cycled_labels(run, count).tolist()
    made = sample(run, range(count), labels)
    what = "classes in turn, " if run.config.flow.classes else ""
    seeds = f"seeds 0 to {count - 1}" if count > 1 else "seed 0"
    caption = f"{count} samples, not selected: {what}{seeds}, unguided, {made.finish}"
    return CardPicture(encoded(grid(made.images), description=caption), caption)


CARD_PICTURES.register("samples")(samples)
