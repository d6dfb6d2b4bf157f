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
    from rrepa_lab.align.floors import position_floor
    from rrepa_lab.analysis.alignment import Alignment, alignment
    from rrepa_lab.analysis.classify import Ascent, Classification, classify, classify_steps, evidence
    from rrepa_lab.analysis.embed import Umap, embed, neighbours, patch_colours
    from rrepa_lab.analysis.features import FeatureProtocol, Images
    from rrepa_lab.analysis.floors import teacher_floors
    from rrepa_lab.analysis.gradient_ratio import gradient_ratio
    from rrepa_lab.analysis.intervene import Intervention, ablate, patch, steer
    from rrepa_lab.analysis.jacobian import jacobian
    from rrepa_lab.analysis.noise import NoiseSamples
    from rrepa_lab.analysis.noise_choice import choose_read_noise
    from rrepa_lab.analysis.probe import best_layer, probe
    from rrepa_lab.analysis.probe_fit import ProbeFit
    from rrepa_lab.analysis.report import ClassificationReport, classification_report
    from rrepa_lab.analysis.routing import refinement_errors, routing
    from rrepa_lab.analysis.similarity import similarity
    from rrepa_lab.analysis.spatial import spatial_structure
    from rrepa_lab.analysis.steering import SteeringVector, steering_vector
    from rrepa_lab.analysis.trace import Trace, agreement, trace
    from rrepa_lab.data.config import DataConfig
    from rrepa_lab.data.images import Batch
    from rrepa_lab.errors import LabError
    from rrepa_lab.evaluation.compare import compare
    from rrepa_lab.evaluation.evaluate import evaluate, evaluate_samples
    from rrepa_lab.evaluation.nearest import Nearest, nearest_training
    from rrepa_lab.evaluation.run_samples import Sampling
    from rrepa_lab.evaluation.sample_labels import samples_by_class
    from rrepa_lab.evaluation.score import save_reference, score
    from rrepa_lab.evaluation.sweep import choose_sampling
    from rrepa_lab.evaluation.train import train
    from rrepa_lab.flow.condition import Condition, Guidance
    from rrepa_lab.flow.contract import FlowOutput, InverseOutput
    from rrepa_lab.flow.decode.plan import Decoding
    from rrepa_lab.flow.tarflow.config import FlowConfig
    from rrepa_lab.flow.tarflow.model import TarFlow
    from rrepa_lab.measurements.results import write_result
    from rrepa_lab.runs.config import RunConfig
    from rrepa_lab.runs.import_tarflow import import_tarflow
    from rrepa_lab.runs.presets import preset
    from rrepa_lab.runs.run import Run
    from rrepa_lab.runs.store import RunInfo, available, load
    from rrepa_lab.sampling.calibrate import calibrate
    from rrepa_lab.sampling.sample import Samples, sample
    from rrepa_lab.training.reports import StepReport

# public name -> module; each is imported when first used, so that `import rrepa_lab` is quick
_HOMES = {
    "DataConfig": "data.config",
    "Batch": "data.images",
    "Umap": "analysis.embed",
    "Ascent": "analysis.classify",
    "ProbeFit": "analysis.probe_fit",
    "NoiseSamples": "analysis.noise",
    "Images": "analysis.features",
    "FeatureProtocol": "analysis.features",
    "Decoding": "flow.decode.plan",
    "Guidance": "flow.condition",
    "Condition": "flow.condition",
    "Alignment": "analysis.alignment",
    "alignment": "analysis.alignment",
    "gradient_ratio": "analysis.gradient_ratio",
    "refinement_errors": "analysis.routing",
    "routing": "analysis.routing",
    "Classification": "analysis.classify",
    "classify": "analysis.classify",
    "classify_steps": "analysis.classify",
    "evidence": "analysis.classify",
    "compare": "evaluation.compare",
    "embed": "analysis.embed",
    "neighbours": "analysis.embed",
    "patch_colours": "analysis.embed",
    "evaluate": "evaluation.evaluate",
    "evaluate_samples": "evaluation.evaluate",
    "choose_sampling": "evaluation.sweep",
    "Nearest": "evaluation.nearest",
    "nearest_training": "evaluation.nearest",
    "Sampling": "evaluation.run_samples",
    "samples_by_class": "evaluation.sample_labels",
    "save_reference": "evaluation.score",
    "score": "evaluation.score",
    "position_floor": "align.floors",
    "teacher_floors": "analysis.floors",
    "choose_read_noise": "analysis.noise_choice",
    "best_layer": "analysis.probe",
    "probe": "analysis.probe",
    "ClassificationReport": "analysis.report",
    "classification_report": "analysis.report",
    "similarity": "analysis.similarity",
    "Intervention": "analysis.intervene",
    "ablate": "analysis.intervene",
    "patch": "analysis.intervene",
    "steer": "analysis.intervene",
    "SteeringVector": "analysis.steering",
    "steering_vector": "analysis.steering",
    "jacobian": "analysis.jacobian",
    "spatial_structure": "analysis.spatial",
    "Trace": "analysis.trace",
    "agreement": "analysis.trace",
    "trace": "analysis.trace",
    "LabError": "errors",
    "FlowConfig": "flow.tarflow.config",
    "FlowOutput": "flow.contract",
    "InverseOutput": "flow.contract",
    "TarFlow": "flow.tarflow.model",
    "preset": "runs.presets",
    "import_tarflow": "runs.import_tarflow",
    "write_result": "measurements.results",
    "Run": "runs.run",
    "RunConfig": "runs.config",
    "RunInfo": "runs.store",
    "available": "runs.store",
    "load": "runs.store",
    "calibrate": "sampling.calibrate",
    "Samples": "sampling.sample",
    "sample": "sampling.sample",
    "StepReport": "training.reports",
    "train": "evaluation.train",
}

__all__ = [
    "Alignment",
    "Ascent",
    "Batch",
    "Classification",
    "ClassificationReport",
    "Condition",
    "DataConfig",
    "Decoding",
    "FeatureProtocol",
    "FlowConfig",
    "FlowOutput",
    "Guidance",
    "Images",
    "Intervention",
    "InverseOutput",
    "LabError",
    "Nearest",
    "NoiseSamples",
    "ProbeFit",
    "Run",
    "RunConfig",
    "RunInfo",
    "Samples",
    "Sampling",
    "SteeringVector",
    "StepReport",
    "TarFlow",
    "Trace",
    "Umap",
    "ablate",
    "agreement",
    "alignment",
    "available",
    "best_layer",
    "calibrate",
    "choose_read_noise",
    "choose_sampling",
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
    "jacobian",
    "load",
    "nearest_training",
    "neighbours",
    "patch",
    "patch_colours",
    "position_floor",
    "preset",
    "probe",
    "refinement_errors",
    "routing",
    "sample",
    "samples_by_class",
    "save_reference",
    "score",
    "similarity",
    "spatial_structure",
    "steer",
    "steering_vector",
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
