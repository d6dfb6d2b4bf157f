"""An exploration kit for normalizing flows with representation alignment.

>>> import rrepa_lab as rl
>>> run = rl.load("digits-reverse")
>>> rl.classify(run, run.data("test").x[:4]).scores.shape
torch.Size([4, 10])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rrepa_lab.align.measure import Alignment, alignment
    from rrepa_lab.align.routing import gradient_ratio, refinement_errors, routing
    from rrepa_lab.analysis.classify import Classification, classify, classify_steps, evidence
    from rrepa_lab.analysis.compare import compare
    from rrepa_lab.analysis.embed import embed, neighbours, patch_colours
    from rrepa_lab.analysis.evaluate import evaluate, evaluate_samples
    from rrepa_lab.analysis.floors import position_floor, teacher_floors
    from rrepa_lab.analysis.noise_choice import choose_read_noise
    from rrepa_lab.analysis.probe import best_layer, probe
    from rrepa_lab.analysis.report import ClassificationReport, classification_report
    from rrepa_lab.analysis.similarity import similarity
    from rrepa_lab.analysis.trace import Trace, agreement, trace
    from rrepa_lab.errors import LabError
    from rrepa_lab.flow.tarflow import FlowConfig, FlowOutput, InverseOutput, TarFlow
    from rrepa_lab.presets import preset
    from rrepa_lab.published import import_tarflow
    from rrepa_lab.results import write_result
    from rrepa_lab.runs import Run, RunConfig, RunInfo, available, load
    from rrepa_lab.sampling.calibrate import calibrate
    from rrepa_lab.sampling.sample import Samples, sample
    from rrepa_lab.training.loop import StepReport, train

# public name -> module; each is imported when first used, so that `import rrepa_lab` is quick
_HOMES = {
    "Alignment": "align.measure",
    "alignment": "align.measure",
    "gradient_ratio": "align.routing",
    "refinement_errors": "align.routing",
    "routing": "align.routing",
    "Classification": "analysis.classify",
    "classify": "analysis.classify",
    "classify_steps": "analysis.classify",
    "evidence": "analysis.classify",
    "compare": "analysis.compare",
    "embed": "analysis.embed",
    "neighbours": "analysis.embed",
    "patch_colours": "analysis.embed",
    "evaluate": "analysis.evaluate",
    "evaluate_samples": "analysis.evaluate",
    "position_floor": "analysis.floors",
    "teacher_floors": "analysis.floors",
    "choose_read_noise": "analysis.noise_choice",
    "best_layer": "analysis.probe",
    "probe": "analysis.probe",
    "ClassificationReport": "analysis.report",
    "classification_report": "analysis.report",
    "similarity": "analysis.similarity",
    "Trace": "analysis.trace",
    "agreement": "analysis.trace",
    "trace": "analysis.trace",
    "LabError": "errors",
    "FlowConfig": "flow.tarflow",
    "FlowOutput": "flow.tarflow",
    "InverseOutput": "flow.tarflow",
    "TarFlow": "flow.tarflow",
    "preset": "presets",
    "import_tarflow": "published",
    "write_result": "results",
    "Run": "runs",
    "RunConfig": "runs",
    "RunInfo": "runs",
    "available": "runs",
    "load": "runs",
    "calibrate": "sampling.calibrate",
    "Samples": "sampling.sample",
    "sample": "sampling.sample",
    "StepReport": "training.loop",
    "train": "training.loop",
}

__all__ = [
    "Alignment",
    "Classification",
    "ClassificationReport",
    "FlowConfig",
    "FlowOutput",
    "InverseOutput",
    "LabError",
    "Run",
    "RunConfig",
    "RunInfo",
    "Samples",
    "StepReport",
    "TarFlow",
    "Trace",
    "agreement",
    "alignment",
    "available",
    "best_layer",
    "calibrate",
    "choose_read_noise",
    "classification_report",
    "classify",
    "classify_steps",
    "compare",
    "embed",
    "evaluate",
    "evaluate_samples",
    "evidence",
    "gradient_ratio",
    "import_tarflow",
    "load",
    "neighbours",
    "patch_colours",
    "position_floor",
    "preset",
    "probe",
    "refinement_errors",
    "routing",
    "sample",
    "similarity",
    "teacher_floors",
    "trace",
    "train",
    "write_result",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rrepa_lab' has no attribute {name!r}")
    return getattr(import_module(f"rrepa_lab.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
