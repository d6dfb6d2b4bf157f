"""`rrepa-lab probe`: probes of every layer, its similarity to the encoder, and its spatial structure."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rrepa_lab.cli.arguments import Commands, add_command, add_csv, add_device, add_noise_samples, add_output, parse_list
from rrepa_lab.cli.printing import hint, print_rows, write_csv
from rrepa_lab.errors import LabError

if TYPE_CHECKING:
    import pandas as pd

    from rrepa_lab.runs.run import Run


def register(commands: Commands) -> None:
    """Add the command."""
    words = "Probe every layer, and measure its similarity to the encoder or its spatial structure."
    probe = add_command(commands, "probe", run, words)
    probe.add_argument("runs", nargs="+", metavar="RUN", help="bundled or local runs, run directories, or Hub ids")
    add_device(probe)
    probe.add_argument(
        "--metrics", default="linear,knn",
        help="of linear, knn, cknna, cka, mutual_knn, teacher_cosine, lds, cds, rmsc, separated by commas",
    )  # fmt: skip
    probe.add_argument("--taps", default="block.*.layer.*", help="which states: names or patterns, separated by commas")
    probe.add_argument("--direction", default="forward", help="forward (real images) or reverse (generated from noise)")
    probe.add_argument("--classifiers", default="", help="of gradient, bayes, iterated: also measure their accuracy")
    probe.add_argument("--pool", default="mean", help="mean over tokens, all tokens concatenated, or both (probes only)")
    add_noise_samples(probe, "noise samples on real images to average over; 0: clean images (none: the run's setting)")
    probe.add_argument("--noise-std", type=float, help="sigma of this noise (none: the run's setting)")
    probe.add_argument("--neighbours", type=int, help="of k-NN (default 5) and of CKNNA and mutual k-NN (default 10)")
    probe.add_argument("--solver", default="auto", help="of the linear probes: auto, sklearn or torch")
    probe.add_argument("--samples", type=int, default=1000, help="reverse: number of generated images")
    probe.add_argument("--guidance", type=float, default=0.0, help="reverse: classifier-free guidance weight")
    probe.add_argument("--limit", type=int, help="number of images of each split, class-balanced")
    probe.add_argument("--no-baselines", action="store_true", help="omit the baselines, pixels and encoder")
    probe.add_argument(
        "--feed-label", action="store_true", help="condition the flow on the true class, which leaks it to the probes"
    )
    probe.add_argument("--force", action="store_true", help="probe features in spite of --feed-label")
    probe.add_argument("--seed", type=int, default=0, help="of noise and samples")
    add_output(probe, "--figure", metavar="FILE.html", help="write curves and heat maps of every metric")
    add_csv(probe)


def run(args: argparse.Namespace) -> int:
    """Measure the metrics of every run and tap, and print one row per tap and the best layer of each metric."""
    from rrepa_lab.runs.run import check_names
    from rrepa_lab.runs.store import load

    kinds = _metrics(args.metrics)
    if args.figure and not args.figure.endswith(".html"):
        raise LabError(f"--figure must be an .html file, not {args.figure}")
    runs = [load(name, args.device) for name in args.runs]
    check_names(runs)
    table = _measure(args, runs, kinds)
    write_csv(args.csv, table)
    if args.figure:
        _write_figures(Path(args.figure), table)
    if args.json:
        print_rows(table.to_dict("records"), True)
        return 0
    _print_table(table, several_runs=len(runs) > 1, several_pools=args.pool == "both")
    _print_protocol(table, runs)
    _print_best(table)
    curves = f"the same as curves: rrepa-lab probe {' '.join(args.runs)} --classifiers gradient --figure layers.html"
    hint(args, f"open {args.figure} in a browser" if args.figure else curves)
    return 0


class _Metrics(NamedTuple):
    """The metrics of a call, by the function that measures them."""

    probes: list[str]
    similarities: list[str]
    spatial: list[str]


def _metrics(text: str) -> _Metrics:
    """Those of the metrics that are probes, similarities and spatial; LabError for an unknown one."""
    from rrepa_lab.analysis.probe import PROBES
    from rrepa_lab.analysis.similarity import METRICS
    from rrepa_lab.analysis.spatial import SPATIAL_METRICS
    from rrepa_lab.errors import unknown

    names, kinds = parse_list(text), (PROBES, METRICS, tuple(SPATIAL_METRICS))
    for name in names:
        if name not in sum(kinds, ()):
            raise unknown("metric", name, sum(kinds, ()))
    return _Metrics(*([name for name in names if name in known] for known in kinds))


def _measure(args: argparse.Namespace, runs: "list[Run]", kinds: _Metrics) -> "pd.DataFrame":
    """The tidy table of all metrics: probes of all runs, then similarities and spatial structure run by run."""
    import pandas as pd

    from rrepa_lab.analysis.features import POOLS, FeatureProtocol, Images
    from rrepa_lab.analysis.noise import NoiseSamples
    from rrepa_lab.analysis.probe import probe
    from rrepa_lab.analysis.probe_fit import ProbeFit
    from rrepa_lab.analysis.similarity import similarity
    from rrepa_lab.analysis.spatial import spatial_structure

    taps = parse_list(args.taps)
    protocol = FeatureProtocol(
        direction=args.direction,
        pool="mean" if args.pool == "both" else args.pool,
        noise=NoiseSamples(args.noise_samples, args.noise_std, args.seed),
        feed_label=args.feed_label,
        guidance=args.guidance,
        samples=args.samples,
        seed=args.seed,
    )
    tables = []
    if kinds.probes:
        protocols = [replace(protocol, pool=pool) for pool in POOLS] if args.pool == "both" else [protocol]
        fit = ProbeFit(solver=args.solver, **({} if args.neighbours is None else {"neighbours": args.neighbours}))
        tables.append(
            probe(
                runs, taps, protocol=protocols, probes=kinds.probes, classifiers=parse_list(args.classifiers),
                baselines=not args.no_baselines, fit=fit, force=args.force, limit=args.limit,
            )
        )  # fmt: skip
    images, nearest = Images(limit=args.limit or 1000), 10 if args.neighbours is None else args.neighbours
    for loaded in runs if kinds.similarities else []:
        # of several runs, those without projectors have no cosine
        metrics = [name for name in kinds.similarities if name != "teacher_cosine" or loaded.projectors.taps or len(runs) == 1]
        tables.append(similarity(loaded, None, taps, metrics=metrics, protocol=protocol, neighbours=nearest, images=images))
    for loaded in runs if kinds.spatial else []:
        of_teachers = not args.no_baselines
        tables.append(
            spatial_structure(loaded, taps, metrics=kinds.spatial, protocol=protocol, baselines=of_teachers, images=images)
        )
    return pd.concat(tables, ignore_index=True)


def _print_table(table: "pd.DataFrame", several_runs: bool, several_pools: bool) -> None:
    """One row per tap and baseline, one column per metric (and run)."""
    is_tap = table["tap"] != ""
    rows = table["tap"].where(is_tap, table["metric"].str.removesuffix("_accuracy"))
    metrics = table["metric"].where(is_tap, "linear_accuracy")
    if several_pools:
        metrics += table["pool"].map({"all": ", all tokens"}).fillna("")
    keys = ["run", "what"] if several_runs else ["what"]
    wide = table.assign(where=rows, what=metrics).set_index(["where", *keys])["value"].unstack(keys, sort=False)
    wide.columns = [" ".join(key) if isinstance(key, tuple) else key for key in wide.columns]
    print_rows([{"": name, **row} for name, row in zip(wide.index, wide.to_dict("records"), strict=True)], False)
    print()


def _print_protocol(table: "pd.DataFrame", runs: "list[Run]") -> None:
    """A line for each run: data, space, images, and what the probes were fitted on."""
    from rrepa_lab.data.subset import subset_words

    for run in runs:
        rows = table[(table["run"] == run.name) & (table["layer"] > 0)]
        first, counts = rows.iloc[0], sorted(set(rows["n"]))
        total = len(run.images("test"))
        words = {n: f"{n} test images" if n == total else f"test: {subset_words(n, total)}" for n in counts}
        parts = [words[n] if first["direction"] == "forward" else f"{n} generated images" for n in counts]
        if "n_train" in rows and rows["n_train"].notna().any():
            parts.append(f"probes fitted on {rows['n_train'].max():.0f} images")
        print(f"{run.name}: {first['data']}, {first['space']}; {'; '.join(parts)}")
    print()


def _print_best(table: "pd.DataFrame") -> None:
    """The best layer of each metric, or the highest where neither is better."""
    from rrepa_lab.analysis.probe import best_layer
    from rrepa_lab.measurements.metrics import metric_of

    for metric in dict.fromkeys(table.loc[table["layer"] > 0, "metric"]):
        word = "best layer by" if metric_of(metric).better else "highest"
        for row in best_layer(table, metric).itertuples():
            print(f"{word} {metric}: {row.run} {row.tap} ({row.module_path}) {row.value:.4f}, n = {row.n}")


def _write_figures(path: Path, table: "pd.DataFrame") -> None:
    """One page with curves and a heat map of every metric."""
    from rrepa_lab.files import write_text
    from rrepa_lab.viz.layers import layer_curves, layer_map

    metrics = list(dict.fromkeys(table.loc[table["layer"] > 0, "metric"]))
    figures = [draw(table, metric) for metric in metrics for draw in (layer_curves, layer_map)]
    parts = [figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(figures)]
    head = '<!doctype html><meta charset="utf-8"><title>Layers</title><body style="max-width:1000px;margin:auto">'
    write_text(path, head + "\n".join(parts))
