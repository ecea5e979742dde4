"""What our processes have in common: they end with their parent (Linux), find free ports and set up gRPC."""

import ctypes
import os
import signal
import socket
from pathlib import Path
from typing import Literal

from store.settings import Settings

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # loaded here and not in the child, where another thread's lock may be held for ever


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send this signal to the calling child when the thread that started it ends, however that went."""
    LIBC.prctl(PR_SET_PDEATHSIG, number)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port on which nobody listens at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def choose_grpc_event_loop() -> None:
    """Set gRPC to its older event loop, which takes a tenth less processor time. Call before importing it."""
    loops = ("event_engine_client", "event_engine_listener", "event_engine_callback_cq")
    os.environ.setdefault("GRPC_EXPERIMENTS", ",".join(f"-{name}" for name in loops))


def pulse_file(settings: Settings, pid: int | Literal["*"]) -> Path:
    """The file that a worker touches every second, for the supervisor on its machine or its container's health check.

    The host's name is in it because workers in containers share the home, and all of them have the id 1.
    """
    return settings.home / f"worker-{os.uname().nodename}-{pid}.pulse"
