"""What our processes have in common: they end with their parent (Linux), find free ports and set up gRPC."""

import ctypes
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

# What comes before the names of our packages: nothing in a checkout, `temper.` in a wheel (setup.py).
PREFIX = __name__.removesuffix("store.processes")
ROOT = Path(__file__).parents[1 + PREFIX.count(".")]  # the directory that they are in
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # loaded here and not in the child, where another thread's lock may be held for ever


def module_command(module: str) -> list[str]:
    """The command that runs one of our modules, such as `trainer`."""
    return [sys.executable, "-m", PREFIX + module]


def has_tensorflow() -> bool:
    """Tell whether TensorFlow is installed, without importing it."""
    return find_spec("tensorflow") is not None


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
