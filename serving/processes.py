"""Processes that end with the process that has started them (Linux)."""

import ctypes
import signal

PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Called in a child: the kernel sends it this signal when its parent is gone, however that went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
