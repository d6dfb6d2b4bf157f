"""Commands that read a flow: trace, classify, probe, evaluate, read-noise, bench."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrepa_lab.cli.printing import hint, print_facts, print_json, print_rows, print_table, write_csv
from rrepa_lab.cli.words import add_command, add_device, add_output, add_run, class_labels, integers, sample_options, words
from rrepa_lab.errors import LabError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from rrepa_lab.runs.run import Run


def register(commands: Any) -> None:
    """Add these commands."""
    _register_trace(commands)
    _register_classify(commands)
    _register_probe(commands)

    evaluate = add_command(commands, "evaluate", _evaluate, "Score a run on a split, with the protocol of every number.")
    add_run(evaluate)
    evaluate.add_argument("--split", default="test", help="train, val, test, or several side by side: train,test")
    evaluate.add_argument("--draws", type=int, default=4, help="noise draws that a likelihood is averaged over")
    evaluate.add_argument("--samples", type=int, default=2000, help="images generated for the sample scores; 0 for none")
    evaluate.add_argument("--save", action="store_true", help="write scores.csv and the card into the run directory")

    noise = add_command(
        commands, "read-noise", _read_noise, "Choose the noise that images are read under, on validation images."
    )
    add_run(noise)
    noise.add_argument("--draws", default="0,1,4,16", help="numbers of draws of the training noise; 0: clean images")
    noise.add_argument("--methods", default="gradient", help="of gradient, iterated, bayes; the first decides")
    noise.add_argument("--limit", type=int, default=512, help="so many validation images, class-balanced")
    noise.add_argument("--save", action="store_true", help="make it the choice of the run, in its config.json")

    bench = add_command(commands, "bench", _bench, "What things cost on this machine, as ratios of work run in alternation.")
    bench.add_argument(
        "which",
        nargs="?",
        default="speed",
        help="speed (the figures this kit is held to), scaling, classify, decode, strategies (a training step), page (in a "
        "Chromium), memory (of the page under visitors; --repeats is minutes), or plan (how --run is decoded fastest)",
    )
    bench.add_argument("--repeats", type=int, default=3, help="rounds")
    bench.add_argument("--run", dest="run_name", metavar="RUN", help="plan: the run to calibrate")
    bench.add_argument("--guidance", type=float, default=0.0, help="plan: classifier-free guidance weight")
    bench.add_argument("--save", action="store_true", help="plan: keep it in the run directory")
    bench.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    add_device(bench)
    _add_csv(bench)


def _add_csv(command: argparse.ArgumentParser) -> None:
    add_output(command, "--csv", metavar="FILE", help="also write the table, protocol columns included")


# --- trace ------------------------------------------------------------------------------------------------------------


def _register_trace(commands: Any) -> None:
    trace = add_command(commands, "trace", _trace, "Follow images or noise through the blocks and look at inner states.")
    add_run(trace)
    trace.add_argument("images", nargs="*", metavar="IMAGE", help="picture files (none: rows of a split, or noise)")
    trace.add_argument("--rows", default="0..7", help="rows of the split: 3, or 0..9, or 1,4,7")
    trace.add_argument("--split", default="test", help="train, val or test")
    trace.add_argument("--seeds", help="start from fresh noise with these seeds instead, spelled like --rows")
    trace.add_argument("--direction", default="reverse", help="forward (image to noise) or reverse (noise to image)")
    trace.add_argument("--taps", default="block.*.layer.*", help="which states: names or patterns, separated by commas")
    trace.add_argument("--label", default="none", help="a class for all or one for each, own (the split's), or none")
    trace.add_argument("--guidance", type=float, default=0.0, help="classifier-free guidance weight")
    trace.add_argument("--temperature", type=float, default=1.0, help="of the unconditional branch, so only with guidance")
    add_output(trace, "--out", metavar="FILE", help="write states and path to a .safetensors file")
    add_output(trace, "--picture", metavar="FILE", help="write the path of every image as a picture")
    _add_csv(trace)


def _trace(given: argparse.Namespace) -> int:
    import pandas as pd
    import torch

    from rrepa_lab.analysis.trace import state_gap, trace
    from rrepa_lab.measurements.columns import about, place
    from rrepa_lab.runs.store import load
    from rrepa_lab.sampling.sample import noise
    from rrepa_lab.viz.images import grid, picture_format, save_picture

    if given.out and not given.out.endswith(".safetensors"):
        raise LabError(f"--out must be a .safetensors file, not {given.out}")
    if given.picture:
        picture_format(given.picture)
    run = load(given.run_name, given.device)
    y: Any = None
    if given.seeds:
        if given.images:
            raise LabError("give picture files or --seeds, not both")
        source, numbers = noise(run.flow, integers("--seeds", given.seeds)), given.seeds
        own = None
    elif given.images:
        source, own, numbers = _pictures(run, given.images)[0], None, ", ".join(given.images)
    else:
        images = run.images(given.split)
        rows = integers("--rows", given.rows)
        if max(rows) >= len(images) or min(rows) < 0:
            raise LabError(f"--rows {given.rows}: the {given.split} split has rows 0..{len(images) - 1}")
        source, own = (part.to(run.device) for part in images.__getitems__(rows))
        numbers = f"{given.split} {given.rows}"
    if given.label == "own":
        if own is None:
            raise LabError("--label own needs rows of a split: pictures and noise have no label of their own")
        y = own
    elif given.label != "none":
        ids = class_labels("--label", given.label, run.classes)
        if len(ids) not in (1, len(source)):
            raise LabError(f"--label {given.label}: {len(ids)} labels for {len(source)} sources; give one, or one for each")
        y = torch.tensor(ids * (len(source) // len(ids)))
    taps = words(given.taps)
    steered = {"guidance": given.guidance, "temperature": given.temperature}
    result = trace(run, source, y, given.direction, taps, **steered)
    other = None
    if source.ndim == 4:
        opposite = "forward" if result.direction == "reverse" else "reverse"
        other = trace(run, source, y, opposite, taps, **steered, path=False, check=False)
    lines = []
    for tap in run.flow.resolve(taps):
        state = result.states[tap.name]
        line = {"shape": "x".join(map(str, state.shape)), "mean": float(state.mean()), "spread": float(state.std())}
        lines.append({**about(run), **place(tap), **line} | (state_gap(result, other, tap.name) if other else {}))
    table = pd.DataFrame(lines)
    error = float(result.error.max())
    table = table.assign(
        round_trip_error=error, direction=result.direction, source=numbers, label=given.label, **steered,
        n=len(source), device=given.device,
    )  # fmt: skip
    write_csv(given.csv, table)
    if given.out:
        _save_states(Path(given.out), result.states, result.images)
    if given.picture:
        save_picture(grid(torch.stack(list(result.images.values()), dim=1).flatten(0, 1), len(result.images)), given.picture)
    if given.json:
        print_rows(table.to_dict("records"), True)
        return 0
    shown = ["tap", "module_path", "shape", "mean", "spread", *(["relative_gap"] if "relative_gap" in table else [])]
    print_rows(table[shown].to_dict("records"), False, floats=".3g")
    print(f"\nlargest error after going there and back: {error:.1e} ({len(source)} sources, {given.direction})")
    if "relative_gap" in table:
        print(
            f"largest difference of a state between the directions, relative to its spread: {table['relative_gap'].max():.1e}"
        )
    hint(given, f"what the layers know: rrepa-lab probe {given.run_name}")
    return 0


def _save_states(path: Path, states: dict[str, "Tensor"], images: dict[str, "Tensor"]) -> None:
    from safetensors.torch import save_file

    from rrepa_lab.files import write_atomically

    named = states | {f"path.{name}": image for name, image in images.items()}
    write_atomically(path, lambda temporary: save_file({name: value.contiguous() for name, value in named.items()}, temporary))


def _pictures(run: "Run", paths: list[str]) -> tuple["Tensor", list[str]]:
    """Picture files as the flow reads them, (B, C, H, W), and what was done to each."""
    import torch

    from rrepa_lab.data.pictures import read_picture
    from rrepa_lab.data.prepare import prepare

    images = [prepare(read_picture(path), run.config.data) for path in paths]
    return torch.cat([image.x for image in images]).to(run.device), [image.how for image in images]


# --- classify ---------------------------------------------------------------------------------------------------------


def _register_classify(commands: Any) -> None:
    classify = add_command(commands, "classify", _classify, "Read the class of pictures, or of a whole split, off a flow.")
    add_run(classify)
    classify.add_argument("images", nargs="*", metavar="IMAGE", help="picture files")
    classify.add_argument("--split", help="classify a split instead, and report accuracy, confusion and calibration")
    classify.add_argument("--limit", type=int, help="so many images of the split, class-balanced")
    classify.add_argument("--method", default="gradient", help="gradient, bayes or iterated")
    classify.add_argument("--draws", type=int, help="noise draws to average over; 0: clean images (none: the run's own choice)")
    classify.add_argument("--blocks", help="only these blocks see the label: 4, or 3..4")
    classify.add_argument("--steps", type=int, default=20, help="of iterated: gradient steps at most")
    classify.add_argument("--step-size", type=float, default=0.3, help="of iterated: logits for one nat per logit")
    classify.add_argument("--seed", type=int, default=0, help="of the noise draws")
    _add_csv(classify)


def _classify(given: argparse.Namespace) -> int:
    import pandas as pd

    from rrepa_lab.analysis.classify import classify
    from rrepa_lab.runs.store import load

    if bool(given.images) == bool(given.split):
        raise LabError("give picture files, or --split test")
    run = load(given.run_name, given.device)
    settings: dict[str, Any] = {
        "draws": given.draws, "blocks": integers("--blocks", given.blocks) if given.blocks else None,
        "steps": given.steps, "step_size": given.step_size, "seed": given.seed,
    }  # fmt: skip
    if given.split:
        return _classify_split(given, run, settings)
    x, how = _pictures(run, given.images)
    result = classify(run, x, given.method, **settings)
    rows: list[dict[str, Any]] = []
    for path, done, scores, label, runner_up, margin, probability in zip(
        given.images, how, result.scores.tolist(), result.label.tolist(), result.top(2).labels[:, -1].tolist(),
        result.margin.tolist(), result.probability.amax(dim=1).tolist(), strict=True,
    ):  # fmt: skip
        row = {"image": path, "label": run.classes[label], "margin": margin, "runner_up": run.classes[runner_up]}
        row |= {"confidence": probability, "method": given.method} | ({"prepared": done} if any(how) else {})
        rows.append({**row, "scores": dict(zip(run.classes, scores, strict=True))} if given.json else row)
    write_csv(given.csv, pd.DataFrame(rows).drop(columns="scores", errors="ignore"))
    print_rows(rows, given.json)
    hint(given, f"score a whole split: rrepa-lab classify {given.run_name} --split test")
    return 0


def _classify_split(given: argparse.Namespace, run: "Run", settings: dict[str, Any]) -> int:
    from rrepa_lab.analysis.report import classification_report

    report = classification_report(run, given.method, split=given.split, limit=given.limit, **settings)
    write_csv(given.csv, report.images)
    if given.json:
        print_json({name: table.to_dict("records") for name, table in report._asdict().items() if name != "images"})
        return 0
    print_rows(report.summary[["metric", "value", "standard_error", "n"]].to_dict("records"), False)
    wide = report.confusion.pivot(index="class", columns="predicted", values="count")[run.classes].loc[run.classes]
    accuracy = report.per_class.set_index("class")["accuracy"]
    print(f"\nrows: the class; columns: the answer; {run.name}, {given.method}, {given.split} split\n")
    rows = [[name, *counts, accuracy.get(name)] for name, counts in zip(run.classes, wide.to_numpy().tolist(), strict=True)]
    print_table(rows, ["class", *run.classes, "accuracy"])
    hint(given, f"how far the layers are: rrepa-lab probe {given.run_name} --classifiers gradient,bayes")
    return 0


# --- probe ------------------------------------------------------------------------------------------------------------


def _register_probe(commands: Any) -> None:
    probe = add_command(commands, "probe", _probe, "What every layer knows: probes, and similarity to the encoder.")
    probe.add_argument("runs", nargs="+", metavar="RUN", help="bundled or local runs, run directories, or Hub ids")
    add_device(probe)
    probe.add_argument(
        "--metrics", default="linear,knn",
        help="of linear, knn, cknna, cka, mutual_knn, teacher_cosine, separated by commas",
    )  # fmt: skip
    probe.add_argument("--taps", default="block.*.layer.*", help="which states: names or patterns, separated by commas")
    probe.add_argument("--direction", default="forward", help="forward (real images) or reverse (generated from noise)")
    probe.add_argument("--classifiers", default="", help="of gradient, bayes, iterated: their accuracy beside the probes")
    probe.add_argument("--pool", default="mean", help="mean over tokens, all tokens side by side, or both (probes only)")
    probe.add_argument(
        "--draws", type=int, help="noise draws on real images to average over; 0: clean ones (none: the run's own choice)"
    )
    probe.add_argument("--noise-std", type=float, help="sigma of these draws (none: the run's own choice)")
    probe.add_argument("--neighbours", type=int, help="of k-NN (default 5) and of CKNNA and mutual k-NN (default 10)")
    probe.add_argument("--solver", default="auto", help="of the linear probes: auto, sklearn or torch")
    probe.add_argument("--samples", type=int, default=1000, help="reverse: how many are generated")
    probe.add_argument("--guidance", type=float, default=0.0, help="reverse: classifier-free guidance weight")
    probe.add_argument("--limit", type=int, help="so many images of each split, class-balanced")
    probe.add_argument("--no-baselines", action="store_true", help="leave out pixels and encoder")
    probe.add_argument("--feed-label", action="store_true", help="let the flow see the true class (probes then read it back)")
    probe.add_argument("--force", action="store_true", help="probe features that were fed the label all the same")
    probe.add_argument("--seed", type=int, default=0, help="of noise and samples")
    add_output(probe, "--figure", metavar="FILE.html", help="write curves and heat maps of every metric")
    _add_csv(probe)


def _probe(given: argparse.Namespace) -> int:
    import pandas as pd

    from rrepa_lab.analysis.probe import PROBES, best_layer, probe
    from rrepa_lab.analysis.similarity import METRICS, similarity
    from rrepa_lab.errors import unknown
    from rrepa_lab.runs.run import check_names
    from rrepa_lab.runs.store import load

    metrics, taps = words(given.metrics), words(given.taps)
    for name in metrics:
        if name not in (*PROBES, *METRICS):
            raise unknown("metric", name, (*PROBES, *METRICS))
    if given.figure and not given.figure.endswith(".html"):
        raise LabError(f"--figure must be an .html file, not {given.figure}")
    runs = [load(name, given.device) for name in given.runs]
    check_names(runs)
    shared: dict[str, Any] = {
        "direction": given.direction, "pool": given.pool, "draws": given.draws, "noise_std": given.noise_std,
        "samples": given.samples, "guidance": given.guidance, "feed_label": given.feed_label, "seed": given.seed,
    }  # fmt: skip
    if given.neighbours is not None:
        shared["neighbours"] = given.neighbours
    tables = []
    probes, likenesses = ([name for name in metrics if name in kind] for kind in (PROBES, METRICS))
    if probes:
        tables.append(
            probe(
                runs, taps, probes=probes, classifiers=words(given.classifiers), baselines=not given.no_baselines,
                solver=given.solver, force=given.force, limit=given.limit, **shared,
            )
        )  # fmt: skip
    if given.pool == "both":
        shared["pool"] = "mean"
    for run in runs if likenesses else []:
        # of several runs, those without projectors have no cosine
        own = [name for name in likenesses if name != "teacher_cosine" or run.projectors.taps or len(runs) == 1]
        tables.append(similarity(run, None, taps, metrics=own, limit=given.limit or 1000, **shared))
    table = pd.concat(tables, ignore_index=True)
    write_csv(given.csv, table)
    if given.figure:
        _probe_figures(Path(given.figure), table)
    if given.json:
        print_rows(table.to_dict("records"), True)
        return 0
    table["where"] = table["tap"].where(table["tap"] != "", table["metric"].str.removesuffix("_accuracy"))
    table["what"] = table["metric"].where(table["tap"] != "", "linear_accuracy")
    if given.pool == "both":
        table["what"] += table["pool"].map({"all": ", all tokens"}).fillna("")
    keys = ["run", "what"] if len(runs) > 1 else ["what"]
    wide = table.set_index(["where", *keys])["value"].unstack(keys, sort=False)
    wide.columns = [" ".join(key) if isinstance(key, tuple) else key for key in wide.columns]
    print_rows([{"": where, **row} for where, row in zip(wide.index, wide.to_dict("records"), strict=True)], False)
    print()
    for metric in dict.fromkeys(table.loc[table["layer"] > 0, "metric"]):
        for row in best_layer(table, metric).itertuples():
            print(f"best layer by {metric}: {row.run} {row.tap} ({row.module_path}) {row.value:.4f}, n = {row.n}")
    again = f"the same as curves: rrepa-lab probe {' '.join(given.runs)} --classifiers gradient --figure layers.html"
    hint(given, f"open {given.figure} in a browser" if given.figure else again)
    return 0


def _probe_figures(path: Path, table: "pd.DataFrame") -> None:
    from rrepa_lab.files import write_text
    from rrepa_lab.viz.layers import layer_curves, layer_map

    metrics = list(dict.fromkeys(table.loc[table["layer"] > 0, "metric"]))
    figures = [draw(table, metric) for metric in metrics for draw in (layer_curves, layer_map)]
    parts = [figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(figures)]
    head = '<!doctype html><meta charset="utf-8"><title>Layers</title><body style="max-width:1000px;margin:auto">'
    write_text(path, head + "\n".join(parts))


# --- evaluate, bench --------------------------------------------------------------------------------------------------


def _evaluate(given: argparse.Namespace) -> int:
    from rrepa_lab.evaluation.evaluate import evaluate
    from rrepa_lab.runs.card import save_scores
    from rrepa_lab.runs.store import load

    run = load(given.run_name, given.device)
    table = evaluate(run, words(given.split), given.samples, given.draws)
    if given.save and run.directory is not None:
        save_scores(run, table)
    print_rows(table.to_dict("records"), given.json)
    hint(given, f"see what it draws: rrepa-lab sample {given.run_name} {sample_options(run.config.flow.classes)}")
    return 0


def _read_noise(given: argparse.Namespace) -> int:
    from rrepa_lab.analysis.noise_choice import choose_read_noise, save_read_noise
    from rrepa_lab.runs.store import load

    run = load(given.run_name, given.device)
    draws = integers("--draws", given.draws)
    table = choose_read_noise(run, draws=draws, methods=words(given.methods), limit=given.limit)
    if given.save:
        save_read_noise(run, table)
    shown = ["metric", "draws", "noise_std", "value", "standard_error", "n", "protocol", "chosen"]
    print_rows(table.to_dict("records") if given.json else table[shown].to_dict("records"), given.json)
    if not given.save:
        hint(given, f"make it the choice of the run: rrepa-lab read-noise {given.run_name} --save")
    return 0


BENCH_COLUMNS = (
    "what", "against", "kind", "over", "size", "case", "classes", "ratio", "low", "high", "required", "aim", "met", "seconds",
    "fastest", "slowest", "seconds_per_image", "reference", "error", "kept_mib", "rss_mib", "growth_mib",
    "answers", "gflops", "part_of_ceiling",
)  # fmt: skip
BENCH_PROTOCOL = ("images", "flow", "ceiling_gflops", "repeats", "threads", "device", "torch")


def _plan(given: argparse.Namespace) -> int:
    import torch

    from rrepa_lab.bench.timing import limited_threads
    from rrepa_lab.runs.store import load
    from rrepa_lab.sampling.calibrate import calibrate

    if given.run_name is None:
        raise LabError("which run shall be calibrated? add --run RUN, for example --run digits-reverse")
    run = load(given.run_name, given.device)
    with limited_threads(given.threads):
        plan = calibrate(run, given.guidance, given.repeats, save=given.save)
    facts = {"run": run.name, **plan.to_dict(), "threads": given.threads, "torch": torch.__version__}
    print_facts(facts | {"kept in": str(run.directory) if given.save else "nothing (--save keeps it)"}, given.json)
    return 0


def _bench(given: argparse.Namespace) -> int:
    from rrepa_lab.bench import bench

    if given.which == "plan":
        return _plan(given)
    table = bench(given.which, given.repeats, given.threads, given.device)
    write_csv(given.csv, table)
    if given.json:
        print_rows(table.to_dict("records"), True)
        return 0
    shown = [column for column in BENCH_COLUMNS if column in table and table[column].notna().any()]
    small = "error" in shown or given.which in ("speed", "scaling")  # many powers of ten side by side
    print_rows(table[shown].to_dict("records"), False, ".3g" if small else ".4f")
    first = table.iloc[0]
    print_facts({name: first[name] for name in BENCH_PROTOCOL if name in table}, False)
    return 0
