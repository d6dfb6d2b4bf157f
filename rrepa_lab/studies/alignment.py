"""Which layer is aligned, and how: what every layer of every setting of a study came to know, and how its training went.

    python -m rrepa_lab.studies.alignment runs/layer-alignment             into the folder: layers.csv and curves.csv
    python -m rrepa_lab.studies.alignment runs/layer-alignment --bundle    into assets/studies, for the page and notebooks

The folder is one of `rrepa-lab batch`, with its runs inside. Both tables hold means over training seeds, with standard
deviations; a setting is named as on the page, "reverse, blocks 3,4, layer 2". Probes are fitted on the training split and
scored on the test split, or on 1,000 generated images; similarities are taken over the same images.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rrepa_lab.analysis.features import FeatureProtocol
from rrepa_lab.analysis.probe import probe
from rrepa_lab.analysis.similarity import similarity
from rrepa_lab.analysis.trace import DIRECTIONS
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_text
from rrepa_lab.measurements.compare import as_text, settings_of
from rrepa_lab.paths import assets
from rrepa_lab.runs.presets import config_file
from rrepa_lab.runs.records import Records
from rrepa_lab.runs.store import load
from rrepa_lab.studies.digits import write_sums
from rrepa_lab.studies.reading import load_table, over_seeds, read_layer_table

BUNDLED = "digits-layer-alignment"
MEASURES = "measurements.csv"
ALIGNED = ("align.strategy", "align.blocks", "align.layers")
_NEEDED = (
    "run",
    "tap",
    "block",
    "layer",
    "module_path",
    "metric",
    "direction",
    "label_fed",
    "guidance",
    "value",
    "train_seeds",
)
RECORDED = (
    "nats_per_dim", "held_out_nats_per_dim", "train_nats_per_dim", "held_out_accuracy", "train_accuracy", "similarity",
)  # fmt: skip


def run_folders(folder: Path) -> list[Path]:
    """The runs inside a batch's folder; LabError if there are none."""
    found = sorted(path.parent for path in folder.rglob("config.json") if (path.parent / "model.safetensors").is_file())
    if not found:
        raise LabError(f"{folder} holds no run: it must be the folder of a batch that trained some")
    return found


def name_settings(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each run its strategy, aligned blocks and layers, whatever else differs among them, and a name as `run`.

    Lists read "3,4"; what does not apply is "-".

    Args:
        settings: of each run, by their dotted names.
    """
    keys = [*ALIGNED, *dict.fromkeys(key for row in settings for key in row if key not in ALIGNED)]
    rows = [{key: _text(row.get(key, "-")) for key in keys} for row in settings]
    kept = [key for key in keys if key in ALIGNED or len({row[key] for row in rows if row[key] != "-"}) > 1]
    return [{"run": setting_name({key: row[key] for key in kept}), **{key: row[key] for key in kept}} for row in rows]


def setting_name(setting: dict[str, str]) -> str:
    """ "reverse, blocks 3,4, layer 2", and other settings behind it."""
    words = [setting["align.strategy"]]
    for key, text in setting.items():
        if key == "align.strategy" or text == "-":
            continue
        word = key.rsplit(".", 1)[-1]
        words.append(f"{word[:-1] if word in ('blocks', 'layers') and ',' not in text else word} {text}")
    return ", ".join(words)


def _text(value: Any) -> str:
    return str(as_text(list(value) if isinstance(value, tuple) else value))


def study_settings(folder: Path) -> pd.DataFrame:
    """One row a setting of the runs in a batch's folder: `run`, its name, and the columns of `name_settings`."""
    configs = [config_file(path / "config.json") for path in run_folders(folder)]
    return pd.DataFrame(name_settings(list(map(settings_of, configs)))).drop_duplicates(ignore_index=True)


def measure_layers(folder: Path, setting: dict[str, Any]) -> pd.DataFrame:
    """Probes and similarities of one run in both directions, with one thread."""
    torch.set_num_threads(1)
    run = load(folder)
    protocols = [FeatureProtocol(direction) for direction in DIRECTIONS]
    tables = [table for how in protocols for table in (probe(run, protocol=how), similarity(run, protocol=how))]
    return pd.concat(tables, ignore_index=True).drop(columns=["device", "strategy", "run"]).assign(**setting)


def layers_of(folder: Path, workers: int = 1) -> Iterator[pd.DataFrame]:
    """The rows of one run after the other; put together they go to `over_seeds`."""
    from joblib import Parallel, delayed

    folders = run_folders(folder)
    settings = name_settings([settings_of(config_file(path / "config.json")) for path in folders])
    calls = (delayed(measure_layers)(path, setting) for path, setting in zip(folders, settings, strict=True))
    yield from Parallel(n_jobs=workers, return_as="generator")(calls)


def curves_of(folder: Path) -> pd.DataFrame:
    """How trainings went: settings, step, metric, value, sd, train_seeds; `similarity` is the mean over aligned taps."""
    folders = run_folders(folder)
    configs = [config_file(path / "config.json") for path in folders]
    rows = []
    for path, config, setting in zip(folders, configs, name_settings(list(map(settings_of, configs))), strict=True):
        table = Records(path).table()
        if table.empty:
            continue
        taps = [column for column in table.columns if column.startswith("similarity.")]
        wide = table.assign(similarity=table[taps].mean(axis=1) if taps else float("nan"))
        recorded = [name for name in RECORDED if name in wide]
        long = wide.melt(id_vars="step", value_vars=recorded, var_name="metric").dropna(subset=["value"])
        rows.append(long.assign(**setting, train_seed=config.train.seed))
    if not rows:
        raise LabError(f"no run in {folder} has a metrics.jsonl: it must be the folder of a batch that trained some")
    return over_seeds(pd.concat(rows, ignore_index=True))


def load_study_tables(folder: Path | None = None) -> tuple[pd.DataFrame | None, pd.DataFrame]:
    """Layers (None if they were not measured yet) and curves of a study: the bundled one, or that in a folder."""
    if folder is None:
        return load_table(f"{BUNDLED}-layers"), load_table(f"{BUNDLED}-curves")
    return layers_in(folder), curves_of(folder)


def layers_in(folder: Path) -> pd.DataFrame | None:
    """The layers.csv that this file wrote into a study's folder, None if there is none; LabError for a damaged one."""
    path = folder / "layers.csv"
    if not path.is_file():
        return None
    try:
        table = read_layer_table(path)
        return table[table[list(_NEEDED)].notna().all(axis=1)]
    except (LabError, KeyError):  # no CSV, or without these columns
        raise LabError(f"{path} is damaged: write it again by python -m rrepa_lab.studies.alignment {folder}") from None


def unguided(table: pd.DataFrame, metric: str, direction: str = "forward") -> pd.DataFrame:
    """The rows of one metric under the plainest protocol: no guidance, no label fed to the flow, features averaged over tokens
    where a metric is of one feature for each image.

    Beside an accuracy of probes stands that of one gradient step where the table has it, as a level for `layer_curves`.
    """
    kept = table[(table["direction"] == direction) & (table["label_fed"] == "none") & (table["guidance"] == 0)]
    kept = kept[(kept["pool"] == "mean") | (kept["pool"] == "")]
    return kept[kept["metric"].isin([metric, "gradient_accuracy"] if metric.endswith("_accuracy") else [metric])]


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bundle", action="store_true", help="write to assets/studies instead")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    given = parser.parse_args()
    folder, prefix = (assets() / "studies", f"{BUNDLED}-") if given.bundle else (given.folder, "")
    tables = []
    for table in layers_of(given.folder, given.workers):
        tables.append(table)
        print(f"{len(tables)}: {table['run'].iloc[0]}", file=sys.stderr, flush=True)
    for name, table in (("layers", over_seeds(pd.concat(tables, ignore_index=True))), ("curves", curves_of(given.folder))):
        path = folder / f"{prefix}{name}.csv"
        write_text(path, table.to_csv(index=False, float_format="%.5g"))
        print(path)
    if given.bundle:
        write_sums()


if __name__ == "__main__":
    main()
