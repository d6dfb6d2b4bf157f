"""Tables and figures of the report of the benchmarks, each a function of the committed CSV files; see `report`."""

from collections.abc import Callable
from functools import partial

import pandas as pd

from rrepa_lab.studies.report_text import markdown, study_table

COSTS = ("encode", "cached", "jacobi", "classify")


def speed() -> str:
    """Every ratio of `rrepa-lab bench speed`: median and extremes over rounds, what is required, and whether it is met."""
    rows = []
    for row in study_table("bench-speed").to_dict("records"):
        suffix = {"faster": "x faster", "cost": "x", "error": ""}[row["kind"]]
        digits = 2 if row["kind"] == "cost" or row["ratio"] < 1.5 else 1
        if row["kind"] == "error":
            measured, required = f"{row['ratio']:.0e}", f"at most {row['required']:.0e}"
        else:
            text = f"{row['ratio']:.{digits}f}" if row["ratio"] > 0.1 else f"{row['ratio']:.2g}"
            single = row["low"] == row["high"]
            measured = text + suffix + ("" if single else f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]")
            required = f"{'at least' if row['kind'] == 'faster' else 'at most'} {row['required']:g}x"
        rows.append([row["what"], row["against"], measured, required, "met" if row["met"] else "**missed**"])
    return markdown(("case", "against", "measured [lowest, highest round]", "required", ""), rows)


def page() -> str:
    """Seconds until the page answers."""
    table = study_table("bench-page")
    columns = ("seconds", "fastest", "slowest")
    rows = [[row["case"], *(f"{row[name]:.2f}" for name in columns)] for row in table.to_dict("records")]
    return markdown(("case", "median, s", "fastest", "slowest"), rows)


def memory() -> str:
    """Resident memory of the page by the minute."""
    table = study_table("bench-memory")
    rows = [
        [row["case"], f"{row['rss_mib']:.0f}", "" if pd.isna(row["growth_mib"]) else f"{row['growth_mib']:.1f}", row["answers"]]
        for row in table.to_dict("records")
    ]
    return markdown(("", "resident, MiB", "added, MiB", "answers so far"), rows)


def scaling() -> str:
    """Seconds of encoding, both ways of decoding and one gradient step, by what grows."""
    table = study_table("bench-scaling")
    rows = []
    for (over, size), part in table.groupby(["over", "size"], sort=False):
        own = part.set_index("kind")["seconds"]
        rows.append([str(over), str(size), *(f"{own[kind]:.3f}" if kind in own else "-" for kind in COSTS)])
    return markdown(("grows", "to", "encoding, s", "`cached`, s", "`jacobi`, s", "one gradient step, s"), rows)


def classification() -> str:
    """Seconds of one gradient step and of Bayes' rule by the number of classes."""
    words = {"gradient": "one gradient step", "bayes": "Bayes' rule"}
    rows = [
        [words[row["case"]], row["classes"], f"{row['seconds']:.3f}", f"{row['ratio']:.2f}"]
        for row in study_table("bench-classification").to_dict("records")
    ]
    return markdown(("method", "classes", "16 images, s", "times the cost of 10 classes"), rows)


def data() -> str:
    """Part of a training step that waits for images, by where they come from and how many workers read ahead."""
    rows = []
    for row in study_table("bench-data").to_dict("records"):
        wait = f"{row['data_wait']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"
        rows.append(
            [
                row["data"],
                f"{row['size']} px",
                row["workers"],
                row["case"],
                row["repeats"],
                wait,
                f"{1000 * row['seconds']:.0f}",
            ]
        )
    return markdown(("images", "size", "workers", "read from", "rounds", "waiting [lowest, highest round]", "a step, ms"), rows)


def processes() -> str:
    """Memory that each of two processes keeps, weights copied or sharded."""
    rows = []
    for row in study_table("bench-processes").to_dict("records"):
        names = ("parameters", "gradients", "optimizer", "average", "kept", "rss", "peak")
        rows.append([f"`{row['case']}`", *(f"{row[f'{name}_mib']:.0f}" for name in names)])
    columns = (
        "",
        "parameters, MiB",
        "gradients",
        "moments",
        "averaged weights",
        "together",
        "resident grew by",
        "peak",
    )
    return markdown(columns, rows)


def processes_flow() -> str:
    """The flow whose memory was measured."""
    row = study_table("bench-processes").iloc[0]
    return f"{row['flow']}, {row['parameters'] / 1e6:.0f} M parameters"


def gflops(what: str | None) -> str:
    """Operations a second, 1e9, of a case of the speed table; None: the ceiling of large products."""
    table = study_table("bench-speed")
    value = table["ceiling_gflops"].iloc[0] if what is None else table[table["what"] == what]["gflops"].iloc[0]
    return f"{value:.0f}"


def growth(kind: str) -> str:
    """Seconds with the most tokens over those with the fewest."""
    table = study_table("bench-scaling")
    seconds = table[(table["kind"] == kind) & (table["over"] == "tokens")]["seconds"]
    return f"{seconds.iloc[-1] / seconds.iloc[0]:.0f}"


def machine() -> str:
    """Processor, threads and torch of the speed table."""
    row = study_table("bench-speed").iloc[0]
    return f"{row['threads']} threads of a shared {row['device']}, float32, torch {str(row['torch']).partition('+')[0]}"


def rounds(name: str) -> str:
    """How often a benchmark was repeated."""
    return str(study_table(name)["repeats"].iloc[0])


def memory_growth() -> str:
    """MiB that the page added after the first minute of visits."""
    table = study_table("bench-memory").set_index("case")["rss_mib"]
    return f"{table.iloc[-1] - table['minute 1']:.0f}"


TABLES: dict[str, Callable[[], str]] = {
    "bench-speed": speed,
    "bench-page": page,
    "bench-memory": memory,
    "bench-scaling": scaling,
    "bench-classification": classification,
    "bench-data": data,
    "bench-processes": processes,
}
VALUES: dict[str, Callable[[], str]] = {
    "machine": machine,
    "ceiling-gflops": partial(gflops, None),
    "sampling-gflops": partial(gflops, "guided sampling, 16 images"),
    "growth-encode": partial(growth, "encode"),
    "growth-cached": partial(growth, "cached"),
    "growth-jacobi": partial(growth, "jacobi"),
    "page-repeats": partial(rounds, "bench-page"),
    "scaling-repeats": partial(rounds, "bench-scaling"),
    "classification-repeats": partial(rounds, "bench-classification"),
    "memory-growth": memory_growth,
    "processes-flow": processes_flow,
}
