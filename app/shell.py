"""What the tabs of the page share: the runs a visitor may use, the model lock, notices, uploads, and downloads."""

import inspect
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from threading import RLock
from typing import Any

import gradio as gr
import pandas as pd
from gradio.utils import get_upload_folder

import rrepa_lab as rl
from rrepa_lab.analysis.features import cycled_labels
from rrepa_lab.data.images import Batch
from rrepa_lab.data.pictures import check_size, read_picture
from rrepa_lab.data.splits import available_splits
from rrepa_lab.errors import LabError
from rrepa_lab.paths import assets, runs_root
from rrepa_lab.runs.card import read_scores

MODEL_QUEUE = "model"  # concurrency group of the events that compute; the model lock admits one of them at a time
DEFAULT_RUN, DEFAULT_OTHER = "digits-reverse", "digits-none"
NO_RUN = ""  # in place of the second run, where one is shown alone
LARGEST_SEED = 2**31 - 1
N_TEST_IMAGES = 1000
N_SAMPLES = 100  # that stand for test images where these are not at hand
# of events that belong to the page alone, and of those among them that compute
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
PRIVATE_MODEL: dict[str, Any] = {"concurrency_id": MODEL_QUEUE, **PRIVATE}

model_lock = RLock()


class ServerSettings:
    """What the page was started with."""

    device = "cpu"
    may_train = True  # off where strangers could reach the page


server_settings = ServerSettings()


# --- runs -------------------------------------------------------------------------------------------------------------


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


# --- handlers ---------------------------------------------------------------------------------------------------------


@contextmanager
def notices() -> Iterator[None]:
    """A LabError inside is shown to the visitor with its advice."""
    try:
        yield
    except LabError as error:
        raise gr.Error(without_folders(error), title="That did not work", print_exception=False) from None


def report_error(error: LabError) -> None:
    """Show an error as a notice, from a handler that goes on; `notices` is for handlers that end with it."""
    gr.Warning(without_folders(error), title="That did not work")


def without_folders(error: LabError | str) -> str:
    """A message with runs by name: visitors do not learn where they are on this machine."""
    text = str(error)
    for root in (runs_root().resolve(), assets() / "runs", assets()):
        text = text.replace(f"{root}/", "")
    return text


def show_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Show a LabError of a handler as a notice; generators too."""
    if not inspect.isgeneratorfunction(handler):
        return notices()(handler)

    @wraps(handler)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with notices():
            yield from handler(*args, **kwargs)

    return wrapper


def with_model_lock(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`show_errors`, under the model lock; a generator holds it from one value to the next, not while a value is shown."""

    @wraps(handler)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with model_lock:
            return handler(*args, **kwargs)

    @wraps(handler)
    def generator(*args: Any, **kwargs: Any) -> Any:
        values = handler(*args, **kwargs)
        end = object()
        try:
            while True:
                with model_lock:
                    value = next(values, end)
                if value is end:
                    return
                yield value
        finally:
            values.close()

    return show_errors(generator if inspect.isgeneratorfunction(handler) else wrapper)


# --- pictures from outside ---------------------------------------------------------------------------------------------


def picture_field(**settings: Any) -> gr.Image:
    """A field for an uploaded picture, whose files are read by `read_picture`: an error of one is a line."""
    field = gr.Image(type="pil", **settings)
    inherited = field.preprocess

    def preprocess(payload: Any) -> Any:
        check_uploaded(payload)
        if payload is None or payload.path is None:
            return inherited(payload)
        with notices():
            try:
                return read_picture(payload.path)
            except LabError as error:
                name = Path(payload.path).name
                raise LabError(str(error).replace(name, payload.orig_name or name)) from None

    field.preprocess = preprocess  # type: ignore[method-assign]
    return field


def only_uploads(field: Any) -> Any:
    """The same component, refusing files that were not uploaded; see `check_uploaded`."""
    inherited = field.preprocess

    def preprocess(payload: Any) -> Any:
        check_uploaded(payload)
        with notices():
            for name in _file_names(payload.model_dump() if hasattr(payload, "model_dump") else payload):
                check_size(Path(name))
        return inherited(payload)

    field.preprocess = preprocess
    return field


def check_uploaded(payload: Any) -> None:
    """gr.Error unless every file that a payload names is a regular file in gradio's upload folder, links followed.

    Gradio checks this only for dictionaries that carry its own `meta` key, which a client may leave out. The message is
    the same for all other files, whether they exist or not.
    """
    root = Path(get_upload_folder()).resolve()
    values = payload.model_dump() if hasattr(payload, "model_dump") else payload
    for name in _file_names(values):
        path = Path(name).resolve() if isinstance(name, str) and "\0" not in name else root
        if root not in path.parents or not path.is_file():
            raise gr.Error("The picture must be uploaded to this page.", title="That did not work", print_exception=False)


def _file_names(values: Any) -> Iterator[Any]:
    """The path of every file that a payload names; None for one that has an address alone."""
    if isinstance(values, dict):
        if values.get("path") is not None or values.get("url") is not None:
            yield values.get("path")
        values = list(values.values())
    for value in values if isinstance(values, list | tuple) else ():
        yield from _file_names(value)


# --- files ------------------------------------------------------------------------------------------------------------

_downloads = tempfile.TemporaryDirectory(prefix="rrepa-lab-")


def keep_file(name: str, data: bytes) -> str:
    """A file for a visitor to take away, kept for an hour at least; returns its path."""
    now = time.time()
    for old in Path(_downloads.name).glob("*/*"):
        if now - old.stat().st_mtime > 3600:
            old.unlink(missing_ok=True)
            old.parent.rmdir()
    path = Path(tempfile.mkdtemp(dir=_downloads.name)) / name
    path.write_bytes(data)
    return str(path)
