"""The signals that ask a process to end."""

import signal


def ending_signals() -> list[signal.Signals]:
    """Those of SIGINT, SIGTERM and SIGHUP that this system has; a SIGHUP that is ignored, as under nohup, is left out."""
    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [one for one in known if one.name != "SIGHUP" or signal.getsignal(one) != signal.SIG_IGN]
