"""The course: every notebook runs under papermill, its source is kept clean, and all of them speak the same language.

`00` and `03` run by default; all of them, and each with another strategy, under `pytest -m notebooks`.
"""

import json
from collections import defaultdict

import pytest

import rrepa_lab as rl
from rrepa_lab.batch.notebook import read_notebook
from rrepa_lab.measurements.results import read_result
from rrepa_lab.paths import bundled

NOTEBOOKS = sorted(bundled("notebooks").glob("*.ipynb"))
BY_DEFAULT = ("00_start_here",)
# another strategy for each
OTHERWISE = {
    "00_start_here": {"run_dir": "digits-detach"},
    "01_there_and_back": {"run_dir": "digits-forward"},
    "02_train_a_tiny_flow": {"strategy": "detach", "align_blocks": [1, 2]},
    "03_alignment_strategies": {"strategy": "detach", "align_blocks": [1]},
    "04_per_layer_probing": {"runs": ["digits-detach"]},
    "05_training_free_classification": {"run_dir": "digits-forward"},
    "06_feature_maps_and_umap": {"runs": ["digits-detach"]},
    "07_sampling_guidance_denoising": {"run_dir": "digits-none"},
    "08_latent_flows": {"channels": 3, "kl_weight": 0.01},
    "09_compare_runs": {"runs": ["digits-detach", "digits-forward"]},
    "10_interventions": {"run_dir": "digits-detach", "tap": "block.4.layer.2", "strengths": [0.0, 2.0]},
}
# what each of them must have measured
METRICS = {
    "00_start_here": {"nats_per_dim", "gradient_accuracy", "bayes_accuracy"},
    "01_there_and_back": {"nats_per_dim", "round_trip_error", "relative_gap"},
    "02_train_a_tiny_flow": {"nats_per_dim", "gradient_accuracy", "bayes_accuracy", "FD[digits]", "label_agreement"},
    "03_alignment_strategies": {"nats_per_dim", "gradient_accuracy", "bayes_accuracy"},
    "04_per_layer_probing": {"linear_accuracy", "cka", "lds"},
    "05_training_free_classification": {"gradient_accuracy", "bayes_accuracy", "iterated_accuracy"},
    "06_feature_maps_and_umap": {"knn_accuracy"},
    "07_sampling_guidance_denoising": {"FD[digits]", "label_agreement"},
    "08_latent_flows": {"nats_per_dim", "reconstruction_psnr", "FD[digits]", "rFD[digits]"},
    "09_compare_runs": set(),
    "10_interventions": {"patch_cost", "patch_position", "steer_cost", "steer_class", "ablation_cost", "condition"},
}


QUICK = [
    pytest.param(path, {}, id=path.stem, marks=() if path.stem in BY_DEFAULT else pytest.mark.notebooks) for path in NOTEBOOKS
]
OTHER = [
    pytest.param(path, OTHERWISE[path.stem], id=f"{path.stem}-otherwise", marks=pytest.mark.notebooks) for path in NOTEBOOKS
]


@pytest.mark.filterwarnings("ignore")  # jupyter's own: kernels over TCP, platform folders
@pytest.mark.parametrize(("path", "change"), QUICK + OTHER)
def test_notebook_runs_in_its_quick_setting(path, change, tmp_path):
    papermill = pytest.importorskip("papermill")
    read_notebook(path).check(change)
    parameters = {"out_dir": str(tmp_path), **change}
    out = tmp_path / path.name
    executed = papermill.execute_notebook(
        path, out, parameters, progress_bar=False, execution_timeout=300, store_widget_state=False
    )
    assert out.stat().st_size < 2_000_000
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs
    complaints = [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    if path.stem.startswith("07"):  # a weight of 4 may drive pixels far out of range, which is said and belongs to the lesson
        complaints = [output for output in complaints if "are clipped; guidance 4" not in output.get("text", "")]
    assert not complaints
    assert not [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    result = read_result(tmp_path / "result.json")
    assert result.notebook == path.stem
    assert METRICS[path.stem] <= {row.metric for row in result.measurements}
    assert all(row.protocol for row in result.measurements)
    if result.measurements:
        assert len(rl.compare(tmp_path / "result.json"))
    for named in ("run_dir", "runs"):
        wanted = change.get(named, [])
        assert set([wanted] if isinstance(wanted, str) else wanted) <= {*result.runs, *result.facts.get("sources", [])}
    if "strategy" in change:
        assert [config.align.strategy for config in result.runs.values()] == [change["strategy"]]
        assert [config.align.blocks for config in result.runs.values()] == [change["align_blocks"]]
    if path.stem == "01_there_and_back":
        values = {row.metric: row.value for row in result.measurements}
        assert values["round_trip_error"] < 1e-3
        assert values["relative_gap"] < 1e-2
    if path.stem == "09_compare_runs":
        assert "Plotly.newPlot" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_source(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert cells[0]["cell_type"] == "markdown"
    assert cells[0]["source"][0].startswith("# ")
    assert any(line.startswith("**") and line.rstrip().endswith("?**") for line in cells[0]["source"]), "question first"
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert not any(line.lstrip().startswith(("def ", "class ", "async def ")) for cell in code for line in cell["source"])
    assert not any("!pip" in line or "/home/" in line or "/tmp/" in line for cell in cells for line in cell["source"])
    (parameters,) = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert all(":" in line and "#" in line for line in parameters["source"]), "typed and commented"


def test_parameters_mean_the_same_everywhere():
    kinds: dict[str, set[str]] = defaultdict(set)
    for path in NOTEBOOKS:
        parameters = read_notebook(path).parameters
        assert {"quick", "device", "out_dir"} <= parameters.keys(), path.stem
        assert list(parameters)[-1] == "out_dir", path.stem
        assert parameters["quick"].default is True
        assert parameters["device"].default == "auto"
        for parameter in parameters.values():
            assert parameter.help, f"{path.stem}: {parameter.name} says nothing"
            kinds[parameter.name].add(parameter.kind)
    assert not {name: found for name, found in kinds.items() if len(found) > 1}


def test_the_course_is_complete():
    assert [path.stem for path in NOTEBOOKS] == sorted(METRICS) == sorted(OTHERWISE)
    first = NOTEBOOKS[0].read_text()
    assert [path.stem for path in NOTEBOOKS[1:] if f"| `{path.stem}` |" not in first] == []
