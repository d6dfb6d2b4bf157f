"""Training with compiled layers: what it needs, and what it must not do."""

from contextlib import AbstractContextManager
from typing import cast

from rrepa_lab.errors import LabError


def check_compiler() -> None:
    """LabError where there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise LabError("train.compile needs a C++ compiler, and none was found: install g++, or leave it off") from error


def allow_multiple_backward() -> AbstractContextManager[None]:
    """Within it, compiled backward code does not overwrite what the graph keeps: `align.segments` takes several VJPs of it."""
    from torch._functorch import config

    return cast(AbstractContextManager[None], config.patch(donated_buffer=False))
