"""Weights from the Hugging Face Hub, without a long wait where it cannot be reached.

huggingface_hub repeats a request that fails for up to a minute. Here one short request is tried first; if it fails, the
library is put into its offline mode, in which cached files are used and a missing one is an error at once.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT = 4.0  # seconds for the first request
REMEMBERED = 60.0  # seconds for which a failed request is not repeated

_LOCK = threading.RLock()  # the offline mode belongs to the process


class _State:
    last_failure = -float("inf")  # time.monotonic() of the last request that failed
    endpoint = ""  # that it was sent to


@contextmanager
def hub(download: bool = True) -> Iterator[bool]:
    """The hub's library within it: online where `download` is set and the hub answers, else in its offline mode.

    Yields whether it is online.
    """
    from huggingface_hub import constants

    with _LOCK:
        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = before or not (download and _reachable())
        try:
            yield not constants.HF_HUB_OFFLINE
        finally:
            constants.HF_HUB_OFFLINE = before


def _reachable() -> bool:
    from huggingface_hub import constants, get_session

    recent = time.monotonic() - _State.last_failure < REMEMBERED and _State.endpoint in ("", constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or recent:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # the exceptions of whichever HTTP library it uses; the weights themselves are fetched with real errors
        _State.last_failure, _State.endpoint = time.monotonic(), constants.ENDPOINT
        return False
    return True
