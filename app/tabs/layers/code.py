"""The view of the tab "Layers" as code."""

from page.panels import Code
from server.runs import get_run, pair
from server.shipped import OVER_SEEDS, shipped_name
from tabs.layers.studies import SHIPPED_STUDY, chosen, read_study
from tabs.layers.tables import KINDS, known_rows, limit_for
from tabs.layers.view import LayersView

from rrepa_lab.analysis.spatial import SPATIAL_METRICS
from rrepa_lab.errors import LabError
from rrepa_lab.studies.alignment import BUNDLED, MEASURES


def code(view: LayersView) -> Code:
    """The rows of the table, and the layers, curves and scores of A and B."""
    metric, direction = view.metric, view.direction
    rows, _ = known_rows(pair(view.run, view.other), metric, direction, view.source, view.strategies)
    names = list(dict.fromkeys(rows["run"]))
    short = metric.removesuffix("_accuracy")
    imports = ["import rrepa_lab as rl", "from rrepa_lab.studies.alignment import load_study_tables, unguided"]
    lines: list[str] = []
    shell = ""
    table = shipped_name(get_run(view.run), view.source)
    if table is None:
        imports.insert(0, "import pandas as pd")
        lines += ["table = pd.concat(["]
        lines += [f"    {_measuring(name, short, direction)}," for name in pair(view.run, view.other)] + ["])"]
        names = names or list(pair(view.run, view.other))
    else:
        imports.append("from rrepa_lab.studies.reading import load_table")
        lines += [f'table = load_table("{table}")']
        lines += [f'table = table[table["strategy"].isin({list(view.strategies)})]']
    if table not in OVER_SEEDS and names:
        limits = {limit_for(get_run(name)) for name in names} - {None}
        limit = f" --limit {limits.pop()}" if limits else ""
        shell = f"rrepa-lab probe {' '.join(names)} --metrics {short} --direction {direction}{limit}"
    lines += [f'rows = unguided(table, "{metric}", "{direction}")']
    if (rows["layer"] > 0).any():
        lines += [f'best = rl.best_layer(rows, "{metric}")']
    try:
        study = read_study(view.study)
    except LabError:
        return Code(shell, "\n".join([*imports, "", *lines, "print(rows)"]))
    imports.append("from rrepa_lab.paths import " + ("assets" if view.study == SHIPPED_STUDY else "runs_root"))
    folder = f'runs_root() / "{view.study}"'
    scores = f'assets() / "studies" / "{BUNDLED}-runs.csv"' if view.study == SHIPPED_STUDY else f'{folder} / "{MEASURES}"'
    settings = [one["run"] for one in chosen(study, *view.choices).values()]
    lines += ["", f"settings = {settings}"]
    if study.curves is not None:
        lines += [f"layers, curves = load_study_tables({'' if view.study == SHIPPED_STUDY else folder})"]
        if study.layers is not None:
            lines += [f'compared = unguided(layers[layers["run"].isin(settings)], "{metric}", "{direction}")']
        lines += ['curves = curves[curves["run"].isin(settings)]']
    lines += [f"scores = rl.compare({scores}, apart=True)", "print(rows, scores)"]
    return Code(shell, "\n".join([*sorted(imports, key=lambda line: (line.startswith("from"), line)), "", *lines]))


def _measuring(name: str, short: str, direction: str) -> str:
    """The call that measures one run by one metric."""
    limit = limit_for(get_run(name))
    how = f'protocol=rl.FeatureProtocol("{direction}")'
    more = f", limit={limit}" if limit else ""
    call = f'rl.probe(rl.load("{name}"), probes=["{short}"], {how}{more})'
    if short not in KINDS:
        metrics = "" if short == "teacher_cosine" else f', metrics=["{short}"]'
        more = f", images=rl.Images(limit={limit})" if limit else ""
        instrument = "spatial_structure" if short in SPATIAL_METRICS else "similarity"
        call = f'rl.{instrument}(rl.load("{name}"){metrics}, {how}{more})'
    return f'{call}.assign(run="{name}")'
