"""Classifications of one image and of the test split, computed once."""

import time
from functools import lru_cache

import torch
from server.handlers import model_lock
from server.runs import N_TEST_IMAGES
from torch import Tensor

import rrepa_lab as rl
from rrepa_lab.analysis.classify import Classification
from rrepa_lab.analysis.report import ClassificationReport, classification_report

METHODS = {"one gradient step": "gradient", "twenty steps": "iterated", "Bayes' rule": "bayes"}
STEPS = 20
CHART_DELAY_SECONDS = 0.25  # charts begin after the verdict by this, and the twenty steps by twice that
ANY = "any"


@lru_cache(maxsize=512)
def _classified(run: rl.Run, method: str, pixels: bytes, shape: tuple[int, ...]) -> Classification:
    x = torch.frombuffer(bytearray(pixels), dtype=torch.float32).view(shape).to(run.device)
    if method != "iterated":
        with model_lock:
            return rl.classify(run, x, method)
    time.sleep(2 * CHART_DELAY_SECONDS)
    path: list[Tensor] = []
    steps = rl.classify_steps(run, x, ascent=rl.Ascent(STEPS))
    while True:  # the lock is free between two steps
        with model_lock:
            taken = next(steps, None)
        if taken is None:
            return Classification(path[-1], path[-1].argmax(dim=1), method, torch.stack(path))
        path.append(taken.scores)
        time.sleep(0.001)


def classified(run: rl.Run, method: str, x: Tensor) -> Classification:
    """`rl.classify` of one image, computed once."""
    return _classified(run, method, x.numpy().tobytes(), tuple(x.shape))


@lru_cache(maxsize=32)
def report_of(run: rl.Run, method: str) -> ClassificationReport:
    """`rl.classification_report` of N_TEST_IMAGES images of the test split, class-balanced."""
    return classification_report(run, method, images=rl.Images(limit=N_TEST_IMAGES))


def matching_rows(report: ClassificationReport, of: str, taken_for: str, mistakes: bool) -> list[int]:
    """Rows of the test split by class and answer, least sure first."""
    table = report.images
    keep = (table["class"] == of) | (of == ANY)
    keep &= (table["predicted"] == taken_for) | (taken_for == ANY)
    if mistakes:
        keep &= ~table["right"].astype(bool)
    return [int(row) for row in table[keep].sort_values("margin")["image"]]
