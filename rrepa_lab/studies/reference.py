"""The reference page of the public names, made from their docstrings.

python -m rrepa_lab.studies.reference            write assets/reference.md
python -m rrepa_lab.studies.reference --check    exit status 1 if it is not up to date
"""

import inspect
import sys
from typing import Any

import rrepa_lab as rl
from rrepa_lab.files import write_text
from rrepa_lab.paths import assets

GROUPS = {
    "Runs": "available load preset train Run RunConfig RunInfo StepReport DataConfig Batch import_tarflow LabError",
    "The flow": "TarFlow FlowConfig FlowOutput InverseOutput Condition Guidance Decoding calibrate",
    "Sampling": "sample Samples",
    "Gradients and alignment": "alignment Alignment routing refinement_errors gradient_ratio position_floor teacher_floors",
    "Features": "trace Trace agreement FeatureProtocol Images probe ProbeFit best_layer similarity spatial_structure embed "
    "Umap neighbours patch_colours",
    "Interventions": "patch steer ablate Intervention steering_vector SteeringVector jacobian",
    "Classification": "classify Classification classify_steps Ascent evidence NoiseSamples choose_read_noise "
    "classification_report ClassificationReport",
    "Evaluation": "evaluate evaluate_samples Sampling samples_by_class score save_reference choose_sampling nearest_training "
    "Nearest compare write_result",
}
HEAD = """# Public names of rrepa_lab

`import rrepa_lab as rl`; every name below is `rl.<name>`. Made from the docstrings by
`python -m rrepa_lab.studies.reference`; the examples are run by `pytest`.

Shapes: B images of C channels and H x W, T tokens of P numbers, D width, K classes, N blocks.
"""


def page() -> str:
    """The page in Markdown."""
    headings = [heading for title, names in GROUPS.items() for heading in (title, *names.split())]
    anchors = dict(zip(headings, _anchors(["Public names of rrepa_lab", *headings])[1:], strict=True))
    parts = [HEAD]
    for title, names in GROUPS.items():
        links = ", ".join(f"[`{name}`](#{anchors[name]})" for name in names.split())
        parts.append(f"- **{title}**: {links}")
    for title, names in GROUPS.items():
        parts.append(f"\n## {title}\n")
        parts += [_entry(name) for name in names.split()]
    return "\n".join(parts).rstrip() + "\n"


def _anchors(headings: list[str]) -> list[str]:
    """The anchors that Markdown viewers give them: in lower case, a repeated one numbered."""
    found: list[str] = []
    for heading in headings:
        slug = heading.lower().replace(" ", "-")
        count = sum(one.lower().replace(" ", "-") == slug for one in headings[: len(found)])
        found.append(f"{slug}-{count}" if count else slug)
    return found


def _entry(name: str) -> str:
    value: Any = getattr(rl, name)
    kind = "class " if inspect.isclass(value) else ""
    text = inspect.getdoc(value) or ""
    return f"### {name}\n\n```python\n{kind}{name}{_signature(value)}\n```\n\n```text\n{text}\n```\n"


def _signature(value: Any) -> str:
    """Parameters with defaults, one a line where they are many; without annotations, which the text explains."""
    try:
        found = inspect.signature(value)
    except ValueError:
        return ""
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values() if one.name != "self"]
    text = str(inspect.Signature(plain))
    return text if len(text) <= 100 else "(\n    " + ",\n    ".join(text[1:-1].split(", ")) + ",\n)"


def main() -> int:
    """Write the page, or check it."""
    path = assets() / "reference.md"
    if "--check" in sys.argv[1:]:
        return int(not path.is_file() or path.read_text("utf-8") != page())
    write_text(path, page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
