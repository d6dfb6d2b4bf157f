"""The runs that a visitor may use, and the images that stand for their test split."""

from functools import lru_cache
from pathlib import Path

import pandas as pd
from server.handlers import model_lock
from server.settings import server_settings

import rrepa_lab as rl
from rrepa_lab.analysis.features import cycled_labels
from rrepa_lab.data.images import Batch
from rrepa_lab.data.splits import available_splits
from rrepa_lab.errors import LabError
from rrepa_lab.paths import assets, runs_root
from rrepa_lab.runs.card import read_scores

DEFAULT_RUN, DEFAULT_OTHER = "digits-reverse", "digits-none"
NO_RUN = ""  # in place of the second run, where one is shown alone
N_TEST_IMAGES = 1000
N_SAMPLES = 100  # that stand for test images where these are not at hand


def run_names() -> list[str]:
    """The runs that can be picked: bundled and local ones, by name; nothing else is ever loaded for a visitor."""
    return [info.name for info in rl.available()]


def run_folder(name: str) -> Path:
    """The folder of a run on offer; LabError for any other name, a path among them."""
    for root in (assets() / "runs", runs_root()):
        if name and Path(name).name == name and (root / name / "config.json").is_file():
            return root / name
    raise LabError(f"no run {name!r}; known: {', '.join(run_names())}")


def get_run(name: str) -> rl.Run:
    """The run of this name: the same object until its weights on disk change, so that results can be kept by run."""
    folder = run_folder(name)
    with model_lock:
        return _loaded(folder, stamp(folder / "model.safetensors"), server_settings.device)


def stamp(*paths: Path) -> tuple[int, ...]:
    """When these files were last written; 0 for one that is not there."""
    return tuple(path.stat().st_mtime_ns if path.is_file() else 0 for path in paths)


@lru_cache(maxsize=8)
def _loaded(folder: Path, _written: tuple[int, ...], device: str) -> rl.Run:
    return rl.load(folder, device)


def pair(first: str, second: str) -> dict[str, rl.Run]:
    """The runs to show, by name: one if the second is nothing or the same."""
    return {name: get_run(name) for name in dict.fromkeys((first, second)) if name != NO_RUN}


def answering(first: str, second: str) -> tuple[dict[str, rl.Run], str]:
    """Of `pair` the runs that can classify the same image, and why the second is left out where it is."""
    runs = pair(first, second)
    if len(runs) < 2:
        return runs, ""
    one, other = runs.values()
    pictures = [(run.config.data.channels, run.config.data.image_size, run.config.data.image_size) for run in (one, other)]
    if one.classes == other.classes and pictures[0] == pictures[1]:
        return runs, ""
    shapes = ["x".join(map(str, shape)) for shape in pictures]
    what = "has other classes" if shapes[0] == shapes[1] else f"takes images of {shapes[1]}, not {shapes[0]}"
    return {first: one}, f"**{second}** is left out: it {what}."


@lru_cache(maxsize=8)
def missing_data(run: rl.Run) -> str:
    """That the run's test images are not at hand, in words; "" where they are. No image is read for it."""
    data = run.config.data
    if "test" in available_splits(data):
        return ""
    advice = " (set $RREPA_DATA to a folder with them)" if data.path is None else ""
    return f"the test images of {data.words} are not at hand{advice}"


@lru_cache(maxsize=8)
def test_images(run: rl.Run) -> Batch:
    """The images that can be picked by number, with their labels: N_TEST_IMAGES of the run's test split, class-balanced.

    Where they are not at hand, N_SAMPLES of the run's own samples, classes in turn.
    """
    if not missing_data(run):
        return run.data("test", N_TEST_IMAGES)
    labels = cycled_labels(run, N_SAMPLES)
    return Batch(rl.sample(run, range(N_SAMPLES), labels.tolist() if run.flow.config.classes else None).images, labels)


def image_word(run: rl.Run) -> str:
    """What `test_images` are."""
    return "sample" if missing_data(run) else "test image"


def test_code(name: str) -> str:
    """The Python expression whose rows are the images of `test_images`."""
    run = get_run(name)
    if missing_data(run):
        labels = f", [row % {len(run.classes)} for row in range({N_SAMPLES})]" if run.flow.config.classes else ""
        return f"rl.sample(run, range({N_SAMPLES}){labels}).images"
    return 'run.data("test").x' if len(run.images("test")) <= N_TEST_IMAGES else f'run.data("test", {N_TEST_IMAGES}).x'


def parameters(run: rl.Run) -> str:
    """Size of a flow in words, "0.8 M parameters"."""
    return f"{sum(p.numel() for p in run.flow.parameters()) / 1e6:.1f} M parameters"


def by_run(texts: dict[str, str]) -> str:
    """A text that all runs share, or where they differ that of each run, by name."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{name}: {text}" for name, text in texts.items())


def latents_text(run: rl.Run) -> str:
    """What a flow models that does not model pixels, "latents (small-vae 4x8x8) of "."""
    if run.config.space.is_pixels:
        return ""
    return f"latents ({run.config.space.kind} {'x'.join(map(str, run.flow.config.image_shape))}) of "


def class_choices(run: rl.Run) -> list[str]:
    """The labels that can be fed to a run: none, then its classes; choice k stands for label k - 1."""
    return ["any (no label)", *(run.classes if run.flow.config.classes else [])]


def label_of(choice: str, run: rl.Run) -> int:
    """The label of a choice; -1, no label, for a class that this run does not have."""
    choices = class_choices(run)
    return choices.index(choice) - 1 if choice in choices else -1


def scores_of(name: str) -> pd.DataFrame | None:
    """The scores.csv of a run, if it was evaluated and the file is whole."""
    try:
        return read_scores(run_folder(name))
    except LabError:
        return None
