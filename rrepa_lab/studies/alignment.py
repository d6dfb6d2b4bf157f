"""Which layer is aligned, and how: what every layer of every setting of a study came to know, and how its training went.

    python -m rrepa_lab.studies.alignment runs/layer-alignment             into the folder: layers.csv and curves.csv
    python -m rrepa_lab.studies.alignment runs/layer-alignment --bundle    into assets/studies, for the page and notebooks

The folder is one of `rrepa-lab batch`, with its runs inside. Both tables hold means over training seeds, with standard
deviations; a setting is named as on the page, "reverse, blocks 3,4, layer 2". Probes are fitted on the training split and
scored on the test split, or on 1,000 generated images; similarities are taken over the same images.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rrepa_lab.analysis.compare import settings_of
from rrepa_lab.analysis.probe import probe
from rrepa_lab.analysis.similarity import similarity
from rrepa_lab.errors import LabError
from rrepa_lab.files import write_text
from rrepa_lab.places import assets
from rrepa_lab.runs import RunConfig, load
from rrepa_lab.studies.digits import write_sums
from rrepa_lab.studies.reading import load_table, over_seeds, read_table
from rrepa_lab.training.loop import config_file
from rrepa_lab.training.records import Records

BUNDLED = "digits-layer-alignment"
MEASURES = "measurements.csv"
ALIGNED = ("align.strategy", "align.blocks", "align.layers")
SEEN = ("nats_per_dim", "held_out_nats_per_dim", "held_out_accuracy", "similarity")


def run_folders(folder: Path) -> list[Path]:
    """The runs inside a batch's folder; LabError if there are none."""
    found = sorted(path.parent for path in folder.rglob("config.json") if (path.parent / "model.safetensors").is_file())
    if not found:
        raise LabError(f"{folder} holds no run: it must be the folder of a batch that trained some")
    return found


def name_settings(configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """For each configuration its strategy, aligned blocks and layers, whatever else differs among them, and a name as `run`.

    Lists read "3,4"; what does not apply is "-".
    """
    settings = [settings_of(config) for config in configs]
    keys = [*ALIGNED, *dict.fromkeys(key for row in settings for key in row if key not in ALIGNED)]
    rows = [{key: _told(row.get(key, "-")) for key in keys} for row in settings]
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


def _told(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def measure_layers(folder: Path, setting: dict[str, Any]) -> pd.DataFrame:
    """Probes and similarities of one run in both directions, with one thread."""
    torch.set_num_threads(1)
    run = load(folder)
    tables = [
        reader(run, direction=direction).assign(direction=direction)
        for direction in ("forward", "reverse")
        for reader in (probe, similarity)
    ]
    table = pd.concat(tables, ignore_index=True).drop(columns=["device", "strategy"])
    return table.drop(columns="run").assign(**setting)


def layers_of(folder: Path, workers: int = 1) -> Iterator[pd.DataFrame]:
    """The rows of one run after the other; put together they go to `over_seeds`."""
    from joblib import Parallel, delayed

    folders = run_folders(folder)
    settings = name_settings([config_file(path / "config.json") for path in folders])
    calls = (delayed(measure_layers)(path, setting) for path, setting in zip(folders, settings, strict=True))
    yield from Parallel(n_jobs=workers, return_as="generator")(calls)


def curves_of(folder: Path) -> pd.DataFrame:
    """How trainings went: settings, step, metric, value, sd, train_seeds; `similarity` is the mean over aligned taps."""
    folders = run_folders(folder)
    configs = [config_file(path / "config.json") for path in folders]
    rows = []
    for path, config, setting in zip(folders, configs, name_settings(configs), strict=True):
        table = Records(path).table()
        taps = [column for column in table.columns if column.startswith("similarity.")]
        wide = table.assign(similarity=table[taps].mean(axis=1) if taps else float("nan"))
        seen = [name for name in SEEN if name in wide]
        long = wide.melt(id_vars="step", value_vars=seen, var_name="metric").dropna(subset=["value"])
        rows.append(long.assign(**setting, train_seed=config.train.seed))
    return over_seeds(pd.concat(rows, ignore_index=True))


def load_study_tables(folder: Path | None = None) -> tuple[pd.DataFrame | None, pd.DataFrame]:
    """Layers (None if they were not measured yet) and curves of a study: the bundled one, or that in a folder."""
    if folder is None:
        return load_table(f"{BUNDLED}-layers"), load_table(f"{BUNDLED}-curves")
    layers = folder / "layers.csv"
    return read_table(layers) if layers.is_file() else None, curves_of(folder)


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bundle", action="store_true", help="write to assets/studies instead")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    given = parser.parse_args()
    prefix = assets() / "studies" / f"{BUNDLED}-" if given.bundle else given.folder / ""
    tables = []
    for table in layers_of(given.folder, given.workers):
        tables.append(table)
        print(f"{len(tables)}: {table['run'].iloc[0]}", file=sys.stderr, flush=True)
    for name, table in (("layers", over_seeds(pd.concat(tables, ignore_index=True))), ("curves", curves_of(given.folder))):
        path = Path(f"{prefix}{'' if given.bundle else '/'}{name}.csv")
        write_text(path, table.to_csv(index=False, float_format="%.5g"))
        print(path)
    if given.bundle:
        write_sums()


if __name__ == "__main__":
    main()
